"""Writes the results of every installed peer for random weights.

Run `PYTHONPATH=.. python -m golden.write` in `tests/interop`.

It needs the extra `peers` and writes one .npz file for each peer and variant: weights, inputs,
cotangents, outputs and the peer's own gradients, all in float64, and the peer's version.
"""

import importlib.metadata
import pathlib

import numpy as np
from peer_layers import VARIANTS, draw_case

FOLDER = pathlib.Path(__file__).parent
PACKAGES = {
    "torch": "torch",
    "keras": "keras",
    "linen": "flax",
    "nnx": "flax",
    "equinox": "equinox",
    "haiku": "dm-haiku",
}


def main():
    """Writes all files; the random numbers depend only on the peer and variant."""
    for seed, (name, variant) in enumerate(VARIANTS):
        case = draw_case(name, variant, seed=seed)
        package = PACKAGES.get(name)
        version = f"{package} {importlib.metadata.version(package)}" if package else "typed"
        arrays = {f"weights:{k}": v for k, v in case.weights.items()}
        arrays |= {f"grads:{k}": v for k, v in case.grads.items()}
        arrays |= {k: getattr(case, k) for k in ("xs", "cotangents", "hs", "dxs")}
        path = FOLDER / f"{name}_{variant}.npz"
        np.savez_compressed(path, version=version, **arrays)
        print(f"{path.name}: {version}")


if __name__ == "__main__":
    main()
