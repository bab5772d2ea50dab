"""The contenders by name: jaxgru, the plain scans, and the other libraries.

A library is imported only when it is chosen. If it is missing, the error is one line.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.benchmarks.jax_libraries import equinox, flax_linen, flax_nnx, haiku, keras_gru
from experiments.benchmarks.layers import Layer, build, build_cut, our_layer, plain_layer
from experiments.benchmarks.problems import DIVISORS, RESETS, TASKS, Program, Reset, Size, Task
from experiments.benchmarks.torch_library import allow_tf32, torch_gru
from jaxgru import BPTT

OURS, GATES, STATES = "jaxgru", "jaxgru gates", "jaxgru states"
CUT = "jaxgru, cut to the longest"
LINEN, TORCH = "Flax linen", "torch.nn.GRU"
TRAINING: tuple[Task, ...] = ("training",)
SEQUENCES: tuple[Task, ...] = ("training", "forward")
PADDED: tuple[Task, ...] = tuple(DIVISORS)
UNPADDED: tuple[Task, ...] = tuple(task for task in TASKS if task not in DIVISORS)
AFTER: tuple[Reset, ...] = ("after",)
BEFORE: tuple[Reset, ...] = ("before",)

Build = Callable[..., Program]  # task, problem, compiles -> Program


class Library(NamedTuple):
    """A contender: how its programs are made, and what it supports."""

    make: Callable[[Reset, Size, Any], Build]  # reset, size, dtype
    resets: tuple[Reset, ...] = RESETS
    tasks: tuple[Task, ...] = TASKS
    module: str | None = None  # the module that must be installed
    packages: tuple[str, ...] = ()  # distributions whose versions are recorded


def ours(tasks: tuple[Task, ...], gradient: Any = "bptt", one_chunk: bool = False) -> Library:
    """jaxgru with this gradient; with one_chunk, BPTT of the whole sequence in one chunk."""

    def make(reset, size, dtype):
        chosen = BPTT(chunk_size=size.num_steps) if one_chunk else gradient
        return functools.partial(build, our_layer(reset, chosen))

    return Library(make, tasks=tasks)


def _ours_cut() -> Library:
    """jaxgru without the steps that are padding in every sequence of the batch."""
    return Library(lambda reset, *_: functools.partial(build_cut, our_layer(reset)), tasks=PADDED)


def _plain(hoist: bool) -> Library:
    """A plain scan; the hoisted one has no single step."""

    def make(reset, size, dtype):
        return functools.partial(build, plain_layer(reset, hoist=hoist))

    return Library(make, tasks=(*SEQUENCES, *PADDED) if hoist else TASKS)


def _jax_peer(
    make_layer: Callable[..., Layer],
    resets: tuple[Reset, ...],
    module: str,
    package: str,
    tasks: tuple[Task, ...] = TASKS,
) -> Library:
    """A library whose layer runs under JAX."""

    def make(reset, size, dtype):
        return functools.partial(build, make_layer(reset, size, dtype))

    return Library(make, resets, tasks, module, (package,))


PLAIN: dict[str, Library] = {
    "plain scan": _plain(hoist=False),
    "plain scan, hoisted": _plain(hoist=True),
}
JAX_PEERS: dict[str, Library] = {
    **PLAIN,
    LINEN: _jax_peer(flax_linen, AFTER, "flax.linen", "flax"),
    "Flax nnx": _jax_peer(flax_nnx, AFTER, "flax.nnx", "flax"),
    "Equinox": _jax_peer(equinox, AFTER, "equinox", "equinox", UNPADDED),
    "Haiku": _jax_peer(haiku, BEFORE, "haiku", "dm-haiku", UNPADDED),
    "Keras": _jax_peer(keras_gru, RESETS, "keras", "keras"),
}
PEERS: dict[str, Library] = {
    **JAX_PEERS,
    TORCH: Library(torch_gru, AFTER, TASKS, "torch", ("torch",)),
}
LIBRARIES: dict[str, Library] = {
    OURS: ours(TASKS),
    GATES: ours(TRAINING, BPTT("gates")),  # residuals do not matter in the forward pass
    STATES: ours(TRAINING, BPTT("states")),
    "jaxgru boundaries": ours(TRAINING, BPTT("boundaries")),
    "jaxgru tangent": ours(SEQUENCES, "tangent"),  # its forward pass has no chunks
    "jaxgru autodiff": ours(TRAINING, "autodiff"),
    CUT: _ours_cut(),
    **PEERS,
}


def choose(names: Sequence[str], chunks: Sequence[int | None] = ()) -> dict[str, Library]:
    """{name: library}; jaxgru comes first, as all others are compared with it.

    For each chunk there is one more contender; None means the whole sequence in one chunk.

    Raises:
      SystemExit: a library is not installed.
    """
    chosen = {name: LIBRARIES[name] for name in dict.fromkeys((OURS, *names))}
    for chunk in chunks:
        name = "jaxgru whole sequence" if chunk is None else f"jaxgru chunk_size={chunk}"
        chosen[name] = ours(SEQUENCES, BPTT(chunk_size=chunk), one_chunk=chunk is None)
    for name, library in chosen.items():
        if library.module is not None:
            _import(library.module, name)
    return chosen


def _import(module: str, name: str) -> None:
    """Imports a library; the backend of Keras must be set before."""
    if module == "keras":
        os.environ["KERAS_BACKEND"] = "jax"
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        sys.exit(
            f"peers: --contenders has {name!r}, which cannot be imported ({error}); install it "
            f'with pip install -e ".[peers]" or leave it out.'
        )
    if module == "keras" and found.backend.backend() != "jax":
        sys.exit(
            f"peers: {name!r} must run on the JAX backend, got {found.backend.backend()!r}; import "
            f"keras with KERAS_BACKEND=jax in the environment."
        )


def can_run(library: Library, task: Task, reset: Reset) -> bool:
    """Whether the library supports this task with this equation."""
    return task in library.tasks and reset in library.resets


def set_tf32(chosen: dict[str, Library], allowed: bool) -> None:
    """Sets the precision of torch, if it is chosen; JAX has jax.default_matmul_precision."""
    if TORCH in chosen:
        allow_tf32(allowed)


def versions_of(chosen: dict[str, Library]) -> tuple[str, ...]:
    """The distributions of the contenders."""
    return tuple(dict.fromkeys(name for library in chosen.values() for name in library.packages))
