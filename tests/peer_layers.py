"""GRUs of the installed peers, each run in float64 on arrays under the peer's own names.

Every peer draws random weights in its own layout, and runs them: outputs of every step, and the
gradients of sum(outputs * cotangents) by the peer's own autodiff. `golden/write.py` keeps
that in files, `interop/test_interop_live.py` compares fresh cases.
"""

import contextlib
import os
import warnings
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru import interop

os.environ.setdefault("KERAS_BACKEND", "jax")


class Case(NamedTuple):
    """What a peer made of its weights."""

    weights: dict  # in the peer's layout
    xs: np.ndarray  # [T, B, I]
    cotangents: np.ndarray  # like hs
    hs: np.ndarray  # [T, B, H], [T, B, 2H] for two directions
    grads: dict  # like weights
    dxs: np.ndarray


@contextlib.contextmanager
def as_peers_like_it():
    """float64, and none of the strictness and warnings that this package's own tests ask for."""
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def draw_like(rng, shapes):
    """Random arrays of the shapes."""
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def exact_tanh(x):
    """tanh in the dtype of x."""
    return jnp.tanh(x)


class Torch:
    """torch.nn.GRU and GRUCell."""

    variants: ClassVar[dict[str, Any]] = {
        "one_layer": {},
        "no_bias": {"bias": False},
        "deep_both_ways": {"num_layers": 2, "bidirectional": True},
        "cell": None,
    }
    read = staticmethod(lambda weights, variant: interop.from_torch(weights))

    def shapes(self, variant, inputs, hidden):
        module = self._module(variant, inputs, hidden)
        return {name: tuple(v.shape) for name, v in module.state_dict().items()}

    def run(self, variant, weights, xs, cotangents):
        import torch

        module = self._module(variant, xs.shape[-1], _hidden(weights, "weight_hh", 1))
        module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in weights.items()})
        inputs = torch.from_numpy(xs).requires_grad_()
        if variant == "cell":
            h, hs = None, []
            for x in inputs:
                h = module(x, h)
                hs.append(h)
            hs = torch.stack(hs)
        else:
            hs = module(inputs)[0]
        (hs * torch.from_numpy(cotangents)).sum().backward()
        grads = {name: v.grad.numpy() for name, v in module.named_parameters()}
        return hs.detach().numpy(), grads, inputs.grad.numpy()

    def _module(self, variant, inputs, hidden):
        import torch

        options = self.variants[variant]
        if options is None:
            return torch.nn.GRUCell(inputs, hidden, dtype=torch.float64)
        return torch.nn.GRU(inputs, hidden, dtype=torch.float64, **options)


class ByJax:
    """A peer on JAX: `apply(variant, weights, xs)` gives hs, and jax.grad the gradients."""

    def run(self, variant, weights, xs, cotangents):
        with as_peers_like_it(), jax.disable_jit():

            def loss(weights, xs):
                hs = self.apply(variant, weights, xs)
                return jnp.sum(hs * cotangents), hs

            weights = {k: jnp.asarray(v) for k, v in weights.items()}
            grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
            (grads, dxs), hs = grad(weights, jnp.asarray(xs))
        return np.asarray(hs), {k: np.asarray(v) for k, v in grads.items()}, np.asarray(dxs)


class Keras(ByJax):
    """keras.layers.GRU, in Bidirectional and in stacks, on Keras's JAX backend."""

    variants: ClassVar[dict[str, Any]] = {
        "after": {},
        "before": {"reset_after": False},
        "no_bias": {"use_bias": False},
        "relu": {"activation": "relu"},
        "both_ways": {},
        "two_layers": {},
    }

    def read(self, weights, variant):
        arrays = list(weights.values())
        if variant == "two_layers":
            arrays = [arrays[:3], arrays[3:]]
        after = True if variant == "no_bias" else None
        activation = self.variants[variant].get("activation", "tanh")
        return interop.from_keras(arrays, reset_after=after, activation=activation)

    def shapes(self, variant, inputs, hidden):
        after = variant != "before"
        bias = [] if variant == "no_bias" else [(2, 3 * hidden) if after else (3 * hidden,)]

        def cell(prefix, inputs):
            shapes = [(inputs, 3 * hidden), (hidden, 3 * hidden), *bias]
            return {f"{prefix}/{i}": shape for i, shape in enumerate(shapes)}

        if variant == "both_ways":
            return cell("0", inputs) | cell("1", inputs)
        if variant == "two_layers":
            return cell("0", inputs) | cell("1", hidden)
        return cell("0", inputs)

    def apply(self, variant, weights, xs):
        import keras

        arrays = list(weights.values())
        # Keras's own tanh computes in float32 whatever the layer's dtype: JAX's stands in for it.
        keras.saving.register_keras_serializable()(exact_tanh)
        options = {"activation": exact_tanh, "return_sequences": True, "dtype": "float64"}
        options |= self.variants[variant]
        hidden = arrays[1].shape[0]
        layer = keras.layers.GRU(hidden, **options)
        if variant == "both_ways":
            layer = keras.layers.Bidirectional(layer, dtype="float64")
        layers = [layer, keras.layers.GRU(hidden, **options)][: 1 + (variant == "two_layers")]
        ys, each = jnp.swapaxes(xs, 0, 1), len(arrays) // len(layers)
        for number, layer in enumerate(layers):
            layer.build(ys.shape)
            own = arrays[number * each : (number + 1) * each]
            ys, _ = layer.stateless_call(own, [v.value for v in layer.non_trainable_variables], ys)
        return jnp.swapaxes(ys, 0, 1)


class Linen(ByJax):
    """flax.linen.GRUCell in an nn.RNN."""

    variants: ClassVar[dict[str, Any]] = {"tanh": {}, "relu": {"activation_fn": jax.nn.relu}}
    read = staticmethod(lambda weights, variant: interop.from_linen(weights, activation=variant))

    def shapes(self, variant, inputs, hidden):
        shapes = {f"i{gate}/kernel": (inputs, hidden) for gate in "rzn"}
        shapes |= {f"h{gate}/kernel": (hidden, hidden) for gate in "rzn"}
        return shapes | {f"{name}/bias": (hidden,) for name in ("ir", "iz", "in", "hn")}

    def apply(self, variant, weights, xs):
        import flax.linen as nn

        cell = nn.GRUCell(weights["hn/bias"].size, **self.variants[variant])
        nested = {}
        for name, value in weights.items():
            module, array = name.split("/")
            nested.setdefault(module, {})[array] = value
        return nn.RNN(cell, time_major=True).apply({"params": {"cell": nested}}, xs)


class Nnx(ByJax):
    """flax.nnx.GRUCell in an nnx.RNN."""

    variants: ClassVar[dict[str, Any]] = {"tanh": {}}
    read = staticmethod(lambda weights, variant: interop.from_nnx(weights))

    def shapes(self, variant, inputs, hidden):
        return {
            "dense_i/kernel": (inputs, 3 * hidden),
            "dense_i/bias": (3 * hidden,),
            "dense_h/kernel": (hidden, 3 * hidden),
        }

    def apply(self, variant, weights, xs):
        from flax import nnx

        inputs, hidden = xs.shape[-1], weights["dense_h/kernel"].shape[0]
        cell = nnx.GRUCell(inputs, hidden, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        cell.dense_i.kernel.set_value(weights["dense_i/kernel"])
        cell.dense_i.bias.set_value(weights["dense_i/bias"])
        cell.dense_h.kernel.set_value(weights["dense_h/kernel"])
        h, hs = jnp.zeros((xs.shape[1], hidden)), []
        for x in xs:
            h, y = cell(h, x)
            hs.append(y)
        return jnp.stack(hs)


class Equinox(ByJax):
    """equinox.nn.GRUCell, one example and one step at a time."""

    variants: ClassVar[dict[str, Any]] = {"bias": {}, "no_bias": {"use_bias": False}}
    read = staticmethod(lambda weights, variant: interop.from_equinox(weights))

    def shapes(self, variant, inputs, hidden):
        shapes = {"weight_ih": (3 * hidden, inputs), "weight_hh": (3 * hidden, hidden)}
        biases = {"bias": (3 * hidden,), "bias_n": (hidden,)}
        return shapes if variant == "no_bias" else shapes | biases

    def apply(self, variant, weights, xs):
        import equinox as eqx

        inputs, hidden = xs.shape[-1], weights["weight_hh"].shape[1]
        options = self.variants[variant]
        cell = eqx.nn.GRUCell(inputs, hidden, key=jax.random.key(0), **options)
        fields = list(weights)
        cell = eqx.tree_at(lambda c: [getattr(c, k) for k in fields], cell, list(weights.values()))
        h, hs = jnp.zeros((xs.shape[1], hidden)), []
        for x in xs:
            h = jax.vmap(cell)(x, h)
            hs.append(h)
        return jnp.stack(hs)


class Haiku(ByJax):
    """haiku.GRU in hk.static_unroll."""

    variants: ClassVar[dict[str, Any]] = {"tanh": {}}
    read = staticmethod(lambda weights, variant: interop.from_haiku(weights))

    def shapes(self, variant, inputs, hidden):
        return {"w_i": (inputs, 3 * hidden), "w_h": (hidden, 3 * hidden), "b": (3 * hidden,)}

    def apply(self, variant, weights, xs):
        import haiku as hk

        def unroll(xs):
            core = hk.GRU(weights["w_h"].shape[0])
            h0 = jnp.zeros((xs.shape[1], weights["w_h"].shape[0]))
            return hk.static_unroll(core, xs, h0)[0]

        return hk.without_apply_rng(hk.transform(unroll)).apply({"gru": dict(weights)}, xs)


class Onnx(ByJax):
    """The equations of ONNX's operator GRU-22, typed from its text, one node a layer.

    onnxruntime has them in float32 alone: `interop/test_interop_live.py` compares it.
    """

    variants: ClassVar[dict[str, Any]] = {"before": {}, "after": {}, "both_ways": {}, "no_bias": {}}

    def read(self, weights, variant):
        arrays = (weights["W"], weights["R"], weights.get("B"))
        return interop.from_onnx(*arrays, linear_before_reset=int(variant == "after"))

    def shapes(self, variant, inputs, hidden):
        count = 2 if variant == "both_ways" else 1
        shapes = {"W": (count, 3 * hidden, inputs), "R": (count, 3 * hidden, hidden)}
        return shapes if variant == "no_bias" else shapes | {"B": (count, 6 * hidden)}

    def apply(self, variant, weights, xs):
        count, _, hidden = weights["R"].shape
        biases = weights.get("B", jnp.zeros((count, 6 * hidden)))
        ys = []
        for d in range(count):
            w, r = (jnp.split(weights[k][d], 3) for k in "WR")
            wb, rb = (jnp.split(v, 3) for v in jnp.split(biases[d], 2))
            h, hs = jnp.zeros((xs.shape[1], hidden)), []
            for x in xs if d == 0 else xs[::-1]:
                z = jax.nn.sigmoid(x @ w[0].T + h @ r[0].T + rb[0] + wb[0])
                gate = jax.nn.sigmoid(x @ w[1].T + h @ r[1].T + rb[1] + wb[1])
                if variant == "after":
                    n = jnp.tanh(x @ w[2].T + gate * (h @ r[2].T + rb[2]) + wb[2])
                else:
                    n = jnp.tanh(x @ w[2].T + (gate * h) @ r[2].T + rb[2] + wb[2])
                h = (1 - z) * n + z * h
                hs.append(h)
            ys.append(jnp.stack(hs if d == 0 else hs[::-1]))
        return jnp.concatenate(ys, axis=-1)


PEERS = {
    "torch": Torch(),
    "keras": Keras(),
    "linen": Linen(),
    "nnx": Nnx(),
    "equinox": Equinox(),
    "haiku": Haiku(),
    "onnx": Onnx(),
}
VARIANTS = [(name, variant) for name, peer in PEERS.items() for variant in peer.variants]


def run_peer(name, variant, weights, xs, rng):
    """The Case of these weights, with random cotangents."""
    peer = PEERS[name]
    width = peer.run(variant, weights, xs, np.zeros(()))[0].shape
    cotangents = rng.normal(size=width)
    return Case(weights, xs, cotangents, *peer.run(variant, weights, xs, cotangents))


def draw_case(name, variant, *, seed, steps=5, batch=3, inputs=4, hidden=3):
    """A Case of random weights and inputs."""
    rng = np.random.default_rng(seed)
    weights = draw_like(rng, PEERS[name].shapes(variant, inputs, hidden))
    return run_peer(name, variant, weights, rng.normal(size=(steps, batch, inputs)), rng)


def _hidden(weights, beginning, axis):
    """H, from the first array whose name begins so."""
    return next(v for k, v in weights.items() if k.startswith(beginning)).shape[axis]
