"""The bits that a checkpoint holds, for tests that compare two; Orbax's files have random names."""

import json
import pathlib

import numpy as np
import orbax.checkpoint as ocp


def saved_bits(checkpoint: pathlib.Path) -> tuple[dict, dict[str, bytes]]:
    """The manifest but for the sums of files, and the bytes of each array."""
    manifest = json.loads(json.loads((checkpoint / "manifest.json").read_text())["manifest"])
    del manifest["files"]
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(checkpoint)
    return manifest, {number: np.asarray(array).tobytes() for number, array in arrays.items()}
