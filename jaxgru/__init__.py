"""A GRU as pure functions in JAX, with a handwritten and proven backward pass.

The tour, from the equation outwards:

* `jaxgru.parameters`: `GRUParams` are arrays, `GRUSpec` chooses the equation, `init_gru` draws
  parameters. `CHO_2014`, `CHUNG_2014` and `PYTORCH` name the three usual specs.
* `jaxgru.cell`: one step, `gru_cell`, is h' = step(x, h).
* `jaxgru.recurrence`: `gru` scans the cell over a sequence. Its gradient is a handwritten
  `custom_vjp` ("bptt"), a handwritten JVP ("tangent": forward mode, any order), or JAX's own
  ("autodiff").
* `jaxgru.masks`: `length_mask` turns lengths into a mask, `resets_from_dones` ends of episodes into
  resets.
* `jaxgru.check`: `check_gradients` compares any handwritten derivative with autodiff and finite
  differences, `check_gru` does so for this package.
* `jaxgru.layers`: `gru_stack` runs any depth, both directions, dropout and residual connections;
  `gru_stack_cell` is one step of it, for streams.
* `jaxgru.models` and `jaxgru.losses`: heads for every step or the last one (`sequence_outputs`,
  `final_outputs`), token models with `generate`, and the losses that go with them.
* `jaxgru.diagnostics`: `gradient_flow`, its `gradient_paths` and `credit_reach`, `gate_statistics`,
  `example_gradient_norms`. `jaxgru.jacobians`: dh_t/dh_{t-1} in closed form, and what products of
  it do over time. `jaxgru.influence`: `rtrl`, the gradient computed forward in time.
* `jaxgru.interop`, `jaxgru.interop_jax` and `jaxgru.onnx_weights`: `from_torch`, `to_torch` and
  their like for Keras, haste, Flax, Equinox, Haiku and ONNX. `jaxgru.onnx_files`: `read_onnx`.
  `jaxgru.onnx_models`: `write_onnx`. `jaxgru.weight_files`: `save_weights`, `load_weights` and
  `read_safetensors`, with spec, sizes and sha256.
* `jaxgru.training`: `make_train_step`, one update of any loss with optax. `jaxgru.fitting`: `fit`,
  the loop around it, which goes on from where it was stopped. `jaxgru.checkpoints`:
  `save_checkpoint`, `find_checkpoint`, `load_checkpoint`. `jaxgru.logs`: `JsonLines`,
  `TensorBoard`. `jaxgru.array_files`: `save_arrays`, `load_arrays`, files that run no code.
* `jaxgru.layout`: a `Layout` trains on a mesh of devices, in one process or several.

>>> import jax, jax.numpy as jnp, jaxgru
>>> params = jaxgru.init_gru(jax.random.key(0), 2, 3)
>>> h_last, hs = jax.jit(jaxgru.gru)(params, jnp.ones((5, 4, 2)))
>>> hs.shape
(5, 4, 3)
"""

from jaxgru.array_files import load_arrays, read_metadata, save_arrays
from jaxgru.cell import gru_cell
from jaxgru.check import check_gradients, check_gru
from jaxgru.checkpoints import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from jaxgru.comparison import GradientReport, GradientRow
from jaxgru.conversion import Exported, Imported
from jaxgru.diagnostics import (
    GateStatistics,
    GateValues,
    GradientFlow,
    Paths,
    credit_reach,
    example_gradient_norms,
    gate_statistics,
    gate_values,
    gradient_flow,
    gradient_paths,
)
from jaxgru.fitting import Checkpoints, Fit, Interrupted, Monitor, NonFiniteError, fit
from jaxgru.influence import rtrl
from jaxgru.interop import from_haste, from_keras, from_torch, to_haste, to_keras, to_torch
from jaxgru.interop_jax import (
    from_equinox,
    from_haiku,
    from_linen,
    from_nnx,
    to_equinox,
    to_haiku,
    to_linen,
    to_nnx,
)
from jaxgru.jacobians import (
    jacobian_products,
    lyapunov_exponents,
    sequence_jacobians,
    singular_values,
    step_jacobian,
    step_jacobian_bound,
    step_jacobian_diagonal,
)
from jaxgru.layers import (
    Bidirectional,
    gru_bidirectional,
    gru_stack,
    gru_stack_cell,
    init_stack,
    init_state,
    init_taps,
)
from jaxgru.layout import Layout
from jaxgru.logs import Callback, JsonLines, TensorBoard, json_values, read_json_lines
from jaxgru.losses import bernoulli_loss, categorical_loss, squared_loss
from jaxgru.masks import length_mask, resets_from_dones
from jaxgru.models import (
    SequenceParams,
    TokenParams,
    final_outputs,
    generate,
    init_sequence_model,
    init_token_model,
    sequence_outputs,
    token_logits,
    token_loss,
)
from jaxgru.onnx_files import OnnxGRU, read_onnx, run_onnx_gru
from jaxgru.onnx_models import write_onnx
from jaxgru.onnx_weights import from_onnx, to_onnx
from jaxgru.parameters import CHO_2014, CHUNG_2014, PYTORCH, GRUParams, GRUSpec, init_gru
from jaxgru.recurrence import Tap, gru
from jaxgru.training import TrainState, init_train_state, make_train_step
from jaxgru.weight_files import LoadedWeights, load_weights, read_safetensors, save_weights

__all__ = [
    "CHO_2014",
    "CHUNG_2014",
    "PYTORCH",
    "Bidirectional",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "Exported",
    "Fit",
    "GRUParams",
    "GRUSpec",
    "GateStatistics",
    "GateValues",
    "GradientFlow",
    "GradientReport",
    "GradientRow",
    "Imported",
    "Interrupted",
    "JsonLines",
    "Layout",
    "LoadedWeights",
    "Monitor",
    "NonFiniteError",
    "OnnxGRU",
    "Paths",
    "SequenceParams",
    "Tap",
    "TensorBoard",
    "TokenParams",
    "TrainState",
    "bernoulli_loss",
    "categorical_loss",
    "check_gradients",
    "check_gru",
    "credit_reach",
    "example_gradient_norms",
    "final_outputs",
    "find_checkpoint",
    "fit",
    "from_equinox",
    "from_haiku",
    "from_haste",
    "from_keras",
    "from_linen",
    "from_nnx",
    "from_onnx",
    "from_torch",
    "gate_statistics",
    "gate_values",
    "generate",
    "gradient_flow",
    "gradient_paths",
    "gru",
    "gru_bidirectional",
    "gru_cell",
    "gru_stack",
    "gru_stack_cell",
    "init_gru",
    "init_sequence_model",
    "init_stack",
    "init_state",
    "init_taps",
    "init_token_model",
    "init_train_state",
    "jacobian_products",
    "json_values",
    "length_mask",
    "load_arrays",
    "load_checkpoint",
    "load_weights",
    "lyapunov_exponents",
    "make_train_step",
    "read_json_lines",
    "read_metadata",
    "read_onnx",
    "read_safetensors",
    "resets_from_dones",
    "rtrl",
    "run_onnx_gru",
    "save_arrays",
    "save_checkpoint",
    "save_weights",
    "sequence_jacobians",
    "sequence_outputs",
    "singular_values",
    "squared_loss",
    "step_jacobian",
    "step_jacobian_bound",
    "step_jacobian_diagonal",
    "to_equinox",
    "to_haiku",
    "to_haste",
    "to_keras",
    "to_linen",
    "to_nnx",
    "to_onnx",
    "to_torch",
    "token_logits",
    "token_loss",
    "write_onnx",
]
