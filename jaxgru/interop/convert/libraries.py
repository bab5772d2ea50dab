"""Runs files of weights in the libraries that wrote them, with the arrays as the files hold them.

The results are compared with those of this package, and nothing here uses its reading of an array.
Everything is float64, but for onnxruntime, whose GRU is float32.
"""

import os
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru.stacks.forms import Bidirectional

NAMES = {
    "torch": "torch.nn.GRU", "keras": "keras.layers.GRU", "linen": "flax.linen.GRUCell",
    "nnx": "flax.nnx.GRUCell", "equinox": "equinox.nn.GRUCell", "haiku": "haiku.GRU",
    "onnx": "onnxruntime",
}  # fmt: skip


class NotRunError(Exception):
    """The reason for which a library was not run."""


def run_layers(kind, layers, xs, merge, activation, reset_after):
    """The outputs [T, B, K] of a stack in a library of cells, for xs [T, B, I].

    A layer is {name: array}, or a Bidirectional of two.
    """
    run = {"keras": _keras, "linen": _linen, "nnx": _nnx, "equinox": _equinox, "haiku": _haiku}
    function = getattr(jax.nn, activation)
    options = {"activation": function, "after": reset_after}
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        ys: Any = jnp.asarray(xs)
        for layer in layers:
            layer = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), layer)
            if isinstance(layer, Bidirectional):
                forward = run[kind](layer.forward, ys, **options)
                backward = run[kind](layer.backward, ys[::-1], **options)[::-1]
                both = [forward, backward]
                ys = sum(both) if merge == "sum" else jnp.concatenate(both, axis=-1)
            else:
                ys = run[kind](layer, ys, **options)
        return np.asarray(ys)


def _keras(arrays, xs, activation, after):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = import_module("keras")
    if keras.backend.backend() != "jax":
        raise NotRunError(f"Keras has the backend {keras.backend.backend()}, not jax")
    kernel, recurrent, bias = (arrays.get(k) for k in ("kernel", "recurrent_kernel", "bias"))
    options: Any = {"use_bias": bias is not None, "activation": activation, "dtype": "float64"}
    options["reset_after"] = after if bias is None else bias.ndim == 2
    layer = keras.layers.GRU(recurrent.shape[0], return_sequences=True, **options)
    batch_first = jnp.swapaxes(xs, 0, 1)
    layer.build(batch_first.shape)
    layer.set_weights([kernel, recurrent] if bias is None else [kernel, recurrent, bias])
    return jnp.swapaxes(jnp.asarray(layer(batch_first)), 0, 1)


def _linen(arrays, xs, activation, after):
    linen = import_module("flax.linen")
    size, nested = arrays["hn/bias"].size, _unflatten(arrays)
    cell = linen.GRUCell(size, activation_fn=activation, param_dtype=xs.dtype)
    return linen.RNN(cell, time_major=True).apply({"params": {"cell": nested}}, xs)


def _nnx(arrays, xs, activation, after):
    nnx = import_module("flax.nnx")
    sizes, options = (xs.shape[-1], len(arrays["dense_h/kernel"])), {"param_dtype": xs.dtype}
    cell: Any = nnx.GRUCell(*sizes, activation_fn=activation, rngs=nnx.Rngs(0), **options)
    nnx.update(cell, _unflatten(arrays))
    return _steps(lambda h, x: cell(h, x)[0], xs, sizes[1])


def _equinox(arrays, xs, activation, after):
    equinox = import_module("equinox")
    sizes, bias = (xs.shape[-1], arrays["weight_hh"].shape[1]), "bias" in arrays
    cell = equinox.nn.GRUCell(*sizes, use_bias=bias, key=jax.random.key(0))
    cell = equinox.tree_at(lambda c: [getattr(c, k) for k in arrays], cell, [*arrays.values()])
    return _steps(lambda h, x: jax.vmap(cell)(x, h), xs, sizes[1])


def _haiku(arrays, xs, activation, after):
    haiku = import_module("haiku")

    def unroll(xs):
        core = haiku.GRU(arrays["w_h"].shape[0])
        return haiku.static_unroll(core, xs, core.initial_state(xs.shape[1]))[0]

    return haiku.without_apply_rng(haiku.transform(unroll)).apply({"gru": arrays}, xs)


def _unflatten(arrays):
    return import_module("flax.traverse_util").unflatten_dict(arrays, sep="/")


def _steps(cell, xs, hidden_size):
    """The states of every step of a cell."""
    h, hs = jnp.zeros((xs.shape[1], hidden_size), xs.dtype), []
    for x in xs:
        hs.append(h := cell(h, x))
    return jnp.stack(hs)


def run_torch(arrays, xs, merge):
    """The outputs of a torch.nn.GRU with a state dict of arrays; a GRUCell is its only layer."""
    torch = import_module("torch")
    end = "_l0" if "weight_hh" in arrays else ""
    weights = {k + end: torch.from_numpy(np.asarray(v, np.float64)) for k, v in arrays.items()}
    hidden_size, both = weights["weight_hh_l0"].shape[1], "weight_hh_l0_reverse" in weights
    count = sum(k.startswith("weight_hh") for k in weights) // (1 + both)
    options: Any = {"bias": any("bias" in k for k in weights), "dtype": torch.float64}
    module = torch.nn.GRU(xs.shape[-1], hidden_size, count, bidirectional=both, **options)
    module.load_state_dict(weights)
    with torch.no_grad():
        ys = module(torch.from_numpy(xs))[0].numpy()
    if both and merge == "sum":
        if count > 1:
            raise NotRunError("its layers read two directions side by side, not their sum")
        return ys[..., :hidden_size] + ys[..., hidden_size:]
    return ys


def run_onnx(file, names, xs, merge):
    """The outputs of the last of these GRU nodes of a file, for xs as the input of the first.

    All nodes in between run as the file has them, with initial states of zero where those are
    inputs of the graph.
    """
    onnx = import_module("onnx")
    onnxruntime = import_module("onnxruntime")
    model, helper, kinds = onnx.load(file), onnx.helper, onnx.TensorProto
    graph, (steps, batch, _) = model.graph, xs.shape
    grus = {v.name or next(filter(None, v.output)): v for v in graph.node if v.op_type == "GRU"}
    if not {*names} <= {*grus}:
        raise NotRunError("a GRU is in a subgraph")
    first, last = grus[names[0]], grus[names[-1]]
    last.output[0] = last.output[0] or "every_output"
    nodes, needed = [], {last.output[0]}
    for node in reversed(graph.node):  # ONNX orders nodes after those that they read
        if needed.intersection(node.output) - {first.input[0]}:
            nodes.insert(0, node)
            needed.update(filter(None, node.input))
    held = [tensor for tensor in graph.initializer if tensor.name in needed]
    free = needed.difference(*(node.output for node in nodes), [v.name for v in held])

    def attribute(node, name):
        return {v.name: helper.get_attribute_value(v) for v in node.attribute}.get(name)

    xs = xs.swapaxes(0, 1) if attribute(first, "layout") else xs
    feeds: dict[str, Any] = {first.input[0]: xs.astype(np.float32)}
    for node in (v for v in nodes if v.op_type == "GRU"):
        shape = (1 + (attribute(node, "direction") == b"bidirectional"), batch)
        shape = (*(shape[::-1] if attribute(node, "layout") else shape),)
        _, _, _, _, lengths, h0 = [*node.input, "", "", ""][:6]
        given: dict[str, Any] = {lengths: np.full(batch, steps, np.int32)}
        given[h0] = np.zeros((*shape, attribute(node, "hidden_size") or 0), np.float32)
        feeds |= {name: value for name, value in given.items() if name in free}
    if missing := free - {*feeds}:
        raise NotRunError(f"its GRUs also depend on {', '.join(sorted(missing))}")
    types = {name: helper.np_dtype_to_tensor_dtype(v.dtype) for name, v in feeds.items()}
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]
    outputs = [helper.make_tensor_value_info(last.output[0], kinds.FLOAT, None)]
    graph = helper.make_graph(nodes, "part", inputs, outputs, held)
    versions = {"opset_imports": model.opset_import, "ir_version": model.ir_version}
    part = helper.make_model(graph, **versions).SerializeToString()
    try:
        ys: Any = onnxruntime.InferenceSession(part).run(None, feeds)[0]
    except Exception as error:  # onnxruntime has a class for each kind of failure
        raise NotRunError(str(error).splitlines()[0]) from error
    ys = ys.transpose(1, 2, 0, 3) if attribute(last, "layout") else ys
    if merge == "sum":
        return ys.sum(axis=1)
    return ys.transpose(0, 2, 1, 3).reshape(steps, batch, -1)
