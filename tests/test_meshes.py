"""Every public function of arrays gives on a mesh of devices, or inside `jax.shard_map`, what it
gives on one."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgru
from jaxgru import BPTT, Dropout, Noise, Tangent, diagnostics, losses, models
from jaxgru.core.sharding import varying_axes

T, B, INPUTS, H, V = 5, 4, 3, 4, 6
KEY = jax.random.key(0)
PARAMS = jaxgru.init_gru(KEY, INPUTS, H, layer_norm=True)
STACK = jaxgru.init_stack(KEY, INPUTS, H, 2, bidirectional=True)
LAYERS = jaxgru.init_stack(KEY, INPUTS, H, 2)
MODEL = models.init_sequence_model(KEY, INPUTS, H, V)
EMBEDDED = models.init_token_model(KEY, V, H, embedding_size=2)
ONE_HOT = models.init_token_model(KEY, V, H)
NOISE = Noise(recurrent_dropout=0.3, zoneout=0.3)
DROPOUT = Dropout(input=0.2, between=0.3, output=0.2)


def arrays():
    """xs, mask, resets, tokens and targets, with the rows on axis 1."""
    mask = jaxgru.length_mask([5, 3, 1, 0], T)
    return (
        jax.random.normal(jax.random.key(1), (T, B, INPUTS)),
        mask,
        jnp.zeros((T, B), bool).at[2, 0].set(True),
        jax.random.randint(jax.random.key(2), (T, B), 0, V),
        jax.random.normal(jax.random.key(3), (T, B, V)),
    )


def gradient(run, params):
    """The results of run(params), and the gradient of a sum over them."""

    def loss(params):
        found = run(params)
        return sum(jnp.sin(v).sum() for v in jax.tree.leaves(found)), found

    return jax.grad(loss, has_aux=True)(params)


def traced_rates(xs, mask, deterministic):
    rate = jax.nn.sigmoid(PARAMS.b_x[0])
    options = {"noise": Noise(rate, rate), "key": KEY, "deterministic": deterministic}
    return gradient(lambda p: jaxgru.gru(p, xs, mask=mask, **options), PARAMS)


def last(h_last, hs):
    return jnp.sum(h_last**2)


def step_loss(y, target):
    return jnp.sum((y - target) ** 2)


# The name of a function, with what follows a space, -> a call with (xs, mask, resets, tokens, ys).
CALLS = {
    "gru": lambda xs, mask, resets, *_: gradient(
        lambda p: jaxgru.gru(p, xs, mask=mask, resets=resets), PARAMS
    ),
    "gru noise": lambda xs, mask, *_: gradient(
        lambda p: jaxgru.gru(p, xs, mask=mask, noise=NOISE, key=KEY), PARAMS
    ),
    "gru traced rates": lambda xs, mask, *_: traced_rates(xs, mask, deterministic=False),
    "gru traced mean": lambda xs, mask, *_: traced_rates(xs, mask, deterministic=True),
    "gru truncate": lambda xs, mask, *_: gradient(
        lambda p: jaxgru.gru(p, xs, mask=mask, reverse=True, gradient=Tangent(truncate=2)), PARAMS
    ),
    "gru axis": lambda xs, mask, *_: gradient(
        lambda p: jaxgru.gru(p, jnp.swapaxes(xs, 0, 1), mask=mask.T, axis=1), PARAMS
    ),
    "gru_cell": lambda xs, *_: gradient(
        lambda p: jaxgru.gru_cell(p, xs[0], jnp.tanh(xs[1] @ jnp.ones((INPUTS, H)))), PARAMS
    ),
    "gru_bidirectional": lambda xs, mask, resets, *_: gradient(
        lambda p: jaxgru.gru_bidirectional(p, xs, mask=mask, resets=resets), STACK[0]
    ),
    "gru_stack": lambda xs, mask, resets, *_: gradient(
        lambda p: jaxgru.gru_stack(p, xs, mask=mask, resets=resets, gradient=BPTT(truncate=2)),
        STACK,
    ),
    "gru_stack dropout": lambda xs, *_: gradient(
        lambda p: jaxgru.gru_stack(p, xs, dropout=DROPOUT, key=KEY), STACK
    ),
    "gru_stack_cell": lambda xs, *_: gradient(
        lambda p: jaxgru.gru_stack_cell(p, xs[1], jaxgru.gru_stack(p, xs)[0]), LAYERS
    ),
    "length_mask": lambda xs, mask, *_: jaxgru.length_mask(mask.sum(axis=0), T),
    "resets_from_dones": lambda xs, mask, *_: jaxgru.resets_from_dones(mask, mask[0]),
    "init_taps": lambda xs, mask, *_: jax.grad(
        lambda tap: jnp.sum(jaxgru.gru(PARAMS, xs, mask=mask, tap=tap)[0] ** 2)
    )(jax.tree.map(lambda z, x: x * 0 + z, jaxgru.init_taps(PARAMS, xs.shape[:-1]),
                   jaxgru.Tap(xs, jaxgru.gru(PARAMS, xs)[1]))),
    "sequence_outputs": lambda xs, mask, *_: gradient(
        lambda p: models.sequence_outputs(p, xs, mask=mask), MODEL
    ),
    "final_outputs": lambda xs, mask, *_: gradient(
        lambda p: models.final_outputs(p, xs, mask=mask, dropout=DROPOUT, key=KEY), MODEL
    ),
    "token_logits": lambda xs, mask, resets, tokens, ys: gradient(
        lambda p: models.token_logits(p, tokens, mask=mask), EMBEDDED
    ),
    "token_logits one-hot": lambda xs, mask, resets, tokens, ys: gradient(
        lambda p: models.token_logits(p, tokens, mask=mask), ONE_HOT
    ),
    "token_loss": lambda xs, mask, resets, tokens, ys: gradient(
        lambda p: models.token_loss(p, tokens, tokens, mask=mask), EMBEDDED
    ),
    "generate": lambda xs, mask, resets, tokens, ys: models.generate(EMBEDDED, KEY, tokens, 4),
    "generate table": lambda xs, mask, resets, tokens, ys: models.generate(
        ONE_HOT, KEY, tokens, 2 * V, top_k=3, top_p=0.9
    ),
    "categorical_loss": lambda xs, mask, resets, tokens, ys: gradient(
        lambda ys: losses.categorical_loss(ys, tokens, mask), ys
    ),
    "bernoulli_loss": lambda xs, mask, resets, tokens, ys: gradient(
        lambda ys: losses.bernoulli_loss(ys, jnp.abs(jnp.tanh(ys)), mask), ys
    ),
    "squared_loss": lambda xs, mask, resets, tokens, ys: gradient(
        lambda ys: losses.squared_loss(ys, 0.5 * ys, mask, reduction="sequence_mean"), ys
    ),
    "gradient_flow": lambda xs, mask, *_: diagnostics.gradient_flow(last, PARAMS, xs, mask=mask),
    "gradient_paths": lambda xs, mask, *_: diagnostics.gradient_paths(
        PARAMS, xs, jaxgru.gru(PARAMS, xs)[1], mask=mask
    ),
    "credit_reach": lambda xs, mask, *_: diagnostics.credit_reach(
        diagnostics.gradient_flow(last, PARAMS, xs)[1].states
    ),
    "example_gradient_norms": lambda xs, mask, *_: diagnostics.example_gradient_norms(
        last, PARAMS, xs, mask=mask
    ),
    "gate_statistics": lambda xs, mask, *_: diagnostics.gate_statistics(PARAMS, xs, mask=mask),
    "gate_values": lambda xs, mask, *_: diagnostics.gate_values(PARAMS, xs, mask=mask),
    "step_jacobian": lambda xs, *_: diagnostics.step_jacobian(
        PARAMS, xs[0], jaxgru.gru(PARAMS, xs)[0]
    ),
    "step_jacobian_diagonal": lambda xs, *_: diagnostics.step_jacobian_diagonal(
        PLAIN, xs[0], jaxgru.gru(PLAIN, xs)[0]
    ),
    "step_jacobian_bound": lambda xs, *_: diagnostics.step_jacobian_bound(
        PARAMS, xs[0], jaxgru.gru(PARAMS, xs)[0]
    ),
    "sequence_jacobians": lambda xs, mask, *_: diagnostics.sequence_jacobians(
        PARAMS, xs, mask=mask
    ),
    "jacobian_products": lambda xs, *_: diagnostics.jacobian_products(
        diagnostics.sequence_jacobians(PARAMS, xs)
    ),
    "singular_values": lambda xs, *_: diagnostics.singular_values(
        diagnostics.sequence_jacobians(PARAMS, xs)
    ),
    "lyapunov_exponents": lambda xs, mask, *_: diagnostics.lyapunov_exponents(
        diagnostics.sequence_jacobians(PARAMS, xs), mask.at[0].set(True)
    ),
    "rtrl": lambda xs, mask, resets, tokens, ys: diagnostics.rtrl(
        step_loss, PARAMS, xs, ys[..., :H], mask=mask
    )[:2],
}  # fmt: skip
PLAIN = jaxgru.init_gru(KEY, INPUTS, H)


def test_every_public_function_of_arrays_is_called():
    public = {
        name
        for module in (jaxgru, models, losses, diagnostics)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name)) and not name.startswith("init_")
    }
    assert public <= {name.split(" ")[0] for name in CALLS}


@pytest.mark.parametrize("kind", [
    pytest.param(AxisType.Auto, marks=pytest.mark.slow, id="auto"),
    pytest.param(AxisType.Explicit, id="explicit"),
])  # fmt: skip
@pytest.mark.parametrize("name", CALLS)
def test_mesh_gives_what_one_device_gives(name, kind):
    wanted = jax.jit(CALLS[name])(*arrays())
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(arrays(), NamedSharding(mesh, P(None, "rows")))
        got = jax.jit(CALLS[name])(*placed)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert_close(jax.tree.map(np.asarray, got), wanted, 1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if " " in name else ()) for name in CALLS]
)
def test_shard_map_gives_each_device_what_its_rows_give_alone(name):
    """One row a device. The gradient of what all devices hold alike is JAX's sum over them."""
    xs, mask, *others = arrays()
    data, varies = (xs, mask.at[0].set(True), *others), []  # gate_statistics of no step are NaN

    def on_device(*data):
        found = CALLS[name](*data)
        varies.extend(bool(varying_axes(v)) for v in jax.tree.leaves(found))
        return jax.tree.map(lambda v: v[None], found)

    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    options = {"mesh": mesh, "in_specs": P(None, "rows"), "out_specs": P("rows")}
    got = jax.jit(jax.shard_map(on_device, **options))(*data)
    alone = jax.jit(CALLS[name])
    parts = [alone(*(v[:, row : row + 1] for v in data)) for row in range(B)]
    leaves, treedef = jax.tree.flatten(jax.tree.map(lambda *rows: np.stack(rows), *parts))
    assert jax.tree.structure(got) == treedef and len(varies) == len(leaves)
    for found, rows, is_own in zip(jax.tree.leaves(got), leaves, varies):
        wanted = rows if is_own else np.broadcast_to(rows.sum(axis=0), rows.shape)
        assert_close(np.asarray(found), wanted, 1e-4)
