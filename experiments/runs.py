"""What every experiment's script shares: its run folder, its lines of metrics, and how it ends."""

import datetime
import importlib
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax

from experiments.data import DataError


def run_script(name: str, run: Callable[[], int], extras: tuple[str, ...] = ()) -> int:
    """The exit code of a script: run's own, or 2 with one line where its input is unusable.

    `extras` are further modules that the script needs beside tqdm and matplotlib.
    """
    try:
        for module in ("tqdm", "matplotlib.figure", *extras):
            importlib.import_module(module)
    except ImportError as error:
        cure = "install the extra: pip install -e '.[experiments]'"
        print(f"{name}: {error}; {cure}", file=sys.stderr)
        return 2
    try:
        return run()
    except (DataError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def make_run_folder(name: str, out: str | None, config: dict[str, Any]) -> pathlib.Path:
    """A new folder, runs/NAME-DATE unless told, with config.json; never one that holds files."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run = pathlib.Path(out or pathlib.Path("runs") / f"{name}-{stamp}")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise DataError(f"{run} exists and is not an empty folder; nothing was overwritten")
    run.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=1, ensure_ascii=False)
    (run / "config.json").write_text(text + "\n", encoding="utf-8")
    return run


def append_metrics(run: pathlib.Path, record: dict[str, Any]) -> None:
    """One line of JSON in metrics.jsonl; a number that is not finite becomes null."""

    def finite(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    line = json.dumps({k: finite(v) for k, v in record.items()}, allow_nan=False)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def describe_device() -> str:
    """The platform, device and JAX of this process, for the first line of a run."""
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind}), jax {jax.__version__}"
