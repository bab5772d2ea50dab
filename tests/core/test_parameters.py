"""Parameters carry their equation, whatever a user of JAX does with them."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close, make_problem, with_spec
from jax import export

from jaxgru import (
    CHO_2014,
    CHUNG_2014,
    PYTORCH,
    Bidirectional,
    GRUParams,
    Noise,
    gru,
    gru_stack,
    init_gru,
    init_stack,
)


def draw(spec=PYTORCH, seed=0):
    """(params, xs) in float32, and what the equation makes of them."""
    problem = make_problem(seed, dtype=jnp.float32)
    return with_spec(problem.params, spec), problem.xs


def run(params, xs):
    return gru(params, xs)[1]


def test_equations_differ_so_that_a_lost_spec_would_show():
    params, xs = draw()
    hs = [run(with_spec(params, spec), xs) for spec in (PYTORCH, CHO_2014, CHUNG_2014)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(hs[a] - hs[b]).max() > 0.05


def test_parameters_have_no_hash_so_that_jit_refuses_them_as_a_static_argument():
    params, xs = draw()
    with pytest.raises(TypeError, match="unhashable"):
        hash(params)
    with pytest.raises(ValueError, match="on-hashable"):
        jax.jit(run, static_argnums=0)(params, xs)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: jax.tree.map(lambda v: v, p),
        lambda p: jax.tree.unflatten(*jax.tree.flatten(p)[::-1]),
        lambda p: pickle.loads(pickle.dumps(p)),
        copy.deepcopy,
        lambda p: jax.jit(lambda p: p)(p),
        lambda p: jax.device_put(p),
        lambda p: jax.tree.map(np.asarray, p),
        lambda p: jax.grad(lambda p: sum((v**2).sum() / 2 for v in jax.tree.leaves(p)))(p),
        lambda p: jax.tree.map(
            lambda v: v[0], jax.vmap(lambda p: p)(jax.tree.map(lambda v: v[None], p))
        ),
        lambda p: dataclasses.replace(p, w_x=p.w_x),
    ],
    ids=["map", "flatten", "pickle", "copy", "jit", "put", "numpy", "grad", "vmap", "replace"],
)
def test_spec_survives(change):
    params, xs = draw()
    changed = change(params)
    assert changed.spec == PYTORCH
    assert_close(run(changed, xs), run(params, xs), 1e-6)


def test_jit_compiles_once_for_each_spec():
    traced = []

    @jax.jit
    def count(params, xs):
        traced.append(params.spec)
        return run(params, xs)

    for spec in (PYTORCH, CHO_2014, PYTORCH, CHO_2014):
        params, xs = draw(spec)
        assert_close(count(params, xs), run(params, xs), 1e-6)
    assert traced == [PYTORCH, CHO_2014]


def test_ensemble_is_mapped_over_stacked_parameters():
    members = [draw(PYTORCH, seed)[0] for seed in range(3)]
    xs = draw()[1]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    got = jax.vmap(run, (0, None))(stacked, xs)
    assert_close(got, jnp.stack([run(member, xs) for member in members]), 1e-6)


def test_stack_is_scanned_over_stacked_layers():
    layers = init_stack(jax.random.key(0), 4, 4, 3, spec=PYTORCH)
    xs = jax.random.normal(jax.random.key(1), (5, 2, 4))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    got, _ = jax.lax.scan(lambda ys, layer: (run(layer, ys), None), xs, stacked)
    assert_close(got, gru_stack(layers, xs)[1], 1e-6)


def test_layers_of_one_stack_may_have_equations_of_their_own():
    first, second = (
        init_gru(jax.random.key(n), 3, 3, spec=s) for n, s in enumerate((PYTORCH, CHUNG_2014))
    )
    xs = jax.random.normal(jax.random.key(1), (5, 2, 3))
    ys = run(second, run(first, xs))
    np.testing.assert_array_equal(gru_stack((first, second), xs)[1], ys)
    pair = Bidirectional(first, second)
    joined = jnp.concatenate([run(first, xs), gru(second, xs, reverse=True)[1]], axis=-1)
    np.testing.assert_array_equal(gru_stack((pair,), xs)[1], joined)


def matrices(params):
    """True for the weights, False for the biases: a mask or the labels of optax."""
    return jax.tree.map(lambda v: v.ndim > 1, params)


@pytest.mark.parametrize(
    ("optimizer", "biases_move"),
    [
        (optax.adamw(0.1, mask=matrices), True),
        (optax.masked(optax.sgd(0.1), matrices), True),
        (
            optax.multi_transform({True: optax.adam(0.1), False: optax.set_to_zero()}, matrices),
            False,
        ),
    ],
    ids=["adamw", "masked", "multi_transform"],
)
def test_optax_updates_parameters_that_keep_their_spec(optimizer, biases_move):
    params, xs = draw()
    grads = jax.grad(lambda params: run(params, xs).sum())(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    updated = optax.apply_updates(params, updates)
    assert jax.tree.structure(updated) == jax.tree.structure(params)
    assert np.abs(updated.w_x - params.w_x).max() > 1e-3
    assert bool(np.abs(updated.b_x - params.b_x).max() > 0) == biases_move


def test_exported_function_of_parameters_runs_their_equation():
    pytest.importorskip("flatbuffers", reason="flatbuffers is an extra")
    params, xs = draw()
    exported = export.export(jax.jit(run))(params, xs)
    exported = export.deserialize(exported.serialize())
    assert_close(exported.call(params, xs), run(params, xs), 1e-6)
    with pytest.raises(ValueError, match="pytree structure"):
        exported.call(with_spec(params, CHO_2014), xs)


def test_structures_are_equal_where_the_specs_are():
    params = draw()[0]
    structure = jax.tree.structure(params)
    assert structure == jax.tree.structure(draw(seed=1)[0])
    assert structure != jax.tree.structure(with_spec(params, CHO_2014))
    assert structure == jax.tree.structure(with_spec(params, dataclasses.replace(PYTORCH)))


def test_two_specs_in_one_tree_map_are_an_error_that_shows_both():
    params = draw()[0]
    with pytest.raises(ValueError) as refused:
        jax.tree.map(jnp.add, params, with_spec(params, CHO_2014))
    assert "reset='after'" in str(refused.value) and "reset='before'" in str(refused.value)


def test_parameters_without_a_spec_cannot_be_made():
    with pytest.raises(TypeError, match="spec"):
        GRUParams(jnp.ones((2, 9)), jnp.ones((3, 9)))  # pyright: ignore[reportCallIssue]


@pytest.mark.slow
def test_orbax_restores_parameters_with_the_spec_of_their_target(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax is an extra")
    params, xs = draw()
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
    with orbax.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "params", jax.tree.map(jnp.zeros_like, params))
    assert restored.spec == PYTORCH
    np.testing.assert_array_equal(run(restored, xs), run(params, xs))


@pytest.mark.slow
@pytest.mark.parametrize("library", ["equinox", "nnx"])
def test_modules_of_other_libraries_hold_parameters(library):
    params, xs = draw()
    if library == "equinox":
        equinox = pytest.importorskip("equinox", reason="equinox is a peer")

        class Module(equinox.Module):
            layer: GRUParams

            def __call__(self, xs):
                return run(self.layer, xs)

        value, grads = equinox.filter_value_and_grad(lambda m: m(xs).sum())(Module(params))
        grads = grads.layer
    else:
        nnx = pytest.importorskip("flax.nnx", reason="flax is a peer")

        class Model(nnx.Module):
            def __init__(self):
                self.layer = nnx.data(jax.tree.map(nnx.Param, params))

            def __call__(self, xs):
                return run(nnx.as_pure(self.layer), xs)

        value, grads = nnx.value_and_grad(lambda m: m(xs).sum())(Model())
        grads = nnx.to_pure_dict(grads)["layer"]
    wanted = jax.value_and_grad(lambda params: run(params, xs).sum())(params)
    np.testing.assert_allclose(value, wanted[0], rtol=1e-6)
    for name, want in wanted[1].arrays().items():
        if want is not None:
            got = grads[name] if isinstance(grads, dict) else getattr(grads, name)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"key": 0}, TypeError, "key must be a jax.random.key, got 0; pass jax.random.key(0)."),
        ({"bias": "no"}, TypeError, "bias must be a bool, got 'no'."),
        ({"layer_norm": 1}, TypeError, "layer_norm must be a bool, got 1."),
        ({"spec": "pytorch"}, TypeError,
         "spec must be a GRUSpec, such as jaxgru.PYTORCH, got 'pytorch'."),
    ],
)  # fmt: skip
def test_bad_argument_of_init_gru_is_named(options, kind, message):
    options = {"key": jax.random.key(0), **options}
    with pytest.raises(kind) as refused:
        init_gru(options.pop("key"), 2, 3, **options)
    assert str(refused.value) == f"init_gru: {message}"


def test_rate_of_numpy_is_a_number():
    params, xs = draw()
    key = jax.random.key(1)
    same = [
        gru(params, xs, noise=Noise(zoneout=rate), key=key)[1] for rate in (0.5, np.float32(0.5))
    ]
    np.testing.assert_array_equal(*same)
