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
    write_json(run / "config.json", config)
    return run


def append_metrics(run: pathlib.Path, record: dict[str, Any]) -> None:
    """One line of JSON in metrics.jsonl; a number that is not finite becomes null."""
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(record), allow_nan=False) + "\n")


def write_json(path: pathlib.Path, record: Any) -> None:
    """A file of strict JSON; a number that is not finite becomes null."""
    text = json.dumps(finite(record), indent=1, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with null for NaN and infinity, and text for what JSON has no form of."""
    if isinstance(value, dict):
        return {str(name): finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def describe_device() -> str:
    """The platform, device and JAX of this process, for the first line of a run."""
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind}), jax {jax.__version__}"
