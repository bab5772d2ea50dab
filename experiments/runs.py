"""What every experiment's script shares: its run folder, its checkpoints, and how it ends.

A run folder holds config.json, metrics.jsonl (a line of JSON for each record of training), a folder
of checkpoints, and the experiment's own results. A script ends with code 0; 1 where training or a
check failed; 2 with one line where its input is unusable; and 143 or 130 where SIGTERM or SIGINT
(Ctrl-C) stopped it, after the update was finished and saved: `--resume RUN` goes on from there, as
it does after a crash, in the same bytes as if the run had never stopped.
"""

import argparse
import datetime
import importlib
import json
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax

from experiments.data import DataError
from jaxgru import training


def run_script(name: str, run: Callable[[], int], extras: tuple[str, ...] = ()) -> int:
    """The exit code of a script: run's own, or that of the way it was stopped, with one line.

    `extras` are further modules that the script needs beside tqdm and matplotlib.
    """
    try:
        for module in ("tqdm", "matplotlib.figure", *extras):
            importlib.import_module(module)
    except ImportError as error:
        return fail(name, f"{error}; install the extra: pip install -e '.[experiments]'")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place: fail(name, message)
        try:
            return run()
        except (DataError, OSError, ImportError, training.CheckpointError) as error:
            return fail(name, error)
        except training.NonFiniteError as error:
            fail(name, error)
            return 1
        except training.Interrupted as error:
            folder = next(p for p in (error.folder, *error.folder.parents) if p.name == CHECKPOINTS)
            command = f"python -m experiments.{name} --resume {folder.parent}"
            fail(name, f"{error}; go on with: {command}")
            return int(str(error.code))


def fail(name: str, message: Any) -> int:
    """Prints one line on the standard error; the code of unusable input."""
    print(f"{name}: {message}", file=sys.stderr)
    return 2


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of every script that trains; `take_options` reads them."""
    add = parser.add_argument
    add("--resume", metavar="RUN", help="go on with this run folder, with the options it has")
    add("--checkpoint-every", type=int, default=0, help="updates; 0 for as often as it evaluates")
    add("--tensorboard", action="store_true", help="write RUN/tensorboard too (needs tensorboardX)")


def take_options(parser: argparse.ArgumentParser, argv: Any) -> argparse.Namespace:
    """The options of the command line, or with --resume those of the run's config.json."""
    args = parser.parse_args(argv)
    unset = dict.fromkeys(vars(args), UNSET)
    told = vars(parser.parse_args(argv, argparse.Namespace(**unset)))
    given = {name for name, value in told.items() if value is not UNSET}
    if args.checkpoint_every < 0:
        parser.error(f"--checkpoint-every must be at least 0, got {args.checkpoint_every}")
    if args.resume is None:
        return args
    wrong = sorted(name for name in given if name == "out" or name not in ASIDE)
    if wrong:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        parser.error(f"--resume takes the options of the run; leave out {named}")
    try:
        config = json.loads((pathlib.Path(args.resume) / "config.json").read_text("utf-8"))
        lacking = sorted(set(vars(args)) - set(config))
        if lacking:
            raise ValueError(f"its config.json is of another experiment, without {lacking}")
        watched = set(WATCHED) - given
        saved = {n: v for n, v in config.items() if n in watched or n in vars(args).keys() - ASIDE}
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(
            f"--resume must be a run folder of this experiment, got {args.resume}: {error}"
        )
    return argparse.Namespace(**{**vars(args), **saved, "out": args.resume})


def open_run(name: str, args: argparse.Namespace, **facts: Any) -> pathlib.Path:
    """The run folder of --resume, or a new one with the options and facts in its config.json."""
    if args.tensorboard:
        training.TensorBoard("")  # an ImportError before anything is done
    if args.resume is not None:
        return pathlib.Path(args.resume)
    return make_run_folder(name, args.out, {**vars(args), **facts})


def make_run_folder(name: str, out: str | None, config: dict[str, Any]) -> pathlib.Path:
    """A new folder, runs/NAME-DATE unless told, with config.json; never one that holds files."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run = pathlib.Path(out or pathlib.Path("runs") / f"{name}-{stamp}")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise DataError(f"{run} exists and is not an empty folder; nothing was overwritten")
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", config)
    return run


def checkpoints_of(
    run: pathlib.Path, args: argparse.Namespace, every: int, part: str = "", **facts: Any
) -> training.Checkpoints:
    """Checkpoints of a run, or of one part of it, that only the same options and data resume."""
    return training.Checkpoints(
        run / CHECKPOINTS / part,
        args.checkpoint_every or every,
        run={"config": config_of(args), **facts},
        resume=args.resume is not None,
    )


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that say what a run computes."""
    return {name: value for name, value in vars(args).items() if name not in ASIDE}


def loggers(run: pathlib.Path, args: argparse.Namespace, **fields: Any) -> list[training.Callback]:
    """Callbacks of `fit` that write RUN/metrics.jsonl, and TensorBoard's files where asked for."""
    logs: list[training.Callback] = [training.JsonLines(run / METRICS, **fields)]
    if args.tensorboard:
        part = "-".join(str(value) for value in fields.values())
        logs.append(training.TensorBoard(run / "tensorboard" / part))
    return logs


def read_records(run: pathlib.Path, **fields: Any) -> list[dict[str, Any]]:
    """The records of training in RUN/metrics.jsonl, before and after a resumption."""
    return [
        record
        for record in training.read_json_lines(run / METRICS)
        if "loss" in record and all(record.get(name) == v for name, v in fields.items())
    ]


def write_json(path: pathlib.Path, record: Any) -> None:
    """A file of strict JSON; a number that is not finite becomes null."""
    text = json.dumps(training.json_values(record), indent=1, allow_nan=False, ensure_ascii=False)
    replace_text(path, text + "\n")


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically, in the place of one that exists."""
    training.write_atomically(path, text.encode())


def describe_device() -> str:
    """The platform, device and JAX of this process, for the first line of a run."""
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind}), jax {jax.__version__}"


# Options that do not say what is computed: where a run lies, how it is watched, and on what.
WATCHED = ("checkpoint_every", "tensorboard")
ASIDE = {
    *("out", "resume", *WATCHED),
    *("coordinator", "num_processes", "process_id", "distributed"),
}
UNSET = object()
CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
