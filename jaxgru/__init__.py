"""A GRU as pure functions in JAX, with a handwritten and proven backward pass.

The tour, from the equation outwards:

* `jaxgru.cell`: one step. `GRUParams` are arrays, `GRUSpec` chooses the equation, `init_gru` draws
  parameters, `gru_cell` is h' = step(x, h). `CHO_2014`, `CHUNG_2014` and `PYTORCH` name the three
  usual specs.
* `jaxgru.recurrence`: `gru` scans the cell over a sequence. Its gradient is a handwritten
  `custom_vjp` ("bptt"), a handwritten JVP ("tangent": forward mode, any order), or JAX's own
  ("autodiff"). `length_mask` turns lengths into a mask.
* `jaxgru.check`: `check_gradients` compares any handwritten derivative with autodiff and finite
  differences, `check_gru` does so for this package.
* `jaxgru.models`: `token_loss` and `generate` put an embedding and a head around the recurrence.
* `jaxgru.training`: `make_train_step` and `fit` train any loss with optax; `save_arrays` and
  `load_arrays` keep weights in files that run no code.

>>> import jax, jax.numpy as jnp, jaxgru
>>> params = jaxgru.init_gru(jax.random.key(0), 2, 3)
>>> h_last, hs = jax.jit(jaxgru.gru)(params, jnp.ones((5, 4, 2)))
>>> hs.shape
(5, 4, 3)
"""

from jaxgru.cell import (
    CHO_2014,
    CHUNG_2014,
    PYTORCH,
    GRUParams,
    GRUSpec,
    gru_cell,
    init_gru,
)
from jaxgru.check import check_gradients, check_gru
from jaxgru.comparison import GradientReport, GradientRow
from jaxgru.models import TokenParams, generate, init_token_model, token_logits, token_loss
from jaxgru.recurrence import gru, length_mask
from jaxgru.training import (
    NonFiniteError,
    TrainState,
    fit,
    init_train_state,
    load_arrays,
    make_train_step,
    read_metadata,
    save_arrays,
)

__all__ = [
    "CHO_2014",
    "CHUNG_2014",
    "PYTORCH",
    "GRUParams",
    "GRUSpec",
    "GradientReport",
    "GradientRow",
    "NonFiniteError",
    "TokenParams",
    "TrainState",
    "check_gradients",
    "check_gru",
    "fit",
    "generate",
    "gru",
    "gru_cell",
    "init_gru",
    "init_token_model",
    "init_train_state",
    "length_mask",
    "load_arrays",
    "make_train_step",
    "read_metadata",
    "save_arrays",
    "token_logits",
    "token_loss",
]
