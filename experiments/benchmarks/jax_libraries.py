"""One `Layer` for each other JAX library, with weights that are ours, converted exactly.

* Flax linen: a kernel for each gate and side; biases of the input, and one for n of the state.
* Flax nnx: blocks r | z | n; no bias of the state, so b_h's candidate block must be zero.
* Equinox: transposed, blocks r | z | n; one bias, and one for n of the state.
* Haiku: blocks z | r | n, one bias, reset before; z writes where ours keeps: its block is negated.
* Keras: blocks z | r | n; biases of input and state where reset is after, else one.

They are imported when a layer is made, by `importlib`, since not everybody has them.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.layers import Layer
from experiments.benchmarks.problems import Reset, Size
from jaxgru import GRUParams

Array = jax.Array
GATES = ("r", "z", "n")
NNX_KEYS = ("dense_i.kernel", "dense_h.kernel", "dense_i.bias")
HAIKU_KEYS = ("w_i", "w_h", "b")
OUR_KEYS = ("w_x", "w_h", "b_x")


def _merged_bias(params: GRUParams, reset: Reset) -> tuple[Array, Array]:
    """The biases added up as far as the equation allows: [3H], and what is left of n's, [H]."""
    assert params.b_x is not None and params.b_h is not None
    b_hr, b_hz, b_hn = jnp.split(params.b_h, 3)
    if reset == "before":
        return params.b_x + params.b_h, jnp.zeros_like(b_hn)
    return params.b_x + jnp.concatenate([b_hr, b_hz, jnp.zeros_like(b_hn)]), b_hn


def flax_linen(reset: Reset, size: Size, dtype: Any) -> Layer:
    """nn.RNN over nn.GRUCell, time-major."""
    nn = importlib.import_module("flax.linen")
    cell = nn.GRUCell(size.hidden_size)
    rnn = nn.RNN(cell, time_major=True, return_carry=True)

    def pack(params):
        bias, b_hn = _merged_bias(params, reset)
        arrays: dict[str, Any] = {}
        blocks = (jnp.split(v, 3, axis=-1) for v in (params.w_x, params.w_h, bias))
        for gate, w_x, w_h, b in zip(GATES, *blocks):
            arrays |= {f"i{gate}": {"kernel": w_x, "bias": b}, f"h{gate}": {"kernel": w_h}}
        arrays["hn"]["bias"] = b_hn
        return {"cell": arrays}

    def unpack(weights):
        arrays = weights["cell"]

        def join(side, leaf):
            return jnp.concatenate([arrays[side + gate][leaf] for gate in GATES], axis=-1)

        parts = (join("i", "kernel"), join("h", "kernel"), join("i", "bias"))
        return {**dict(zip(OUR_KEYS, parts)), "b_hn": arrays["hn"]["bias"]}

    def run(weights, xs, h0):
        return rnn.apply({"params": weights}, xs, initial_carry=h0)

    def step(weights, x, h):
        return cell.apply({"params": weights["cell"]}, h, x)[0]

    return Layer(pack, unpack, run, step)


def flax_nnx(reset: Reset, size: Size, dtype: Any) -> Layer:
    """nnx.RNN over nnx.GRUCell, time-major, merged from its parts inside the jitted function."""
    nnx = importlib.import_module("flax.nnx")
    cell = nnx.GRUCell(size.input_size, size.hidden_size, rngs=nnx.Rngs(0))
    rnn = nnx.RNN(cell, time_major=True, return_carry=True)
    cell_parts, rnn_parts = (nnx.split(module, nnx.Param, ...) for module in (cell, rnn))

    def merge(parts, weights):
        graph, params, rest = parts
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        names = [".".join(str(getattr(key, "key", key)) for key in path) for path, _ in paths]
        leaves = [next(v for key, v in weights.items() if key in name) for name in names]
        return nnx.merge(graph, treedef.unflatten(leaves), rest)

    def pack(params):
        bias, b_hn = _merged_bias(params, reset)
        if np.any(np.asarray(b_hn)):
            raise ValueError("Flax nnx holds no candidate bias of the state: b_h's must be zero.")
        return dict(zip(NNX_KEYS, (params.w_x, params.w_h, bias)))

    def unpack(weights):
        return {ours: weights[key] for ours, key in zip(OUR_KEYS, NNX_KEYS)}

    def run(weights, xs, h0):
        return merge(rnn_parts, weights)(xs, initial_carry=h0)

    def step(weights, x, h):
        return merge(cell_parts, weights)(h, x)[0]

    return Layer(pack, unpack, run, step)


def equinox(reset: Reset, size: Size, dtype: Any) -> Layer:
    """lax.scan over eqx.nn.GRUCell, which takes vectors: vmapped, but for a batch of one."""
    eqx = importlib.import_module("equinox")
    template = eqx.nn.GRUCell(size.input_size, size.hidden_size, key=jax.random.key(0))

    def leaves_of(cell):
        return cell.weight_ih, cell.weight_hh, cell.bias, cell.bias_n

    def pack(params):
        return (params.w_x.T, params.w_h.T, *_merged_bias(params, reset))

    def unpack(weights):
        w_x, w_h, b_x, b_hn = weights
        return {"w_x": w_x.T, "w_h": w_h.T, "b_x": b_x, "b_hn": b_hn}

    def step(weights, x, h):
        cell = eqx.tree_at(leaves_of, template, weights)
        return cell(x[0], h[0])[None] if h.shape[0] == 1 else jax.vmap(cell)(x, h)

    def run(weights, xs, h0):
        def body(h, x):
            h = step(weights, x, h)
            return h, h

        return jax.lax.scan(body, h0, xs)

    return Layer(pack, unpack, run, step)


def haiku(reset: Reset, size: Size, dtype: Any) -> Layer:
    """hk.dynamic_unroll of hk.GRU."""
    hk = importlib.import_module("haiku")

    def unroll(xs, h0):
        hs, h_last = hk.dynamic_unroll(hk.GRU(size.hidden_size), xs, h0)
        return h_last, hs

    whole = hk.without_apply_rng(hk.transform(unroll))
    one = hk.without_apply_rng(hk.transform(lambda x, h: hk.GRU(size.hidden_size)(x, h)[1]))

    def to_theirs(v):
        r, z, n = jnp.split(v, 3, axis=-1)
        return jnp.concatenate([-z, r, n], axis=-1)

    def to_ours(v):
        z, r, n = jnp.split(v, 3, axis=-1)
        return jnp.concatenate([r, -z, n], axis=-1)

    def pack(params):
        arrays = (params.w_x, params.w_h, _merged_bias(params, reset)[0])
        return {"gru": {key: to_theirs(v) for key, v in zip(HAIKU_KEYS, arrays)}}

    def unpack(weights):
        return {ours: to_ours(weights["gru"][key]) for ours, key in zip(OUR_KEYS, HAIKU_KEYS)}

    return Layer(pack, unpack, whole.apply, one.apply)


def keras_gru(reset: Reset, size: Size, dtype: Any) -> Layer:
    """keras.layers.GRU and its cell by stateless_call, batch-major, on the JAX backend."""
    keras = importlib.import_module("keras")
    options = {
        "reset_after": reset == "after",
        "dtype": jnp.dtype(dtype).name,
        "recurrent_initializer": "zeros",  # its own knows no bfloat16, and ours come instead
    }
    layer = keras.layers.GRU(size.hidden_size, return_sequences=True, return_state=True, **options)
    layer.build((size.batch_size, size.num_steps, size.input_size))
    cell = keras.layers.GRUCell(size.hidden_size, **options)
    cell.build((size.batch_size, size.input_size))
    fixed, cell_fixed = ([v.value for v in it.non_trainable_variables] for it in (layer, cell))

    def swap(v):  # its own inverse
        r, z, n = jnp.split(v, 3, axis=-1)
        return jnp.concatenate([z, r, n], axis=-1)

    def pack(params):
        rows = jnp.stack([swap(params.b_x), swap(params.b_h)])
        bias = rows if reset == "after" else rows.sum(0)
        return [swap(params.w_x), swap(params.w_h), bias]

    def unpack(weights):
        w_x, w_h, bias = (swap(v) for v in weights)
        if reset == "before":
            return {"w_x": w_x, "w_h": w_h, "b_x": bias}
        return {"w_x": w_x, "w_h": w_h, "b_x": bias[0], "b_hn": bias[1, 2 * size.hidden_size :]}

    def run(weights, xs, h0):
        (hs, h_last), _ = layer.stateless_call(weights, fixed, xs, initial_state=[h0])
        return h_last, hs

    def step(weights, x, h):
        (h, _), _ = cell.stateless_call(weights, cell_fixed, x, [h])
        return h

    return Layer(pack, unpack, run, step, batch_major=True)
