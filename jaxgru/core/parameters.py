"""The arrays of one GRU layer, and `GRUSpec`, the choice of its equation."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.export

from jaxgru.core import checks

Activation = Literal["tanh", "relu", "sigmoid", "softplus", "identity"]


@dataclasses.dataclass(frozen=True)
class GRUSpec:
    """The choice of GRU equation; hashable, so it may be a static argument of `jax.jit`.

    Attributes:
      reset: with "before", the reset gate multiplies the state before the candidate's product with
        w_hn (Cho et al. 2014, eq. 8); with "after", it multiplies the product (PyTorch, cuDNN,
        Keras's default).
      update: the update gate z multiplies the old state ("keep", Cho et al. 2014, eq. 7) or the
        candidate ("write", Chung et al. 2014, section 3.2).
      activation: the candidate's f.

    Raises:
      ValueError: a field has an unknown value.

    >>> GRUSpec(reset="after")
    GRUSpec(reset='after', update='keep', activation='tanh')
    """

    reset: Literal["before", "after"] = "before"
    update: Literal["keep", "write"] = "keep"
    activation: Activation = "tanh"

    def __post_init__(self):
        checks.require_choice("GRUSpec", "reset", self.reset, ("before", "after"))
        checks.require_choice("GRUSpec", "update", self.update, ("keep", "write"))
        checks.require_choice("GRUSpec", "activation", self.activation, get_args(Activation))


CHO_2014 = GRUSpec(reset="before", update="keep")
CHUNG_2014 = GRUSpec(reset="before", update="write")
PYTORCH = GRUSpec(reset="after", update="keep")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GRUParams:
    """The arrays of one GRU layer, and the equation they belong to.

    A pytree: its leaves are the arrays, blocks r | z | n (reset, update, candidate) on the last
    axis. A field that is None has no leaf. `spec` is static: `jax.jit` compiles once for each, and
    `jax.tree.map` over two GRUParams raises a ValueError unless their specs are equal. To change a
    field, use `dataclasses.replace(params, spec=PYTORCH)`.

    Attributes:
      w_x: [I, 3H], the weights of the input.
      w_h: [H, 3H], the weights of the state.
      b_x: [3H] or None, the bias added to x w_x.
      b_h: [3H] or None, the bias added to h w_h.
      g_x: [3H] or None, the layer-norm scale of x w_x; None for no normalization.
      g_h: [3H] or None, the layer-norm scale of h w_h; likewise.
      spec: a `GRUSpec`. It has no default: weights of another library need that library's equation.

    >>> from jaxgru import init_gru
    >>> params = init_gru(jax.random.key(0), 2, 3, spec=PYTORCH)
    >>> params.spec.reset, len(jax.tree.leaves(params))
    ('after', 4)
    """

    w_x: jax.Array
    w_h: jax.Array
    b_x: jax.Array | None = None
    b_h: jax.Array | None = None
    g_x: jax.Array | None = None
    g_h: jax.Array | None = None
    spec: GRUSpec = dataclasses.field(kw_only=True, metadata={"static": True})

    __hash__ = None  # type: ignore  # arrays have no hash, so params cannot be a static argument

    def arrays(self) -> dict[str, jax.Array | None]:
        """The arrays by name; None where absent."""
        return {name: value for name, value in vars(self).items() if name != "spec"}


# `jax.export` writes functions of parameters to files; this tells it how to write their static
# fields, which are a tuple: (spec,).
jax.export.register_pytree_node_serialization(
    GRUParams,
    serialized_name="jaxgru.GRUParams",
    serialize_auxdata=lambda specs: json.dumps([dataclasses.asdict(s) for s in specs]).encode(),
    deserialize_auxdata=lambda data: tuple(GRUSpec(**fields) for fields in json.loads(data)),
)


def require_spec(function: str, spec: Any, argument: str = "spec") -> None:
    """TypeError unless spec is a GRUSpec."""
    if not isinstance(spec, GRUSpec):
        raise TypeError(
            f"{function}: {argument} must be a GRUSpec, such as jaxgru.PYTORCH, got {spec!r}."
        )


def torch_cure(params: Any) -> str:
    """What to do with a module of torch or its state_dict; "" for anything else."""
    is_state_dict = isinstance(params, Mapping) and any("weight_ih" in str(n) for n in params)
    if is_state_dict or hasattr(params, "state_dict"):
        return "; jaxgru.interop.from_torch converts the state_dict of a module"
    return ""


def _cure(function, params, argument):
    """The advice on a dict of a layer's arrays, torch's weights, or a tree of GRUParams; or ""."""
    if isinstance(params, Mapping) and {"w_x", "w_h"} <= set(params):
        return f"; GRUParams(**{argument}, spec=...) holds these arrays"
    if cure := torch_cure(params):
        return cure
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, GRUParams))
    if not any(isinstance(leaf, GRUParams) for leaf in leaves):
        return ""
    if hasattr(params, "forward"):  # a Bidirectional
        return "; pass one direction, or run both by gru_bidirectional"
    stack = "gru_stack_cell" if function == "gru_cell" else "gru_stack"
    return f"; pass one layer, such as {argument}[0], or run a stack by {stack}"


def require_params(function: str, params: Any, argument: str = "params") -> tuple[int, int]:
    """Returns (I, H), or raises a TypeError or ValueError that names the malformed array."""
    if not isinstance(params, GRUParams):
        found = checks.found_kind(params, _cure(function, params, argument))
        raise TypeError(f"{function}: {argument} must be a GRUParams, got {found}.")
    require_spec(function, params.spec, f"{argument}.spec")
    for name in ("w_x", "w_h"):
        value = getattr(params, name)
        checks.require_float(function, f"{argument}.{name}", value)
        if value.ndim != 2:
            raise ValueError(
                f"{function}: {argument}.{name} must have two axes, got shape {value.shape}."
            )
    hidden_size = params.w_h.shape[0]
    meaning = f"H={hidden_size}, the rows of {argument}.w_h"
    for name, value in params.arrays().items():
        if value is not None:
            checks.require_float(function, f"{argument}.{name}", value, params.w_x.dtype)
            rows = value.shape[:1] if name in ("w_x", "w_h") else ()
            shape = (*rows, 3 * hidden_size)
            checks.require_shape(function, f"{argument}.{name}", value, shape, meaning)
    return params.w_x.shape[0], hidden_size
