"""The run folders, checkpoints and exit codes that all experiments share.

A run folder holds config.json, metrics.jsonl (a line of JSON for each record of training), a folder
of checkpoints, and the experiment's own results. A script exits with 0 on success, with 1 if
training or a check failed, and with 2 and one line of explanation if its input cannot be used. On
SIGTERM or SIGINT (Ctrl-C) it finishes the current update, saves a checkpoint and exits with 143 or
130. Ctrl-C outside training ends it at once, also with 130. `--resume RUN` continues after that or
after a crash, in any folder, and gives the same bytes as a run that was never stopped.
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


class CheckError(Exception):
    """A check of the script failed. It ends with the message on one line and code 1."""


def run_script(
    name: str, run: Callable[[], int], extras: tuple[str, ...] = (), *, smoke: bool = False
) -> int:
    """Runs a script and returns its exit code; prints one line for an error or a signal.

    Args:
      name: of the experiment, for the messages.
      run: the script; returns an exit code.
      extras: modules that the script needs besides tqdm and matplotlib.
      smoke: XLA optimizes little, for compiling takes most of the time of a tiny run. Before and
        after such a run, JAX drops all programs that this process has compiled, not only those of
        the script. Nothing changes if the option jax_disable_most_optimizations is already set.
    """
    optimizing = "jax_disable_most_optimizations"
    before = jax.config.read(optimizing)
    if not smoke or before:
        return _run(name, run, extras)
    # JAX reuses a program that was compiled with the other value of the option, and two runs of
    # one command in one process would then round differently.
    jax.clear_caches()
    jax.config.update(optimizing, True)
    try:
        return _run(name, run, extras)
    finally:
        jax.config.update(optimizing, before)
        jax.clear_caches()


def _run(name, run, extras):
    try:
        for module in ("tqdm", "matplotlib.figure", *extras):
            importlib.import_module(module)
    except ImportError as error:
        return fail_without(name, error)
    _folders.clear()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place: fail(name, message)
        try:
            return run()
        except (DataError, OSError, ImportError, training.CheckpointError) as error:
            return fail(name, error)
        except (training.NonFiniteError, CheckError) as error:
            fail(name, error)
            return 1
        except training.Interrupted as error:
            folder = next(p for p in (error.folder, *error.folder.parents) if p.name == CHECKPOINTS)
            # `fit` has said which signal stopped it, and where the checkpoint is.
            fail(name, f"continue with: python -m experiments.{name} --resume {folder.parent}")
            return int(str(error.code))
        except KeyboardInterrupt:
            fail(name, "; the run folder is ".join(["stopped by Ctrl-C", *map(str, _folders[-1:])]))
            return 130


def fail(name: str, message: Any) -> int:
    """Prints one line to standard error; returns 2, the exit code for unusable input."""
    print(f"{name}: {message}", file=sys.stderr)
    return 2


def fail_without(name: str, error: ImportError, extra: str = "experiments") -> int:
    """As `fail`, for a module of an extra that is not installed."""
    return fail(name, f"{error}; install the extra: pip install -e '.[{extra}]'")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of every option that has one and does not describe it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default == [] or "(default" in str(action.help):
            return action.help
        if isinstance(default, list | tuple):  # as it is written in a command
            return f"{action.help} (default: {' '.join(map(str, default))})".replace("%", "%%")
        return super()._get_help_string(action)


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m experiments.NAME`, whose --help shows every default."""
    prog = f"python -m experiments.{name}"
    return argparse.ArgumentParser(prog, description=description, formatter_class=HelpFormatter)


def parse_first(parser: argparse.ArgumentParser, argv: Any) -> argparse.Namespace:
    """The options before presets replace their defaults; --help is left to the last parse."""
    argv = sys.argv[1:] if argv is None else argv
    return parser.parse_known_args([text for text in argv if text not in ("-h", "--help")])[0]


def absolute_path(text: str) -> str:
    """The type of an option that names a file: config.json must hold for --resume in any folder."""
    return str(pathlib.Path(text).absolute())


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every script that trains; `parse_options` reads them."""
    add = parser.add_argument
    add("--resume", metavar="RUN", help="continue the run in this folder, with its options")
    add("--checkpoint-every", type=int, default=0, metavar="N",
        help="save after every N updates; 0 to save at each evaluation")  # fmt: skip
    add("--tensorboard", action="store_true", help="also write RUN/tensorboard (tensorboardX)")


def parse_options(parser: argparse.ArgumentParser, argv: Any) -> argparse.Namespace:
    """The options of the command line; with --resume, those of the run's config.json."""
    args = parser.parse_args(argv)
    unset = dict.fromkeys(vars(args), UNSET)
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**unset)))
    given = {name for name, value in parsed.items() if value is not UNSET}
    if args.checkpoint_every < 0:
        parser.error(f"--checkpoint-every must be at least 0, got {args.checkpoint_every}")
    if args.resume is None:
        return args
    fixed = sorted(name for name in given if name == "out" or name not in CHANGEABLE_OPTIONS)
    if fixed:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in fixed)
        parser.error(f"--resume uses the options of the run; leave out {named}")
    try:
        config = json.loads((pathlib.Path(args.resume) / "config.json").read_text("utf-8"))
        missing = sorted(vars(args).keys() - CHANGEABLE_OPTIONS - set(config))
        if missing:
            raise ValueError(
                f"its config.json belongs to another experiment, missing keys {missing}"
            )
        restored = (vars(args).keys() - CHANGEABLE_OPTIONS) | (set(LOGGING_OPTIONS) - given)
        saved = {name: value for name, value in config.items() if name in restored}
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(
            f"--resume must be a run folder of this experiment, got {args.resume}: {error}"
        )
    return argparse.Namespace(**{**vars(args), **saved, "out": args.resume})


def open_run(name: str, args: argparse.Namespace, **metadata: Any) -> pathlib.Path:
    """The run folder of --resume, or a new one with the options and metadata in its config.json."""
    if args.tensorboard:
        training.TensorBoard("")  # raises an ImportError here if tensorboardX is missing
    if args.resume is not None:
        return pathlib.Path(args.resume).absolute()
    return make_run_folder(name, args.out, {**vars(args), **metadata})


def make_run_folder(name: str, out: str | None, config: dict[str, Any]) -> pathlib.Path:
    """Makes a folder, by default runs/NAME-DATE, and writes config.json.

    Raises:
      DataError: the folder exists and is not empty.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run = pathlib.Path(out or pathlib.Path("runs") / f"{name}-{stamp}")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise DataError(f"{run} exists and is not an empty folder; nothing was overwritten")
    run.mkdir(parents=True, exist_ok=True)
    _folders.append(run.absolute())
    write_json(run / "config.json", config)
    return run.absolute()


def checkpoints_of(
    run: pathlib.Path, args: argparse.Namespace, every: int, part: str = "", **metadata: Any
) -> training.Checkpoints:
    """The checkpoints of a run, or of one part of it.

    They are refused if the options, or metadata such as the checksum of the data, are not the same.
    """
    return training.Checkpoints(
        run / CHECKPOINTS / part,
        args.checkpoint_every or every,
        run={"config": config_of(args), **metadata},
        resume=args.resume is not None,
    )


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that determine the results of a run."""
    return {name: value for name, value in vars(args).items() if name not in CHANGEABLE_OPTIONS}


def loggers(run: pathlib.Path, args: argparse.Namespace, **fields: Any) -> list[training.Callback]:
    """Callbacks of `fit` that write RUN/metrics.jsonl and, with --tensorboard, RUN/tensorboard."""
    logs: list[training.Callback] = [training.JsonLines(run / METRICS, **fields)]
    if args.tensorboard:
        part = "-".join(str(value) for value in fields.values())
        logs.append(training.TensorBoard(run / "tensorboard" / part))
    return logs


def read_records(run: pathlib.Path, **fields: Any) -> list[dict[str, Any]]:
    """The training records of RUN/metrics.jsonl that have these fields, resumed parts included."""
    return [
        record
        for record in training.read_json_lines(run / METRICS)
        if "loss" in record and all(record.get(name) == v for name, v in fields.items())
    ]


def write_json(path: pathlib.Path, record: Any) -> None:
    """Writes a file of strict JSON; a number that is not finite becomes null."""
    text = json.dumps(training.json_values(record), indent=1, allow_nan=False, ensure_ascii=False)
    replace_text(path, text + "\n")


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically; it replaces a file of that name."""
    training.write_atomically(path, text.encode())


def describe_device() -> str:
    """The platform, device and JAX version of this process, for the first line of a run."""
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind}), jax {jax.__version__}"


# Options that do not change the results: folders, logging, and the processes that run the script.
LOGGING_OPTIONS = ("checkpoint_every", "tensorboard")
CHANGEABLE_OPTIONS = {
    *("out", "resume", "skip_check", *LOGGING_OPTIONS),
    *("coordinator", "num_processes", "process_id", "distributed"),
}
UNSET = object()
_folders: list[pathlib.Path] = []  # those that the present script has made
CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
