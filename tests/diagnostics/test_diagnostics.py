"""Diagnostics beyond the agreement table: forms, transformations, known values, and errors."""

import dataclasses
import functools
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, flat, make_problem, with_spec

import jaxgru
from jaxgru import CHUNG_2014, PYTORCH, Bidirectional, GRUSpec, Tap, diagnostics, models


def squares(h_last, ys):
    return (ys**2).sum() + sum(h.sum() for h in jax.tree.leaves(h_last))


def stack_of(*problems):
    return tuple(problem.params for problem in problems)


def pairs_of(*sizes):
    """A stack of layers of two directions, drawn without a random key of JAX."""
    cells = [stack_of(*(make_problem(20 + d, inputs=size) for d in range(2))) for size in sizes]
    return tuple(Bidirectional(*pair) for pair in cells)


def options_of(problem):
    return {"mask": problem.mask, "resets": problem.resets}


# The tap.


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param({"residuals": "gates", "chunk_size": 2}, marks=pytest.mark.slow),
        {"residuals": "states"},
        {"residuals": "boundaries", "chunk_size": 3, "reverse": True},
        {"gradient": "tangent"},
        pytest.param(
            {"truncate": 2, "key": jax.random.key(0), "zoneout": 0.3, "recurrent_dropout": 0.2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda policy: ", ".join(policy),
)
def test_tap_has_autodiffs_gradient_and_moves_the_states_it_is_added_to(policy, x64, uncompiled):
    problem = make_problem(2)
    tap = Tap(0.1 * problem.xs, 0.3 * problem.cotangents[1])  # not zeros: what is saved holds it

    def loss(tap, params, **policy):
        options = {**options_of(problem), **policy}
        return squares(*flat(jaxgru.gru)(params, problem.xs, problem.h0, tap=tap, **options))

    plain = {k: v for k, v in policy.items() if k not in ("residuals", "chunk_size")}
    wanted = jax.grad(loss, (0, 1))(tap, problem.params, **plain | {"gradient": "autodiff"})
    assert_close(
        jax.jit(jax.grad(functools.partial(loss, **policy), (0, 1)))(tap, problem.params),
        wanted,
        1e-12,
    )


def test_tap_of_zeros_changes_no_bit_and_half_a_tap_is_enough(optimized):
    problem = make_problem(3, dtype=jnp.float32)
    plain = jaxgru.gru(problem.params, problem.xs, problem.h0, mask=problem.mask)
    zeros = jaxgru.init_taps(problem.params, problem.mask.shape)
    for tap in (zeros, zeros._replace(xs=None), zeros._replace(hs=None)):
        got = jaxgru.gru(problem.params, problem.xs, problem.h0, mask=problem.mask, tap=tap)
        for a, b in zip(got, plain):
            assert (a == b).all()


def test_tap_of_a_batch_major_stack_reaches_every_layer_and_direction(x64, uncompiled):
    problem, layers = make_problem(4), pairs_of(2, 6)

    def loss(tap, axis):
        arrays = (problem.xs, problem.mask, problem.resets)
        xs, mask, resets = (jnp.moveaxis(v, 0, axis) for v in arrays)
        h_last, ys = jaxgru.gru_stack(layers, xs, mask=mask, resets=resets, tap=tap, axis=axis)
        return squares(h_last, ys)

    leads = (problem.mask.shape, problem.mask.shape[::-1])
    time_major, batch_major = (
        jax.grad(loss)(jaxgru.init_taps(layers, lead), axis) for axis, lead in enumerate(leads)
    )
    assert_close(jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), batch_major), time_major, 1e-14)
    sizes = [v.shape[-1] for v in jax.tree.leaves(time_major)]
    assert sizes == [2, 3, 2, 3, 6, 3, 6, 3]
    assert all(v.any() for v in jax.tree.leaves(time_major))


def test_tap_goes_through_a_model_with_dropout_to_any_loss():
    model = models.init_token_model(jax.random.key(0), 5, 3, embedding_size=2, num_layers=2)
    tokens = jnp.array([[1, 2], [0, 4], [3, 3]])

    def loss(taps):
        return models.token_loss(
            model, tokens, tokens, tap=taps, dropout=0.5, key=jax.random.key(1)
        )[0]

    flow = jax.jit(jax.grad(loss))(jaxgru.init_taps(model.layers, tokens.shape))
    assert flow[1].hs.shape == (3, 2, 3) and flow[0].hs.any()


# Forms: stacks, directions, no batch axis, half precision, jit.


def test_flow_of_a_bidirectional_stack_has_the_form_of_its_parameters(x64, uncompiled):
    problem, layers = make_problem(5), with_spec(pairs_of(2, 6), CHUNG_2014)
    options = options_of(problem)
    with pytest.raises(
        ValueError, match=r"^gradient_flow: params\[1\].forward.w_x must have 3 rows"
    ):
        diagnostics.gradient_flow(squares, layers, problem.xs, merge="sum", **options)
    loss, flow = diagnostics.gradient_flow(squares, layers, problem.xs, **options)

    def plain(tap):
        return squares(
            *jaxgru.gru_stack(layers, problem.xs, tap=tap, gradient="autodiff", **options)
        )

    wanted = jax.grad(plain)(jaxgru.init_taps(layers, problem.mask.shape))
    assert isinstance(flow[1], Bidirectional) and loss == plain(None)
    for layer, taps in zip(flow, wanted):
        for direction, tap in zip(layer, taps):
            assert_close(direction.states, jnp.linalg.norm(tap.hs, axis=-1), 1e-12)
            assert_close(direction.inputs, jnp.linalg.norm(tap.xs, axis=-1), 1e-12)


def test_rtrl_of_a_residual_stack_with_gains_is_autodiffs(x64):
    problem = make_problem(6)
    options = options_of(problem)
    layers = stack_of(make_problem(0, layer_norm=True), make_problem(1, inputs=3, layer_norm=True))
    layers = with_spec(layers, PYTORCH)

    def step_loss(y, target):
        return ((y - target) ** 2).sum()

    def whole(layers, **more):
        ys = jaxgru.gru_stack(layers, problem.xs, residual=True, **options, **more)[1]
        return step_loss(ys, problem.cotangents[1])

    forward = jax.jit(
        lambda p: diagnostics.rtrl(
            step_loss, p, problem.xs, problem.cotangents[1], residual=True, **options
        )
    )
    loss, grads, _ = forward(layers)
    wanted = jax.jit(jax.value_and_grad(functools.partial(whole, gradient="autodiff")))(layers)
    assert_close((loss, grads), wanted, 1e-11)


@pytest.mark.parametrize("pair", [False, True], ids=["one_layer", "two_directions"])
def test_norms_of_a_layer_with_scales_are_those_of_each_examples_gradient(x64, pair):
    problem = make_problem(6, layer_norm=True)
    layer, run = problem.params, jaxgru.gru
    if pair:
        layer = jaxgru.Bidirectional(layer, make_problem(7, layer_norm=True).params)
        run = jaxgru.gru_bidirectional

    @jax.jit
    def of_all(params, xs, mask, resets):
        flags = {"mask": mask, "resets": resets}
        return diagnostics.example_gradient_norms(squares, params, xs, **flags)[1]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 1, 1, 1))
    def of_each(params, xs, mask, resets):
        flags = {"mask": mask, "resets": resets}

        def loss(params):
            return squares(*run(params, xs, gradient="autodiff", **flags))

        return jax.tree.map(jnp.linalg.norm, jax.grad(loss)(params))

    arguments = (with_spec(layer, PYTORCH), problem.xs, problem.mask, problem.resets)
    assert_close(of_all(*arguments), of_each(*arguments), 1e-10)


def test_reverse_jacobians_are_those_of_the_sequence_turned_round(x64, uncompiled):
    problem = make_problem(7)
    flags = {"mask": problem.mask, "resets": problem.resets}
    turned = {name: v[::-1] for name, v in flags.items()}
    got = diagnostics.sequence_jacobians(
        problem.params, problem.xs, problem.h0, reverse=True, **flags
    )
    wanted = diagnostics.sequence_jacobians(problem.params, problem.xs[::-1], problem.h0, **turned)
    assert_close(got[::-1], wanted, 1e-14)
    dhs = problem.cotangents[1]
    paths = diagnostics.gradient_paths(
        problem.params, problem.xs, dhs, problem.h0, reverse=True, **flags
    )
    pulled = jnp.einsum("tbij,tbi->tbj", got, dhs)
    assert_close(sum(paths[1:], paths[0]), pulled, 1e-13)


def test_without_a_batch_axis_everything_is_that_of_a_batch_of_one():
    problem = make_problem(8, batch=(1,), dtype=jnp.float32)
    params, target = problem.params, problem.cotangents[1]

    def observe(xs, target):
        flow = diagnostics.gradient_flow(squares, params, xs)[1]
        return (
            flow, diagnostics.sequence_jacobians(params, xs), diagnostics.gate_values(params, xs),
            diagnostics.example_gradient_norms(squares, params, xs)[1],
            diagnostics.lyapunov_exponents(diagnostics.sequence_jacobians(params, xs)),
            *(
                diagnostics.rtrl(
                    lambda y, t: ((y - t) ** 2).sum(), params, xs, target, influence=influence
                )
                for influence in ("exact", "snap-1")
            ),
        )  # fmt: skip

    single = jax.jit(observe)(problem.xs[:, 0], target[:, 0])
    batched = jax.jit(observe)(problem.xs, target)
    batched = jax.tree.map(lambda a, b: a.reshape(b.shape), batched, single)
    assert_close(single, batched, 1e-5)


def test_half_precision_observes_in_float32_and_returns_gradients_in_half():
    problem = make_problem(9, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), problem)

    def loss(y, target):
        return ((y - target) ** 2).sum()

    @jax.jit
    def observe(problem):
        jacobian = diagnostics.step_jacobian(problem.params, problem.xs[0], problem.h0)
        arguments = (problem.params, problem.xs, problem.cotangents[1], problem.h0)
        return jacobian, diagnostics.rtrl(loss, *arguments)[1]

    (jacobian, got), (wide_jacobian, wanted) = observe(problem), observe(wide)
    assert jacobian.dtype == jnp.float32
    products = diagnostics.jacobian_products(jacobian[None].astype(jnp.bfloat16))
    assert products.dtype == jnp.float32
    assert_close(jacobian, wide_jacobian, 2e-2)
    assert {v.dtype for v in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    assert_close(got, wanted, 3e-2)


# Known values.


def test_lyapunov_exponents_of_a_rotation_that_shrinks_and_of_skipped_steps(x64):
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.diag([0.5, 2.0])
    # Slants alone, and beside turns that are skipped: not skipped they would change the frame.
    jacobians = np.stack(
        [[slant] * 6, [slant, turn] * 3, [0.9 * turn, 100 * turn] * 3, [0 * turn] * 6]
    )
    mask = np.stack([[True] * 6, [True, False] * 3, [True, False] * 3, [True] * 6])
    arguments = jnp.asarray(jacobians.swapaxes(0, 1)), jnp.asarray(mask.T)
    got = diagnostics.lyapunov_exponents(*arguments)
    assert_close(got[:2], np.log([[2.0, 0.5]] * 2), 1e-13)
    assert_close(got[2], np.log([0.9, 0.9]), 1e-13)
    assert np.isneginf(got[3]).all()
    np.testing.assert_array_equal(  # without a mask all steps count
        diagnostics.lyapunov_exponents(arguments[0])[0], got[0]
    )


def test_statistics_are_numpys_over_real_steps(x64, uncompiled):
    problem = make_problem(10)
    options = options_of(problem)
    params = with_spec(problem.params, GRUSpec("after", "write"))
    gates = diagnostics.gate_values(params, problem.xs, problem.h0, **options)
    got = diagnostics.gate_statistics(params, problem.xs, problem.h0, low=0.4, high=0.6, **options)
    real = np.asarray(problem.mask)
    r, z, k = (np.asarray(v)[real] for v in (gates.reset, gates.update, gates.kept))
    np.testing.assert_allclose(k, 1 - z, rtol=1e-14)
    wanted = (
        r.mean(0), z.mean(0), k.mean(0), (r < 0.4).mean(0), (r > 0.6).mean(0),
        (z < 0.4).mean(0), (z > 0.6).mean(0), -1 / np.log(k).mean(0),
    )  # fmt: skip
    assert_close(tuple(got), wanted, 1e-13)
    assert 0 < np.mean(wanted[3]) < 1 and 0 < np.mean(wanted[6]) < 1


def test_credit_reach_counts_from_the_end_row_by_row():
    norms = jnp.array([[0.0, 5.0], [0.2, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert diagnostics.credit_reach(norms, 0.1).tolist() == [2, 3]
    assert diagnostics.credit_reach(norms, 0.5).tolist() == [0, 3]
    real = jnp.array([[True, True], [True, True], [True, False], [False, False]])
    assert diagnostics.credit_reach(norms + 0.05, 0.9, mask=real).tolist() == [2, 1]
    for dead in (0.0, jnp.nan):
        assert diagnostics.credit_reach(norms.at[3].set(dead), 0.1).tolist() == [0, 0]


def test_bound_is_its_formula_in_gates_and_spectral_norms(x64, uncompiled):
    problem = make_problem(12)
    x, h = problem.xs[0], problem.h0
    u_r, u_z, u_n = np.split(np.asarray(problem.params.w_h), 3, axis=-1)
    norm_r, norm_z, norm_n = (np.linalg.norm(u, 2) for u in (u_r, u_z, u_n))
    b_n = np.asarray(problem.params.b_h)[6:]
    for spec in (GRUSpec("before", "write"), GRUSpec("after", "keep")):
        params = with_spec(problem.params, spec)
        gates = diagnostics.gate_values(params, x[None], h)
        r, z, n, k = (np.asarray(v[0]) for v in gates)
        k_z, k_a = np.abs(np.asarray(h) - n) * z * (1 - z), (1 - k) * (1 - n**2)
        largest = [np.abs(v).max(axis=-1) for v in (k, k_z, k_a, r)]
        wanted = largest[0] + largest[1] * norm_z
        if spec.reset == "before":
            k_r = np.abs(np.asarray(h) * r * (1 - r)).max(axis=-1)
            wanted += largest[2] * norm_n * (largest[3] + k_r * norm_r)
        else:
            k_r = np.abs(k_a * (np.asarray(h) @ u_n + b_n) * r * (1 - r)).max(axis=-1)
            wanted += k_r * norm_r + np.abs(k_a * r).max(axis=-1) * norm_n
        got = diagnostics.step_jacobian_bound(params, x, h)
        assert_close(got, wanted, 1e-13)


def test_norms_of_gradients_that_cancel_or_are_tiny_keep_their_digits():
    """The sum over steps of what one step takes back: a Gram matrix would round below 0."""
    problem = make_problem(13, steps=20, batch=(12,), dtype=jnp.float32)
    xs = np.ones_like(problem.xs)
    weights = np.asarray(problem.cotangents[1])
    weights = weights - weights.mean(axis=0, keepdims=True)
    params = dataclasses.replace(problem.params, w_h=np.zeros((3, 9), np.float32), b_h=None)

    def loss(h_last, hs):
        return 1e-25 * (hs * weights).sum()

    @jax.jit
    def observe(params, xs):
        norms = diagnostics.example_gradient_norms(loss, params, xs)[1]
        half = jax.tree.map(lambda v: v.astype(jnp.float16), (params, xs))
        halfway = diagnostics.gradient_flow(
            lambda h, hs: (1e-3 * hs.astype(jnp.float32)).sum(), *half
        )
        return norms, diagnostics.gradient_flow(loss, params, xs)[1], halfway[1]

    norms, flow, of_half = observe(params, xs)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(norms))
    assert (np.asarray(flow.states) > 1e-26).all() and (np.asarray(flow.inputs) > 1e-28).all()
    assert of_half.states.dtype == jnp.float32 and (np.asarray(of_half.states) > 1e-4).all()


def test_residual_and_merged_stacks_are_seen_as_gru_stack_runs_them(x64, uncompiled):
    problem = make_problem(14)
    options = options_of(problem)
    layers = stack_of(*(make_problem(seed, inputs=size) for seed, size in ((0, 2), (1, 3), (2, 3))))
    layers = with_spec(layers, PYTORCH)

    def states(h, t, layers):
        per_layer = tuple(jnp.split(h, 3, axis=-1))
        flags = {"mask": problem.mask[t], "resets": problem.resets[t]}
        h, _ = jaxgru.gru_stack_cell(layers, problem.xs[t], per_layer, residual=True, **flags)
        return jnp.concatenate(h, axis=-1)

    first = {"mask": problem.mask[:3], "resets": problem.resets[:3]}
    h = jnp.concatenate(jaxgru.gru_stack(layers, problem.xs[:3], residual=True, **first)[0], -1)
    whole = jax.jacrev(states)(h, 3, layers)
    wanted = jnp.stack([whole[b, :, b] for b in range(3)])
    got = diagnostics.sequence_jacobians(layers, problem.xs, residual=True, **options)
    assert_close(got[3], wanted, 1e-12)

    pairs = with_spec(pairs_of(2, 3, 3), PYTORCH)
    merged = {"merge": "sum", "residual": True, **options}

    def plain(tap):
        return squares(*jaxgru.gru_stack(pairs, problem.xs, tap=tap, **merged))

    wanted = jax.grad(plain)(jaxgru.init_taps(pairs, problem.mask.shape))
    _, flow = diagnostics.gradient_flow(squares, pairs, problem.xs, **merged)
    for layer, taps in zip(flow, wanted):
        for direction, tap in zip(layer, taps):
            assert_close(direction.states, jnp.linalg.norm(tap.hs, axis=-1), 1e-12)
    # What a path says needs the layer's own input: in the top layer, of all layers below.
    top = jaxgru.gru_stack(pairs[:2], problem.xs, **merged)[1]
    paths = diagnostics.gradient_paths(pairs[2].forward, top, wanted[2][0].hs, **options)
    got = flow[2].forward.paths
    assert_close(got, jax.tree.map(lambda v: jnp.linalg.norm(v, axis=-1), paths), 1e-12)


def test_flow_of_a_batch_that_is_sharded_is_that_of_the_whole():
    problem = make_problem(15, batch=(4,), dtype=jnp.float32)
    mesh = jax.make_mesh((2,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))

    def observe(params, xs):
        flow = diagnostics.gradient_flow(squares, params, xs)[1]
        return flow, diagnostics.example_gradient_norms(squares, params, xs)[1].w_h[None]

    batch = jax.P(None, "b")
    shards = jax.shard_map(observe, mesh=mesh, in_specs=(jax.P(), batch), out_specs=batch)
    whole = jax.jit(observe)(problem.params, problem.xs)
    assert_close(jax.jit(shards)(problem.params, problem.xs), whole, 1e-5)


def test_rtrl_sums_a_half_precision_loss_in_float32_and_keeps_a_list_a_list():
    params = jax.tree.map(lambda v: np.asarray(v).astype(jnp.bfloat16), PARAMS)
    xs = np.ones((400, 1, 2), jnp.bfloat16)
    loss, grads, state = jax.jit(
        lambda *args: diagnostics.rtrl(lambda y, t: 1 + 0 * y.sum(), *args)
    )([params], xs, xs)
    assert {v.dtype for v in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    assert loss == 400 and isinstance(grads, list)


@pytest.mark.parametrize("influence", ["exact", "snap-1"])
def test_rtrl_forgets_at_a_reset(influence, x64):
    """Where the last step is reset, nothing before it matters to its loss."""
    problem, other = make_problem(11), make_problem(12)
    resets = np.zeros((7, 3), bool)
    resets[6] = True
    last = np.zeros((7, 1, 1))
    last[6] = 1.0

    @jax.jit
    def run(xs, h0):
        given = {"resets": resets, "influence": influence}
        return diagnostics.rtrl(lambda y, w: (w * y).sum(), problem.params, xs, last, h0, **given)

    whole = run(problem.xs, problem.h0)
    prefix = np.concatenate([other.xs[:6], problem.xs[6:]])
    assert_close(run(prefix, other.h0), whole, 1e-14)
    assert np.any(run(other.xs, problem.h0)[1].w_x != whole[1].w_x)


@pytest.mark.parametrize(
    ("influence", "count"), [("exact", 1), ("exact", 2), ("snap-1", 1)], ids=str
)
def test_rtrl_goes_on_from_its_state_as_if_the_pieces_were_one(influence, count, x64):
    problem = make_problem(17)
    layers = stack_of(problem, make_problem(18, inputs=3))
    params, h0 = (layers, (problem.h0, 2 * problem.h0)) if count > 1 else (layers[0], problem.h0)

    def run(first, last, **start):
        xs, targets, mask, resets = (
            v[first:last] for v in (problem.xs, problem.cotangents[1], problem.mask, problem.resets)
        )
        return diagnostics.rtrl(
            lambda y, target: ((y - target) ** 2).sum(), params, xs, targets, **start,
            mask=mask, resets=resets, influence=influence,
        )  # fmt: skip

    @jax.jit
    def in_pieces():
        parts = [run(0, 0, h0=h0)]  # no step: the state to start from
        for first, last in ((0, 1), (1, 4), (4, 7)):
            parts.append(run(first, last, state=parts[-1].state))
        sums = [
            sum(values[1:], values[0]) for values in zip(*(jax.tree.leaves(p[:2]) for p in parts))
        ]
        return sums, parts[-1].state, parts[-2].state

    whole, (sums, state, before) = jax.jit(lambda: run(0, 7, h0=h0))(), in_pieces()
    assert_close(sums, jax.tree.leaves(whole[:2]), 1e-13)
    assert_close(state, whole.state, 1e-14)
    assert all(v.any() for v in jax.tree.leaves(before))


def test_rtrl_after_an_update_follows_the_derivatives_that_it_was_given(x64):
    """dL/dh of the later steps at the new parameters, times dh/dtheta of the earlier ones."""
    problem = make_problem(19)
    old, new = problem.params, jax.tree.map(lambda v: 0.9 * v, problem.params)
    xs, targets = problem.xs, problem.cotangents[1]

    def squared(y, target):
        return ((y - target) ** 2).sum()

    @jax.jit
    def online():
        state = diagnostics.rtrl(squared, old, xs[:3], targets[:3], problem.h0).state
        return diagnostics.rtrl(squared, new, xs[3:], targets[3:], state=state)[:2]

    def later(params, h):
        return squared(jaxgru.gru(params, xs[3:], h, gradient="autodiff")[1], targets[3:])

    @jax.jit
    def by_autodiff():
        h, pull = jax.vjp(lambda p: jaxgru.gru(p, xs[:3], problem.h0, gradient="autodiff")[0], old)
        loss, (direct, dh) = jax.value_and_grad(later, (0, 1))(new, h)
        return loss, jax.tree.map(jnp.add, direct, pull(dh)[0])

    (loss, grads), wanted = online(), by_autodiff()
    assert_close((loss, grads), wanted, 1e-12)


# Derivatives of the diagnostics themselves.


def zeros_in_everything(problem, params):
    """Results where some gradients are zero vectors; gradients of integers and gates are left out.

    h0 is zero, one sequence is masked throughout, and the loss reads one unit of the last state.
    """
    flags, last = options_of(problem), lambda h_last, hs: h_last[..., 0].sum()
    loss, flow = diagnostics.gradient_flow(last, params, problem.xs, **flags)
    dhs = jnp.zeros_like(problem.cotangents[1])
    jacobians = diagnostics.sequence_jacobians(params, problem.xs, **flags)
    step = (params, problem.xs[0], jnp.zeros_like(problem.h0))
    return {
        "gradient_flow": (loss, flow),
        "gradient_paths": diagnostics.gradient_paths(params, problem.xs, dhs, **flags),
        "example_gradient_norms": diagnostics.example_gradient_norms(
            last, params, problem.xs, **flags
        ),
        "gate_values": diagnostics.gate_values(params, problem.xs, **flags),
        "gate_statistics": diagnostics.gate_statistics(params, problem.xs, **flags),
        "step_jacobian": diagnostics.step_jacobian(*step),
        "step_jacobian_diagonal": diagnostics.step_jacobian_diagonal(*step),
        "step_jacobian_bound": diagnostics.step_jacobian_bound(*step),
        "sequence_jacobians": jacobians,
        "jacobian_products": diagnostics.jacobian_products(jacobians),
        "singular_values": diagnostics.singular_values(jacobians),
        "lyapunov_exponents": diagnostics.lyapunov_exponents(
            diagnostics.sequence_jacobians(params, problem.xs, mask=problem.mask),
            problem.mask.at[0].set(True),
        ),
    }


def test_diagnostics_have_finite_gradients_where_what_they_measure_is_zero(x64):
    problem = make_problem(21)

    def weighted(v):
        return jnp.vdot(jnp.cos(jnp.arange(v.size, dtype=v.dtype)), v)

    def total(params):
        found = zeros_in_everything(problem, params)
        return {name: sum(map(weighted, jax.tree.leaves(found[name]))) for name in found}

    direction = jax.tree.map(jnp.cos, problem.params)
    moved = jax.jit(
        lambda s: total(jax.tree.map(lambda p, d: p + s * d, problem.params, direction))
    )
    for name, grads in jax.jit(jax.jacrev(total))(problem.params).items():
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(grads)), name
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(direction))
        got = sum(jnp.vdot(g, d) for g, d in pairs)
        quotient = (moved(1e-5)[name] - moved(-1e-5)[name]) / 2e-5
        np.testing.assert_allclose(got, quotient, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("function", ["singular_values", "lyapunov_exponents"])
def test_decompositions_have_autodiffs_derivatives(function, x64):
    """JAX differentiates its own decompositions; masked steps are taken out of the reference."""
    jacobians = jnp.asarray(np.random.default_rng(3).normal(size=(5, 3, 3)))
    valid = jnp.array([True, False, True, True, False])

    def plain(jacobians):
        if function == "singular_values":
            return jnp.linalg.svd(jacobians, compute_uv=False)
        q, total = jnp.eye(3), jnp.zeros(3)
        for t in (0, 2, 3):
            q, r = jnp.linalg.qr(jacobians[t] @ q)
            total += jnp.log(jnp.abs(jnp.diagonal(r))) / 3
        return jnp.sort(total, descending=True)

    def own(jacobians):
        mask = () if function == "singular_values" else (valid,)
        return getattr(diagnostics, function)(jacobians, *mask)

    wanted = jax.jit(jax.jacrev(plain))(jacobians)
    assert_close(jax.jit(jax.jacrev(own))(jacobians), wanted, 1e-12)
    assert_close(jax.jit(jax.jacfwd(own))(jacobians), wanted, 1e-12)


# Errors.


PARAMS = make_problem(0, dtype=jnp.float32).params
PAIR = Bidirectional(PARAMS, PARAMS)
LAYERS = (PARAMS, make_problem(1, inputs=3, dtype=jnp.float32).params)
SCALED = make_problem(0, dtype=jnp.float32, layer_norm=True).params
BROKEN = (
    dataclasses.replace(LAYERS[0], w_h=np.asarray(LAYERS[0].w_h).copy()),
    dataclasses.replace(LAYERS[1], b_x=np.asarray(LAYERS[1].b_x).copy()),
)
BROKEN[0].w_h[2, 8], BROKEN[1].b_x[1] = np.nan, -np.inf
XS = jnp.ones((5, 4, 2))
EYES = jnp.asarray(np.stack([np.eye(3, dtype=np.float32)] * 2))


def state_of():
    return diagnostics.rtrl(lambda y, t: y.sum(), PARAMS, XS[:0], XS[:0]).state


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (ValueError, "gradient_flow: loss_fn must return a scalar, got shape (5, 4, 3); take its "
                     "sum or mean.",
         lambda: diagnostics.gradient_flow(lambda h, ys: ys, PARAMS, XS)),
        (TypeError, "gradient_flow: loss_fn must return one scalar, got tuple; return the loss "
                    "alone.",
         lambda: diagnostics.gradient_flow(lambda h, ys: (ys.sum(), 1), PARAMS, XS)),
        (TypeError, "gradient_flow: loss_fn must return a floating number, got dtype int32, "
                    "which has no gradient; cast with .astype before the operation that makes it "
                    "integral.",
         lambda: diagnostics.gradient_flow(lambda h, ys: (ys > 0).sum(), PARAMS, XS)),
        (TypeError, "example_gradient_norms: loss_fn must be callable, got int.",
         lambda: diagnostics.example_gradient_norms(3, PARAMS, XS)),
        (TypeError, "gradient_flow: xs must be a floating array, got dtype int32; cast it first.",
         lambda: diagnostics.gradient_flow(squares, PARAMS, jnp.ones((5, 4, 2), int))),
        (ValueError, "gate_statistics: xs[1, 2, 0] must be finite, got nan; mask such steps "
                     "or replace the entry.",
         lambda: diagnostics.gate_statistics(PARAMS, XS.at[1, 2, 0].set(jnp.nan))),
        (ValueError, "gate_values: params.w_h[0, 0] must be finite, got inf; replace "
                     "the entry.",
         lambda: diagnostics.gate_values(
             dataclasses.replace(PARAMS, w_h=np.full((3, 9), np.inf, np.float32)), XS)),
        (ValueError, "rtrl: params must hold layers of one direction, got a Bidirectional, whose "
                     "outputs depend on later inputs; use jax.grad of gru_stack.",
         lambda: diagnostics.rtrl(squares, PAIR, XS, XS)),
        (ValueError, "rtrl: params must be one layer without layer norm for influence='snap-1', "
                     "got 2 layers, where every parameter moves many units at once; use "
                     "influence='exact'.",
         lambda: diagnostics.rtrl(lambda y, t: y.sum(), LAYERS, XS, XS, influence="snap-1")),
        (ValueError, "rtrl: params must be one layer without layer norm for influence='snap-1', "
                     "got a layer with layer norm, where every parameter moves many units at "
                     "once; use influence='exact'.",
         lambda: diagnostics.rtrl(lambda y, t: y.sum(), SCALED, XS, XS, influence="snap-1")),
        (ValueError, "rtrl: influence must be one of 'exact', 'snap-1', got 'rough'.",
         lambda: diagnostics.rtrl(squares, PARAMS, XS, XS, influence="rough")),
        (ValueError, "rtrl: loss_fn must return a scalar, got shape (4, 3); take its sum or mean.",
         lambda: diagnostics.rtrl(lambda y, t: y, PARAMS, XS, XS)),
        (ValueError, "rtrl: targets must be arrays of 5 steps, as xs, got (4, 4, 2).",
         lambda: diagnostics.rtrl(lambda y, t: y.sum(), PARAMS, XS, XS[1:])),
        (ValueError, "sequence_jacobians: params must hold layers of one direction, got a "
                     "Bidirectional; pass its forward and, with reverse=True, its backward "
                     "separately.",
         lambda: diagnostics.sequence_jacobians(PAIR, XS)),
        (TypeError, "gate_values: params must be a sequence of layers, GRUParams or "
                    "Bidirectional, got str.",
         lambda: diagnostics.gate_values("layers", XS)),
        (ValueError, "rtrl: h0 must have shape (4, 3) (the batch axes of xs, then H=3, the rows of "
                     "params.w_h), got (5, 3).",
         lambda: diagnostics.rtrl(squares, PARAMS, XS, XS, jnp.ones((5, 3)))),
        (TypeError, "rtrl: h0 must have the dtype of the parameters, float32, got float16; "
                    "cast one of them.",
         lambda: diagnostics.rtrl(squares, PARAMS, XS, XS, jnp.ones((4, 3), jnp.float16))),
        (TypeError, "gradient_paths: params must be one GRUParams, got tuple; pass each "
                    "layer of a stack with its own input and tap.",
         lambda: diagnostics.gradient_paths(LAYERS, XS, XS)),
        (ValueError, "gru_bidirectional: tap must be a pair of taps, forward and backward, got "
                     "one Tap; init_taps(params, lead_shape) has the form.",
         lambda: jaxgru.gru_bidirectional(PAIR, XS, tap=jaxgru.init_taps(PARAMS, (5, 4)))),
        (TypeError, "gru_stack: tap[0] must be a Tap of two arrays, got str; init_taps makes one.",
         lambda: jaxgru.gru_stack((PARAMS,), XS, tap=["a"])),
        (ValueError, "gru_stack: tap[0] must be one Tap, as params[0] has one direction, got 2 of "
                     "them; init_taps(params, lead_shape) has the form.",
         lambda: jaxgru.gru_stack((PARAMS,), XS, tap=[["a", "b"]])),
        (TypeError, "gradient_paths: reverse must be a bool, got 1.",
         lambda: diagnostics.gradient_paths(PARAMS, XS, XS, reverse=1)),
        (TypeError, "sequence_jacobians: reverse must be a bool, got 'no'.",
         lambda: diagnostics.sequence_jacobians(PARAMS, XS, reverse="no")),
        (ValueError, "gradient_paths: dhs must have shape (5, 4, 3) (that of hs), got (5, 4, 2).",
         lambda: diagnostics.gradient_paths(PARAMS, XS, XS)),
        (ValueError, "gate_statistics: low and high must satisfy 0 <= low < high <= 1, got 0.9, "
                     "0.1.",
         lambda: diagnostics.gate_statistics(PARAMS, XS, low=0.9, high=0.1)),
        (ValueError, "credit_reach: fraction must be positive and finite, got 0.",
         lambda: diagnostics.credit_reach(jnp.ones(3), 0)),
        (ValueError, "credit_reach: fraction must be positive and finite, got inf.",
         lambda: diagnostics.credit_reach(jnp.ones(3), float("inf"))),
        (ValueError, "credit_reach: norms must have shape [T, ...] with T>0, got (0, 3).",
         lambda: diagnostics.credit_reach(jnp.ones((0, 3)))),
        (ValueError, "credit_reach: norms must have shape [T, ...] with T>0, got ().",
         lambda: diagnostics.credit_reach(jnp.ones(()))),
        (TypeError, "credit_reach: norms must be an array, got list; convert it with jnp.asarray.",
         lambda: diagnostics.credit_reach([1.0])),
        (ValueError, "credit_reach: mask must have shape (3,) (that of norms), got (2,).",
         lambda: diagnostics.credit_reach(jnp.ones(3), mask=jnp.ones(2, bool))),
        (TypeError, "gradient_paths: dhs must be an array, got list; convert it with jnp.asarray.",
         lambda: diagnostics.gradient_paths(PARAMS, XS, [1.0])),
        (ValueError, "gate_statistics: low and high must satisfy 0 <= low < high <= 1, got 0.5, "
                     "0.5.",
         lambda: diagnostics.gate_statistics(PARAMS, XS, low=0.5, high=0.5)),
        (ValueError, "gate_statistics: low and high must satisfy 0 <= low < high <= 1, got -0.1, "
                     "0.9.",
         lambda: diagnostics.gate_statistics(PARAMS, XS, low=-0.1)),
        (ValueError, "gate_statistics: low and high must satisfy 0 <= low < high <= 1, got 0.1, "
                     "1.1.",
         lambda: diagnostics.gate_statistics(PARAMS, XS, high=1.1)),
        (ValueError, "gate_values: params[0].w_h[2, 8] must be finite, got nan; "
                     "replace the entry.",
         lambda: diagnostics.gate_values(BROKEN, XS)),
        (ValueError, "gate_values: h0[0, 0] must be finite, got inf; replace the entry.",
         lambda: diagnostics.gate_values(PARAMS, XS, np.full((4, 3), np.inf, np.float32))),
        (ValueError, "gradient_paths: h0[0, 0] must be finite, got nan; replace the entry.",
         lambda: diagnostics.gradient_paths(PARAMS, XS, XS, np.full((4, 3), np.nan, np.float32))),
        (ValueError, "example_gradient_norms: loss_fn must return a scalar, got shape (5, 4, 3); "
                     "take its sum or mean.",
         lambda: diagnostics.example_gradient_norms(lambda h, ys: ys, PARAMS, XS)),
        (ValueError, "gradient_flow: xs[0, 0, 0] must be finite, got inf; mask such steps "
                     "or replace the entry.",
         lambda: diagnostics.gradient_flow(squares, PARAMS, XS * np.float32(np.inf))),
        (ValueError, "sequence_jacobians: xs[0, 0, 0] must be finite, got inf; mask such "
                     "steps or replace the entry.",
         lambda: diagnostics.sequence_jacobians(PARAMS, XS * np.float32(np.inf))),
        (ValueError, "rtrl: xs[0, 0, 0] must be finite, got inf; mask such steps or replace "
                     "the entry.",
         lambda: diagnostics.rtrl(squares, PARAMS, XS * np.float32(np.inf), XS)),
        (ValueError, "gate_values: mask must have shape (5, 4) (xs without its last axis), got "
                     "(5, 3).",
         lambda: diagnostics.gate_values(PARAMS, XS, mask=jnp.ones((5, 3), bool))),
        (ValueError, "gate_values: resets must have shape (5, 4) (xs without its last axis), got "
                     "(5, 3).",
         lambda: diagnostics.gate_values(PARAMS, XS, resets=jnp.ones((5, 3), bool))),
        (ValueError, "lyapunov_exponents: mask must have shape (2,) (jacobians without its last "
                     "two axes), got (3,).",
         lambda: diagnostics.lyapunov_exponents(EYES, jnp.ones(3, bool))),
        (ValueError, "lyapunov_exponents: jacobians must have shape [T, ..., H, H], got (3, 3).",
         lambda: diagnostics.lyapunov_exponents(EYES[0])),
        (TypeError, "singular_values: jacobians must be an array, got list; convert it with "
                    "jnp.asarray.",
         lambda: diagnostics.singular_values([1.0])),
        (ValueError, "singular_values: jacobians must have shape [..., H, H], got (3,).",
         lambda: diagnostics.singular_values(jnp.ones(3))),
        (ValueError, "jacobian_products: jacobians must have shape [T, ..., H, H], got (3, 3).",
         lambda: diagnostics.jacobian_products(jnp.eye(3))),
        (ValueError, "singular_values: jacobians must have shape [..., H, H], got (2, 3).",
         lambda: diagnostics.singular_values(jnp.ones((2, 3)))),
        (TypeError, "lyapunov_exponents: mask must be a bool array, got float32; "
                    "length_mask makes one from lengths.",
         lambda: diagnostics.lyapunov_exponents(EYES, jnp.ones(2))),
        (ValueError, "step_jacobian: h must have shape (4, 3) (the batch axes of x, then H=3, the "
                     "rows of params.w_h), got (4, 2).",
         lambda: diagnostics.step_jacobian(PARAMS, XS[0], XS[0])),
        (ValueError, "step_jacobian_diagonal: x must have shape [..., I] with I=2 (rows of "
                     "params.w_x), got (4, 3).",
         lambda: diagnostics.step_jacobian_diagonal(PARAMS, jnp.ones((4, 3)), jnp.ones((4, 3)))),
        (TypeError, "step_jacobian_bound: h must be an array, got NoneType; convert it with "
                    "jnp.asarray.",
         lambda: diagnostics.step_jacobian_bound(PARAMS, XS[0], None)),
        (TypeError, "step_jacobian: params must be a GRUParams, got tuple; pass one layer, such "
                    "as params[0], or run a stack by gru_stack.",
         lambda: diagnostics.step_jacobian(LAYERS, XS[0], XS[0])),
        (TypeError, "rtrl: state must be the RTRLState of an earlier call, got ArrayImpl.",
         lambda: diagnostics.rtrl(squares, PARAMS, XS, XS, state=jnp.ones((4, 3)))),
        (ValueError, "rtrl: h0 must be None with a state, which holds h, got both.",
         lambda: diagnostics.rtrl(squares, PARAMS, XS, XS, jnp.ones((4, 3)), state=state_of())),
        (ValueError, "rtrl: state must be that of a call with the same layers, batch axes, dtype "
                     "and influence, got float32[4, 3] in place of float32[3]; pass state=None to "
                     "start a sequence.",
         lambda: diagnostics.rtrl(squares, PARAMS, XS[:, 0], XS[:, 0], state=state_of())),
        (ValueError, "rtrl: state must be that of a call with the same layers, batch axes, dtype "
                     "and influence, got another form; pass state=None to start a sequence.",
         lambda: diagnostics.rtrl(squares, PARAMS, XS, XS, influence="snap-1", state=state_of())),
        (TypeError, "gru: tap must be a Tap of two arrays, got ArrayImpl; init_taps makes one.",
         lambda: jaxgru.gru(PARAMS, XS, tap=XS)),
        (ValueError, "gru: tap.hs must have shape (5, 4, 3) (as hs), got (5, 4, 2); "
                     "init_taps(params, xs.shape[:-1]) makes it.",
         lambda: jaxgru.gru(PARAMS, XS, tap=Tap(None, XS))),
        (ValueError, "gru_stack: tap must be a sequence of 1 taps, one for each layer, got one "
                     "Tap; pass (tap,).",
         lambda: jaxgru.gru_stack((PARAMS,), XS, tap=jaxgru.init_taps(PARAMS, (5, 4)))),
        (ValueError, "gru_bidirectional: tap must be a pair of taps, forward and backward, got 1 "
                     "of them; init_taps(params, lead_shape) has the form.",
         lambda: jaxgru.gru_bidirectional(PAIR, XS, tap=[1])),
        (TypeError, "init_taps: lead_shape must be a sequence of sizes, xs.shape[:-1], got int.",
         lambda: jaxgru.init_taps(PARAMS, 5)),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_its_cure(kind, message, call):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).partition("\n")[0] == message  # JAX adds lines to what it traces


def test_readme_names_every_function():
    readme = pathlib.Path(diagnostics.__file__).with_name("README.md").read_text()
    for name in diagnostics.__all__:
        assert not inspect.isfunction(getattr(diagnostics, name)) or f"`{name}`" in readme, name


def test_nan_on_masked_steps_is_legal(x64, uncompiled):
    problem = make_problem(16)
    xs = np.where(problem.mask[..., None], problem.xs, np.nan)
    options = {"mask": problem.mask, "resets": problem.resets}
    got = diagnostics.gate_statistics(problem.params, jnp.asarray(xs), **options)
    assert_close(got, diagnostics.gate_statistics(problem.params, problem.xs, **options), 1e-14)
    assert all(np.isfinite(v).all() for v in got)


def test_decompositions_of_a_batch_are_made_one_by_one_on_a_cpu(optimized):
    """Two batched ones in a program can wait for each other's threads for ever."""
    jacobians = jnp.ones((5, 4, 3, 3))

    def observe(jacobians):
        return diagnostics.singular_values(jacobians), diagnostics.lyapunov_exponents(jacobians)

    def total(jacobians):
        return sum(v.sum() for v in observe(jacobians))

    text = jax.jit(observe).lower(jacobians).compile().as_text()
    text += jax.jit(jax.grad(total)).lower(jacobians).compile().as_text()
    text += jax.jit(jax.vmap(observe, 2, 2)).lower(jacobians[:, :, None]).compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="lapack' in line]
    assert len(calls) >= 8
    for call in calls:
        shapes = re.findall(r"f32\[([\d,]*)\]", call.split("metadata=")[0])
        assert all(not shape.startswith(("20,", "4,", "5,")) for shape in shapes), call
