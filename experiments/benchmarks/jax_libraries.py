"""A `Layer` for each of the other JAX libraries, with jaxgru's weights converted exactly.

* Flax linen has a kernel for each gate, of input and state; biases of the input, and b_hn.
* Flax nnx has blocks r | z | n and no bias of the state, so the candidate block of b_h must be 0.
* Equinox has transposed blocks r | z | n, one bias, and b_hn.
* Haiku has blocks z | r | n, one bias, and reset before. Its z weighs the candidate, so the block
  of z is negated.
* Keras has blocks z | r | n; biases of input and state with reset after, else one bias.

Each library is imported by `importlib` when its layer is made, as it may not be installed.
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
    """b_x + b_h [3H] as far as the equation allows, and the remaining b_hn [H]."""
    assert params.b_x is not None and params.b_h is not None
    b_hr, b_hz, b_hn = jnp.split(params.b_h, 3)
    if reset == "before":
        return params.b_x + params.b_h, jnp.zeros_like(b_hn)
    return params.b_x + jnp.concatenate([b_hr, b_hz, jnp.zeros_like(b_hn)]), b_hn


def flax_linen(reset: Reset, size: Size, dtype: Any) -> Layer:
    """nn.RNN with nn.GRUCell, time-major."""
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

    def run(weights, xs, h0, lengths=None):
        return rnn.apply({"params": weights}, xs, initial_carry=h0, seq_lengths=lengths)

    def step(weights, x, h):
        return cell.apply({"params": weights["cell"]}, h, x)[0]

    return Layer(pack, unpack, run, step, padded=run)


def flax_nnx(reset: Reset, size: Size, dtype: Any) -> Layer:
    """nnx.RNN with nnx.GRUCell, time-major; nnx.merge is called inside the jitted function."""
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
            raise ValueError("flax_nnx: b_h must be 0 for the candidate, as nnx has no such bias.")
        return dict(zip(NNX_KEYS, (params.w_x, params.w_h, bias)))

    def unpack(weights):
        return {ours: weights[key] for ours, key in zip(OUR_KEYS, NNX_KEYS)}

    def run(weights, xs, h0, lengths=None):
        return merge(rnn_parts, weights)(xs, initial_carry=h0, seq_lengths=lengths)

    def step(weights, x, h):
        return merge(cell_parts, weights)(h, x)[0]

    return Layer(pack, unpack, run, step, padded=run)


def equinox(reset: Reset, size: Size, dtype: Any) -> Layer:
    """lax.scan over eqx.nn.GRUCell, which takes vectors; it is vmapped unless the batch is 1."""
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

    sequence = hk.without_apply_rng(hk.transform(unroll))
    step = hk.without_apply_rng(hk.transform(lambda x, h: hk.GRU(size.hidden_size)(x, h)[1]))

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

    return Layer(pack, unpack, sequence.apply, step.apply)


def keras_gru(reset: Reset, size: Size, dtype: Any) -> Layer:
    """keras.layers.GRU and its cell on the JAX backend, called by stateless_call, batch-major."""
    keras = importlib.import_module("keras")
    options = {
        "reset_after": reset == "after",
        "dtype": jnp.dtype(dtype).name,
        "recurrent_initializer": "zeros",  # the default one does not support bfloat16
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

    def run(weights, xs, h0, lengths=None):
        mask = None if lengths is None else jnp.arange(xs.shape[1])[None] < lengths[:, None]
        (hs, h_last), _ = layer.stateless_call(weights, fixed, xs, initial_state=[h0], mask=mask)
        return h_last, hs

    def step(weights, x, h):
        (h, _), _ = cell.stateless_call(weights, cell_fixed, x, [h])
        return h

    return Layer(pack, unpack, run, step, batch_major=True, padded=run)
