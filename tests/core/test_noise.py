"""Rates of noise that are arrays, as of a schedule, act as the Python floats that they hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close, make_problem

import jaxgru
from jaxgru import (
    BPTT,
    Dropout,
    Noise,
    gru,
    gru_stack,
    gru_stack_cell,
    init_gru,
    init_stack,
    models,
)
from jaxgru.core.noise import draw_mask, draw_masks, draw_state_dropout
from jaxgru.experimental.fused import HopperKernel
from jaxgru.stacks.dropout import drop

KEY = jax.random.key(8)
RATES = (0.4, 0.3)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
DTYPES = {"float32": 1e-6, "bfloat16": 1e-2}


def cast(tree, dtype):
    return jax.tree.map(lambda v: v if v.dtype == bool else v.astype(dtype), tree)


@pytest.mark.parametrize("deterministic", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("gradient", "dtype"),
    [
        ("bptt", "float32"),
        (BPTT("boundaries", chunk_size=3), "float32"),
        slow("tangent", "float32"),
        ("autodiff", "float32"),
        ("bptt", "bfloat16"),
        slow("tangent", "bfloat16"),
    ],
    ids=["bptt", "boundaries", "tangent", "autodiff", "bptt-bfloat16", "tangent-bfloat16"],
)
def test_traced_rates_give_what_static_rates_give(gradient, dtype, deterministic):
    """Values and every gradient, with a mask and resets; the rates themselves have no gradient."""
    problem = cast(make_problem(41, dtype=jnp.float32), dtype)

    def loss(arrays, noise):
        h_last, hs = gru(
            *arrays, mask=problem.mask, resets=problem.resets, gradient=gradient, noise=noise,
            key=KEY, deterministic=deterministic,
        )  # fmt: skip
        return jnp.sum(jnp.sin(hs)) + jnp.sum(h_last**2), hs

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    arrays = (problem.params, problem.xs, problem.h0)
    wanted, (dwanted, _) = run(arrays, Noise(*RATES))
    got, (dgot, dnoise) = run(arrays, Noise(*map(jnp.float32, RATES)))
    assert_close((got, dgot), (wanted, dwanted), DTYPES[dtype])
    assert dnoise == Noise(jnp.float32(0), jnp.float32(0))
    plain = run(arrays, Noise())[0]
    assert np.abs(np.asarray(got[1] - plain[1])).max() > 0.01


@pytest.mark.parametrize("enable_x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("implementation", ["threefry2x32", slow("rbg")])
def test_array_draws_the_masks_of_its_float(implementation, enable_x64):
    """Bit for bit, in every dtype of the rate and of what it drops."""
    with jax.enable_x64(enable_x64):
        key, numbers = jax.random.key(3, impl=implementation), jnp.arange(4)
        for dtype in ("float32", "bfloat16", *(["float64"] if enable_x64 else [])):
            xs = jnp.ones((4, 40, 3), dtype)
            for value in (0.1, 0.3, 0.65, 0.999):
                rate = jnp.asarray(value, dtype)
                same = (rate, float(rate))
                np.testing.assert_array_equal(*(draw_state_dropout(key, r, xs[0]) for r in same))
                np.testing.assert_array_equal(*(drop(key, xs, r, numbers) for r in same))


def test_rate_of_dropout_has_no_gradient():
    xs, numbers = jnp.ones((4, 3)), jnp.arange(4)

    def dropped(rate):
        return drop(KEY, xs, rate, numbers).sum() + draw_state_dropout(KEY, rate, xs).sum()

    value, slope = jax.value_and_grad(dropped)(0.3)
    assert slope == 0 and value != 2 * xs.size


@pytest.mark.usefixtures("x64")
def test_mean_of_zoneout_has_the_dtype_of_the_state():
    """Where a Python float is float64 and the state float32."""
    problem = make_problem(45, dtype=jnp.float32)
    got, wanted = (
        gru(problem.params, problem.xs, noise=Noise(zoneout=rate), deterministic=True)[1]
        for rate in (jnp.float64(0.3), 0.3)
    )
    assert got.dtype == jnp.float32
    assert_close(got, wanted, 1e-6)


def test_masks_follow_the_rates_of_their_steps():
    """One rate for each step, as zoneout passes them on."""
    numbers, like = jnp.arange(3, 7), jnp.zeros((50, 4))
    rates = jnp.array([0.0, 0.2, 0.5, 0.9])
    drawn = draw_masks(KEY, rates.reshape(4, 1, 1), numbers, like.shape, like)
    for mask, number, rate in zip(drawn, numbers, rates):
        alone = draw_mask(jax.random.fold_in(KEY, number), float(rate), like.shape, like)
        np.testing.assert_array_equal(mask, alone)


def make_rates(kind, number=float):
    """Options with rates of every place, as numbers or arrays."""
    rates = [number(rate) for rate in (0.2, 0.3, 0.4)]
    dropout, noise = Dropout(*rates, variational=kind == "variational"), Noise(*rates[:2])
    return {"dropout": dropout, "noise": noise, "key": KEY, "deterministic": kind == "evaluation"}


@pytest.mark.parametrize("kind", ["training", slow("variational"), "evaluation"])
def test_stack_takes_traced_rates(kind):
    """As an argument of jit that holds arrays, and step by step."""
    layers = init_stack(jax.random.key(0), 2, 3, 2, bidirectional=kind == "variational")
    xs = jax.random.normal(jax.random.key(1), (4, 2, 2))

    def loss(layers, options):
        options = {**options, "deterministic": kind == "evaluation"}
        h_last, ys = gru_stack(layers, xs, **options)
        return jnp.sum(jnp.sin(ys)) + sum(map(jnp.sum, jax.tree.leaves(h_last)))

    numbers, arrays = make_rates(kind), make_rates(kind, jnp.float32)
    run = jax.jit(jax.value_and_grad(loss))
    assert_close(run(layers, arrays), run(layers, numbers), 1e-6)
    if kind == "evaluation":
        cell = functools.partial(gru_stack_cell, layers, xs[0], jaxgru.init_state(layers, (2,)))
        assert_close(cell(**arrays), cell(**numbers), 1e-6)
        step = jax.jit(lambda noise: cell(noise=noise, deterministic=True))
        assert_close(step(arrays["noise"]), cell(**numbers), 1e-6)


def test_models_take_traced_rates():
    params = models.init_token_model(jax.random.key(0), 5, 3, 1, embedding_size=2)
    tokens = jnp.array([[1, 2], [0, 3], [4, 1]])
    static, arrays = (make_rates("training", number) for number in (float, jnp.float32))

    @jax.jit
    def loss(options):
        return models.token_loss(params, tokens, tokens, **(options | {"deterministic": False}))

    assert_close(loss(arrays), loss(static), 1e-6)
    drawn = [
        models.generate(params, KEY, tokens, 4, noise=options["noise"])
        for options in (static, arrays)
    ]
    assert_close(drawn[1][0], drawn[0][0], 1e-6)
    np.testing.assert_array_equal(drawn[1][1], drawn[0][1])
    plain = models.generate(params, KEY, tokens, 4)[0]
    assert np.abs(np.asarray(plain[0] - drawn[1][0][0])).max() > 0.01


def test_scheduled_rate_is_compiled_once():
    """Under scan over the steps of a schedule, and under vmap over rates."""
    problem = make_problem(42, dtype=jnp.float32)
    schedule, traces = optax.linear_schedule(0.0, 0.6, 3), []

    @jax.jit
    def run(step):
        traces.append(step)
        noise = Noise(recurrent_dropout=schedule(step), zoneout=schedule(step))
        return gru(problem.params, problem.xs, noise=noise, key=KEY)[1]

    rates = [float(schedule(step)) for step in range(4)]
    wanted = [gru(problem.params, problem.xs, noise=Noise(r, r), key=KEY)[1] for r in rates]
    assert_close([run(step) for step in range(4)], wanted, 1e-6)
    assert len(traces) == 1
    scanned = jax.lax.scan(lambda step, _: (step + 1, run(step)), 0, length=4)[1]
    assert_close(scanned, jnp.stack(wanted), 1e-6)
    each = jax.vmap(lambda r: gru(problem.params, problem.xs, noise=Noise(r, r), key=KEY)[1])
    assert_close(each(jnp.array(rates)), jnp.stack(wanted), 1e-6)


def test_numbers_of_a_noise_stay_static():
    """So that they cost nothing where they are 0; arrays are leaves."""
    mixed = Noise(np.float32(0.5), jnp.float32(0.25))
    leaves, treedef = jax.tree.flatten(mixed)
    assert leaves == [0.25] and treedef == jax.tree.structure(Noise(0.5, jnp.float32(0.1)))
    assert jax.tree.leaves(Dropout(0.1, variational=True)) == []
    assert jax.tree.map(lambda rate: 2 * rate, mixed) == Noise(0.5, jnp.float32(0.5))
    assert hash(Noise(0.1)) == hash(Noise(np.float64(0.1)))


def test_array_is_checked_where_it_can_be_read():
    message = r"Noise: zoneout must be in \[0, 1\), got 1.5\."
    with pytest.raises(ValueError, match=message):
        Noise(zoneout=jnp.float32(1.5))
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda: Noise(zoneout=np.float32(1.5)))()


def test_kernel_refuses_an_array_whose_mean_it_would_take():
    problem = make_problem(43, dtype=jnp.float32)
    with pytest.raises(TypeError) as refused:
        gru(problem.params, problem.xs, gradient=BPTT(kernel=HopperKernel(interpret=True)),
            noise=Noise(zoneout=jnp.float32(0.1)), deterministic=True)  # fmt: skip
    assert str(refused.value) == (
        "gru: noise.zoneout must be a Python float with a kernel and deterministic=True, got an "
        "array; pass a float, or leave BPTT's kernel out."
    )


@pytest.mark.parametrize(
    "transform",
    [jax.jit, lambda f: lambda p: jax.lax.scan(lambda c, _: (c, f(p)), 0, None, length=1)[1]],
    ids=["jit", "scan"],
)
def test_concrete_arrays_of_rates_and_steps_are_closed_over(transform):
    """As constants of the program: their values are read, not traced."""
    rate, first = jnp.float32(0.3), jnp.int32(2)
    layers = init_stack(jax.random.key(0), 2, 4, 2)
    xs = jax.random.normal(jax.random.key(1), (6, 3, 2))

    def run(noise, dropout, first_step, layers):
        options = {"noise": noise, "dropout": dropout, "first_step": first_step}
        return gru_stack(layers, xs, key=jax.random.key(2), **options)[1]

    given = (Noise(zoneout=rate), Dropout(input=rate), first)
    static = (Noise(zoneout=float(rate)), Dropout(input=float(rate)), 2)
    got = transform(functools.partial(run, *given))(layers)
    np.testing.assert_allclose(jnp.squeeze(got), run(*static, layers), rtol=1e-6)


def test_rates_are_checked_after_a_tree_operation():
    layer, xs = init_gru(jax.random.key(0), 2, 4), jnp.ones((6, 3, 2))
    noise = Noise(zoneout=jnp.float32(0.25))
    on_host = gru(layer, xs, noise=jax.device_get(noise), deterministic=True)[1]
    np.testing.assert_allclose(
        on_host, gru(layer, xs, noise=noise, deterministic=True)[1], rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"zoneout must be in \[0, 1\), got 5.25"):
        gru(layer, xs, noise=jax.tree.map(lambda v: v + 5, noise), deterministic=True)
    with pytest.raises(TypeError, match="zoneout must be a Python float or a floating scalar"):
        gru(layer, xs, noise=jax.tree.map(lambda v: v[None], noise), deterministic=True)


@pytest.mark.parametrize("wide", [False, True])
def test_first_step_of_every_integer_dtype_is_that_of_a_python_int(wide, uncompiled):
    """It numbers the windows of truncation and the draws of zoneout."""
    layer, xs = init_gru(jax.random.key(0), 2, 4), jnp.ones((3, 1, 2))
    options = {"noise": Noise(zoneout=0.5), "key": jax.random.key(1), "gradient": BPTT(truncate=2)}

    def gradient(first_step):
        return jax.grad(lambda xs: gru(layer, xs, first_step=first_step, **options)[0].sum())(xs)

    with jax.enable_x64(wide):
        want = gradient(3)
        for name in ("int8", "int64", "uint32", "uint64"):
            np.testing.assert_array_equal(gradient(np.dtype(name).type(3)), want)
        np.testing.assert_array_equal(gradient(jnp.asarray(np.int64(3))), want)
        assert not np.array_equal(gradient(2), want)
