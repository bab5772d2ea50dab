"""A GRU as pure functions in JAX, with a handwritten and proven backward pass.

Here is the layer itself: `gru` runs a `GRUParams` over a sequence, `gru_cell` over one step,
`gru_stack` a tuple of layers. The rest is in these modules, each imported when it is first used:

* `jaxgru.models`, `jaxgru.losses`: models of sequences and of tokens, and their losses.
* `jaxgru.training`: one jitted update with optax, the loop around it, checkpoints, logs, devices.
* `jaxgru.diagnostics`: gradient flow, gates, Jacobians and RTRL.
* `jaxgru.checks`: any handwritten derivative against autodiff and finite differences.
* `jaxgru.interop`: weights of PyTorch, Keras, Flax, Equinox, Haiku, ONNX and safetensors.
* `jaxgru.experimental`: what has not been proven on the hardware that it is for.
* `jaxgru.core`: how the layer is made; `jaxgru/core/README.md` derives the backward pass.

>>> import jax, jax.numpy as jnp, jaxgru
>>> params = jaxgru.init_gru(jax.random.key(0), 2, 3)
>>> h_last, hs = jax.jit(jaxgru.gru)(params, jnp.ones((5, 4, 2)))
>>> hs.shape
(5, 4, 3)
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from jaxgru.core.cell import gru_cell
from jaxgru.core.gradient import BPTT, Autodiff, Tangent
from jaxgru.core.noise import Noise
from jaxgru.core.parameters import CHO_2014, CHUNG_2014, PYTORCH, GRUParams, GRUSpec
from jaxgru.core.recurrence import Tap, gru
from jaxgru.initializers import init_gru
from jaxgru.masks import length_mask, resets_from_dones
from jaxgru.stacks import (
    Bidirectional,
    Dropout,
    gru_bidirectional,
    gru_stack,
    gru_stack_cell,
    init_stack,
    init_state,
    init_taps,
)

if TYPE_CHECKING:
    from jaxgru import checks, diagnostics, experimental, interop, losses, models, training

    __version__: str

__all__ = [
    "BPTT",
    "CHO_2014",
    "CHUNG_2014",
    "PYTORCH",
    "Autodiff",
    "Bidirectional",
    "Dropout",
    "GRUParams",
    "GRUSpec",
    "Noise",
    "Tangent",
    "Tap",
    "checks",
    "diagnostics",
    "experimental",
    "gru",
    "gru_bidirectional",
    "gru_cell",
    "gru_stack",
    "gru_stack_cell",
    "init_gru",
    "init_stack",
    "init_state",
    "init_taps",
    "interop",
    "length_mask",
    "losses",
    "models",
    "resets_from_dones",
    "training",
]


def __getattr__(name: str) -> Any:
    """Imports a room at its first use, and reads the version that is installed."""
    if name == "__version__":
        try:
            return importlib.metadata.version("jaxgru")
        except importlib.metadata.PackageNotFoundError:
            raise AttributeError(
                "jaxgru.__version__ is known only where jaxgru is installed"
            ) from None
    if name in __all__:
        return importlib.import_module(f"jaxgru.{name}")
    raise AttributeError(f"module 'jaxgru' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
