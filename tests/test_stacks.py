"""Stacks, directions, dropout, streams: against the oracle, autodiff, and each other."""

import dataclasses
import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import assert_close, flat, grouped

import jaxgru
from jaxgru import (
    BPTT,
    CHO_2014,
    PYTORCH,
    Autodiff,
    Bidirectional,
    Dropout,
    GRUParams,
    Noise,
    Tangent,
    gru,
    gru_bidirectional,
    gru_cell,
    init_gru,
    init_stack,
    init_state,
    length_mask,
    models,
    resets_from_dones,
)
from jaxgru.core.noise import require_noise
from jaxgru.core.parameters import require_params
from jaxgru.core.recurrence import run_gru

gru_stack = flat(jaxgru.gru_stack)
gru_stack_cell = flat(jaxgru.gru_stack_cell)

EXACT = 1e-11  # float64, relative to the largest entry of a leaf
in_float64 = pytest.mark.usefixtures("x64")
slow = pytest.mark.slow
T, B, INPUTS, H = 4, 2, 2, 3
KEY = 11
KINDS = {
    "none": {},
    "input": {"input_dropout": 0.4},
    "between": {"dropout": 0.4},
    "variational": {"input_dropout": 0.3, "dropout": 0.4, "variational": True},
    "recurrent": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "all": {
        "input_dropout": 0.2,
        "dropout": 0.3,
        "output_dropout": 0.3,
        "recurrent_dropout": 0.3,
        "zoneout": 0.2,
    },
}
AUTODIFF = {"gradient": "autodiff"}
POLICIES = [{}, {"residuals": "states", "chunk_size": 2}, {"residuals": "boundaries"}]


def make_stack(num_layers=2, bidirectional=False, dtype=jnp.float64, **options):
    """Layers with random biases, and with layer-norm scales if they are asked for."""
    key = jax.random.key(num_layers)
    layers = init_stack(
        key,
        INPUTS,
        H,
        num_layers,
        bidirectional=bidirectional,
        scheme="pytorch",
        dtype=dtype,
        **options,
    )

    def spread(v):  # so that layer-norm scales differ too
        factors = jnp.linspace(0.8, 1.2, v.shape[-1], dtype=dtype)
        return v * factors.reshape((1,) * (v.ndim - 1) + factors.shape)

    return jax.tree.map(spread, layers)


def make_data(layers, seed=0, dtype=jnp.float64, steps=T):
    """xs, h0, a mask with a gap and a late end, resets on valid and on masked steps."""
    keys = jax.random.split(jax.random.key(seed), 4)
    mask = jnp.array([[1, 0, 1, 1], [0, 1, 1, 0]], bool).T
    resets = jnp.array([[0, 0, 1, 0], [0, 0, 1, 1]], bool).T
    mask, resets = (jnp.resize(flags, (steps, B)) for flags in (mask, resets))
    xs = jax.random.normal(keys[0], (steps, B, INPUTS), dtype)
    zeros, treedef = jax.tree.flatten(init_state(layers, (B,)))
    starts = jax.random.split(keys[1], len(zeros))
    h0 = treedef.unflatten(
        [jax.random.normal(k, h.shape, dtype) for k, h in zip(starts, zeros, strict=True)]
    )
    return xs, h0, mask, resets


def make_cotangents(outputs):
    leaves, treedef = jax.tree.flatten(outputs)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return treedef.unflatten([jax.random.normal(k, v.shape, v.dtype) for k, v in zip(keys, leaves)])


def draw(key, rate, shape):
    """0 with probability rate, else 1 / (1 - rate)."""
    return np.asarray(jax.random.bernoulli(key, 1 - rate, shape)) / (1 - rate)


def draw_steps(key, rate, shape, variational=False):
    """The same for each of T steps from the key and the step's number, or once for all."""
    if variational:
        return draw(key, rate, (1, *shape))
    return np.stack([draw(jax.random.fold_in(key, t), rate, shape) for t in range(T)])


def draw_noise(layers, key, rates):
    """What each key draws, as the oracle wants it: from one key to each layer's and direction's."""
    keys, noise = jax.random.split(key, 2 * len(layers) + 1), []
    for number, layer in enumerate(layers):
        rate = rates.get("dropout" if number else "input_dropout", 0.0)
        width = oracle.directions(layer)[0].w_x.shape[0]
        shared = rates.get("variational", False)
        factor = draw_steps(keys[2 * number], rate, (B, width), shared) if rate else None
        sides = oracle.directions(layer)
        side_keys = [keys[2 * number + 1]]
        side_keys = jax.random.split(side_keys[0]) if len(sides) == 2 else side_keys
        drawn = []
        for side_key in side_keys:
            scale_key, zoneout_key = jax.random.split(side_key)
            rate, zoned_out = rates.get("recurrent_dropout", 0.0), rates.get("zoneout", 0.0)
            scale = draw(scale_key, rate, (B, H)) if rate else None
            zoneout = np.zeros((T, B, H))
            for t in range(T) if zoned_out else ():
                step_key = jax.random.fold_in(zoneout_key, t)
                zoneout[t] = 1 - np.asarray(jax.random.bernoulli(step_key, 1 - zoned_out, (B, H)))
            drawn.append((scale, zoneout))
        noise.append((factor, drawn))
    return noise


def oracle_pullback(layers, data, spec, rates, merge="concat", residual=False):
    """Values and cotangents of layers, xs and h0 by the NumPy oracle."""
    xs, h0, mask, resets = data
    mask, resets = (None if v is None else np.asarray(v) for v in (mask, resets))
    noise = draw_noise(layers, jax.random.key(KEY), rates)
    equation = oracle.Equation(*dataclasses.astuple(spec))
    choices = (merge, residual, noise)
    last, ys, tape = oracle.stack_forward(layers, equation, xs, h0, mask, resets, *choices)
    output_key = jax.random.split(jax.random.key(KEY), 2 * len(layers) + 1)[-1]
    ys_factor = draw_steps(output_key, rates.get("output_dropout", 0.0), ys.shape[1:])
    ys = ys * ys_factor
    dlast, dys = make_cotangents((last, ys))
    dys = np.asarray(dys) * ys_factor
    dlayers, dxs, dh0 = oracle.stack_backward(layers, equation, tape, dlast, dys, *choices)

    def as_params(arrays):
        if isinstance(arrays, tuple) and len(arrays) == 2:
            return Bidirectional(*map(as_params, arrays))
        return GRUParams(*arrays, spec=CHO_2014)

    def as_states(states):
        return tuple(Bidirectional(*h) if isinstance(h, tuple) else h for h in states)

    return (as_states(last), ys), (tuple(map(as_params, dlayers)), dxs, as_states(dh0))


def pullback(layers, data, spec, **options):
    """The same by `gru_stack`."""
    xs, h0, mask, resets = data

    def run(layers, xs, h0):
        return gru_stack(
            layers, xs, h0, mask=mask, resets=resets, spec=spec, key=jax.random.key(KEY), **options
        )

    @jax.jit
    def values_and_gradient(layers, xs, h0):
        out, vjp = jax.vjp(run, layers, xs, h0)
        return out, vjp(make_cotangents(out))

    return values_and_gradient(layers, xs, h0)


# Values and gradients.


# Sizes, directions and kinds of noise in full; of policies and flags one each. The digits are for
# one layer one way and both ways, then two layers; a search found them: every two options meet.
CHOICES = {  # kind -> its policies, its flags
    "none": ("3201", "3102"),
    "input": ("0132", "3012"),
    "between": ("1302", "3210"),
    "variational": ("0321", "3201"),
    "recurrent": ("1032", "0123"),
    "zoneout": ("2031", "0231"),
    "all": ("1023", "1320"),
}
CASES = [
    (num_layers, bidirectional, kind,
     *(int(row[2 * (num_layers % 2) + bidirectional]) for row in rows))
    for num_layers in (1, 2, 3)
    for bidirectional in (False, True)
    for kind, rows in CHOICES.items()
]  # fmt: skip


@in_float64
@pytest.mark.parametrize(
    ("num_layers", "bidirectional", "kind", "policy", "flags"),
    [pytest.param(*case, marks=() if case[0] == 2 else slow) for case in CASES],
    ids=lambda v: {False: "one_way", True: "both_ways"}[v] if isinstance(v, bool) else None,
)
def test_stack_has_the_oracles_values_and_gradients_under_every_policy(
    num_layers, bidirectional, kind, policy, flags
):
    """With and without a mask and resets."""
    layers = make_stack(num_layers, bidirectional)
    xs, h0, mask, resets = make_data(layers)
    spec = PYTORCH if num_layers == 2 else CHO_2014
    data = (xs, h0, mask if flags % 2 else None, resets if flags > 1 else None)
    wanted = oracle_pullback(layers, data, spec, KINDS[kind])
    got = pullback(layers, data, spec, **KINDS[kind], **(AUTODIFF, *POLICIES)[policy])
    assert_close(got, wanted, EXACT)


def test_cases_of_stacks_hold_every_pair_of_options():
    """Those of one and two layers alone, too."""
    for cases in (CASES, [case for case in CASES if case[0] < 3]):
        for one, other in itertools.combinations(zip(*cases), 2):
            assert len(set(zip(one, other))) == len(set(one)) * len(set(other))


@in_float64
@pytest.mark.parametrize(
    ("bidirectional", "choices"),
    [
        (False, {"residual": True}),
        pytest.param(True, {"merge": "sum"}, marks=slow),
        (True, {"merge": "sum", "residual": True}),
        pytest.param(True, {"merge": "concat", "residual": True}, marks=slow),
    ],
    ids=str,
)
def test_merged_and_residual_stacks_have_the_oracles_values_and_gradients(bidirectional, choices):
    merge = choices.get("merge", "concat")
    layers = make_stack(3, bidirectional, merge=merge)
    data = make_data(layers)
    wanted = oracle_pullback(layers, data, CHO_2014, KINDS["between"], **choices)
    for policy in (AUTODIFF, {}):
        got = pullback(layers, data, CHO_2014, **KINDS["between"], **policy, **choices)
        assert_close(got, wanted, EXACT, f"{policy}")


@in_float64
@pytest.mark.parametrize(
    ("spec", "bidirectional"),
    [
        pytest.param(CHO_2014, False, id="before-one_way"),
        pytest.param(CHO_2014, True, id="before-both_ways", marks=slow),
        pytest.param(PYTORCH, False, id="after-one_way", marks=slow),
        pytest.param(PYTORCH, True, id="after-both_ways"),
    ],
)
def test_normalized_stack_has_the_oracles_values_and_gradients(spec, bidirectional):
    layers = make_stack(2, bidirectional, layer_norm=True)
    data = make_data(layers)
    wanted = oracle_pullback(layers, data, spec, KINDS["all"])
    sides = [side for layer in wanted[1][0] for side in oracle.directions(layer)]
    assert all(np.abs(g).max() > 1e-3 for side in sides for g in (side.g_x, side.g_h))
    # Every other one, so that each meets both equations and both counts of directions.
    every = (AUTODIFF, *POLICIES, {"gradient": "tangent"})
    for policy in every[(spec == PYTORCH) ^ bidirectional :: 2]:
        got = pullback(layers, data, spec, **KINDS["all"], **policy)
        assert_close(got, wanted, EXACT, f"{policy}")


@slow
@pytest.mark.usefixtures("x64", "optimized")
def test_compiled_stack_is_the_oracles():
    layers = make_stack(2, True, layer_norm=True)
    data = make_data(layers)
    compiled = pullback(layers, data, CHO_2014, **KINDS["all"])
    assert_close(compiled, oracle_pullback(layers, data, CHO_2014, KINDS["all"]), EXACT)


@in_float64
def test_tangent_rule_pushes_a_stack_forward():
    """jvp along a direction, through dropout and zoneout, against the transposed rule."""
    layers = make_stack(2, True, layer_norm=True)
    xs, h0, mask, resets = make_data(layers)
    options = {"mask": mask, "resets": resets, "key": jax.random.key(1), **KINDS["all"]}

    def run(gradient, layers, xs):
        return gru_stack(layers, xs, h0, gradient=gradient, **options)[1]

    tangents = jax.tree.map(jnp.cos, (layers, xs))

    @jax.jit
    def both():
        ys, tys = jax.jvp(functools.partial(run, "tangent"), (layers, xs), tangents)
        cotangents = jax.vjp(functools.partial(run, "bptt"), layers, xs)[1](jnp.sin(ys))
        return jnp.sum(tys * jnp.sin(ys)), cotangents

    forward, cotangents = both()
    backward = sum(
        jnp.sum(d * t) for d, t in zip(jax.tree.leaves(cotangents), jax.tree.leaves(tangents))
    )
    assert abs(forward) > 1e-3
    np.testing.assert_allclose(forward, backward, rtol=EXACT)


# Masks and resets.


@in_float64
def test_content_of_padding_changes_no_value_and_no_gradient():
    """NaN and infinity where nothing is real: every layer and direction, dropout, layer norm."""
    layers = make_stack(2, True, layer_norm=True)
    xs, h0, mask, resets = make_data(layers)

    @jax.jit
    def run(xs):
        def loss(layers, xs, h0):
            options = {"mask": mask, "resets": resets, "key": jax.random.key(1), **KINDS["all"]}
            h_last, ys = gru_stack(layers, xs, h0, **options)
            return sum(jnp.sum(jnp.sin(v)) for v in (ys, *jax.tree.leaves(h_last)))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(layers, xs, h0)

    clean = run(xs)
    for poison in (jnp.nan, jnp.inf):
        poisoned = run(jnp.where(mask[..., None], xs, poison))
        jax.tree.map(np.testing.assert_array_equal, poisoned, clean)


@in_float64
def test_padded_row_is_the_row_alone():
    """Values and gradients of each row are the same alone, in both directions, truncated too."""
    layers = make_stack(2, True)
    xs, h0, _, _ = make_data(layers, steps=7)
    lengths = [3, 5]

    def run(layers, xs, h0, mask=None):
        def last(layers, xs, h0):
            h_last, ys = gru_stack(layers, xs, h0, mask=mask, truncate=2)
            ys = ys if mask is None else jnp.where(mask[..., None], ys, 0.0)
            return jnp.sum(jnp.sin(ys)) + sum(jnp.sum(h**2) for h in jax.tree.leaves(h_last))

        return jax.value_and_grad(last, (0, 1, 2))(layers, xs, h0)

    total, (dlayers, dxs, dh0) = jax.jit(run)(layers, xs, h0, length_mask(lengths, 7))
    parts = []
    for row, length in enumerate(lengths):
        of_row = functools.partial(jax.tree.map, lambda h, row=row: h[row])
        value, grads = jax.jit(run)(layers, xs[:length, row], of_row(h0))
        assert_close((dxs[:length, row], of_row(dh0)), grads[1:], EXACT)
        parts.append((value, grads[0]))
    assert_close((total, dlayers), jax.tree.map(jnp.add, *parts), EXACT)


@in_float64
def test_reset_makes_two_sequences_of_one_in_both_directions():
    layers = make_stack(2, True)
    xs, h0, _, _ = make_data(layers, steps=5)
    resets = jnp.zeros((5, B), bool).at[2].set(True)
    h_last, ys = jax.jit(gru_stack)(layers, xs, h0, resets=resets)
    zeros = init_state(layers, (B,))
    first = [(forward, zero) for (forward, _), (_, zero) in zip(h0, zeros)]
    second = [(zero, backward) for (zero, _), (_, backward) in zip(zeros, h0)]
    early, ys_early = jax.jit(gru_stack)(layers, xs[:2], first)
    late, ys_late = jax.jit(gru_stack)(layers, xs[2:], second)
    assert_close(ys, jnp.concatenate([ys_early, ys_late]), EXACT)
    ends = tuple(
        Bidirectional(forward, backward) for (forward, _), (_, backward) in zip(late, early)
    )
    assert_close(h_last, ends, EXACT)


@in_float64
def test_episodes_replayed_as_one_sequence_are_the_episodes_step_by_step():
    """A rollout buffer of two environments: values and gradients of acting and of replaying."""
    layers = make_stack(2)
    steps = 7
    xs, h0, _, _ = make_data(layers, steps=steps)
    dones = jnp.array([[0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0, 1]], bool).T
    done_before = jnp.array([False, True])

    def act(layers, xs, h):
        done, ys = done_before, []
        for t in range(steps):
            zeros = init_state(layers, (B,))
            h = jax.tree.map(lambda h, z, done=done: jnp.where(done[:, None], z, h), h, zeros)
            h, y = gru_stack_cell(layers, xs[t], h)
            done = dones[t]
            ys.append(y)
        return h, jnp.stack(ys)

    def replay(layers, xs, h):
        return gru_stack(layers, xs, h, resets=resets_from_dones(dones, done_before))

    def run(fn):
        out, vjp = jax.vjp(fn, layers, xs, h0)
        return out, vjp(make_cotangents(out))

    got, wanted = jax.jit(lambda: (run(replay), run(act)))()
    assert_close(got, wanted, EXACT)
    assert not np.any(got[1][2][0][1])  # the second environment started anew
    assert np.any(got[1][2][0][0])


def test_resets_follow_the_step_that_ended_an_episode():
    dones = jnp.array([[True, False], [False, False], [True, True]])
    assert resets_from_dones(dones).tolist() == [[False, False], [True, False], [False, False]]
    carried = resets_from_dones(dones, jnp.array([False, True]))
    assert carried.tolist() == [[False, True], [True, False], [False, False]]
    assert resets_from_dones(dones[:0]).shape == (0, 2)
    assert resets_from_dones(dones.T, axis=1).tolist() == resets_from_dones(dones).T.tolist()


# Streams.


def stream_options(layers, spec):
    xs, h0, mask, resets = make_data(layers, steps=7, dtype=layers[0].w_x.dtype)
    options = {"spec": spec, "residual": True, "zoneout": 0.2, "deterministic": True}
    return xs, h0, mask, resets, options


@pytest.mark.parametrize(
    ("dtype", "layer_norm"),
    [
        ("float32", False),
        pytest.param("float32", True, marks=slow),
        pytest.param("float64", False, marks=slow),
        ("float64", True),
    ],
)
def test_full_run_is_the_steps_is_the_chunks(dtype, layer_norm):
    with jax.enable_x64(dtype == "float64"):
        layers = make_stack(2, dtype=jnp.dtype(dtype), layer_norm=layer_norm)
        xs, h0, mask, resets, options = stream_options(layers, PYTORCH)
        run = jax.jit(functools.partial(gru_stack, **options))
        whole = run(layers, xs, h0, mask=mask, resets=resets)
        chunks, h = [], h0
        for start, stop in ((0, 3), (3, 4), (4, 7)):
            part = slice(start, stop)
            h, ys = run(layers, xs[part], h, mask=mask[part], resets=resets[part])
            chunks.append(ys)
        tolerance = 1e-13 if dtype == "float64" else 2e-6
        assert_close((h, jnp.concatenate(chunks)), whole, tolerance, "chunks")
        one_step = jax.jit(functools.partial(gru_stack_cell, **options))
        outputs, h = [], h0
        for t in range(7):
            h, y = one_step(layers, xs[t], h, mask=mask[t], resets=resets[t])
            outputs.append(y)
        assert_close((h, jnp.stack(outputs)), whole, tolerance, "steps")


@pytest.mark.parametrize(("dtype", "spec", "rates"), [
    (jnp.bfloat16, CHO_2014, {}),
    (jnp.float16, PYTORCH, {"dropout": 0.2, "noise": Noise(0.2, 0.2), "key": jax.random.key(1)}),
])  # fmt: skip
def test_steps_of_half_types_from_float32_states_are_the_whole_run(dtype, spec, rates):
    layers, steps = make_stack(2, dtype=dtype, spec=spec), 60
    xs, h0, mask, resets = make_data(layers, steps=steps, dtype=dtype)
    resets = resets.at[4:].set(False)
    options = {"residual": True, **rates}
    whole = jaxgru.gru_stack(layers, xs, h0, mask=mask, resets=resets, **options)[1]

    def share_that_differs(h):
        def body(h, per_step):
            t, x, *flags = per_step
            flags = dict(zip(("mask", "resets"), flags))
            return jaxgru.gru_stack_cell(layers, x, h, first_step=t, **flags, **options)

        h_last, ys = jax.lax.scan(body, h, (jnp.arange(steps), xs, mask, resets))
        assert [v.dtype for v in h_last] == [v.dtype for v in h] and ys.dtype == dtype
        return float((ys != whole).mean())

    # Sums in another order may round an entry to its neighbour.
    assert share_that_differs(tuple(h.astype(jnp.float32) for h in h0)) < 0.01
    assert share_that_differs(h0) > 0.1


def test_gradient_of_steps_of_half_types_from_float32_states():
    """The handwritten rule against JAX's own, within the rounding of bfloat16."""
    layers = make_stack(2, dtype=jnp.bfloat16)
    xs, h0, _, _ = make_data(layers, dtype=jnp.bfloat16)
    h0 = tuple(h.astype(jnp.float32) for h in h0)

    def run(gradient):
        def loss(layers, xs, h):
            for x in xs:
                h, y = jaxgru.gru_stack_cell(layers, x, h, gradient=gradient)
            return sum((h_l**2).sum() for h_l in h) + (y.astype(jnp.float32) ** 3).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(layers, xs, h0)

    got, wanted = run("bptt"), run("autodiff")
    assert [v.dtype for v in got[2]] == [jnp.float32] * 2
    assert_close(got, wanted, 2e-2)


@in_float64
def test_noise_of_chunks_and_steps_is_that_of_the_whole_run():
    """One key and the number of the first step: every kind of mask, and truncation."""
    layers = make_stack(2)
    xs, h0, mask, resets = make_data(layers, steps=7)
    options = {"key": jax.random.key(4), "truncate": 2, **KINDS["all"]}
    run = jax.jit(functools.partial(gru_stack, **options))
    whole = run(layers, xs, h0, mask=mask, resets=resets)
    chunks, h = [], h0
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        flags = {"mask": mask[start:stop], "resets": resets[start:stop]}
        h, ys = run(layers, xs[start:stop], h, first_step=start, **flags)
        chunks.append(ys)
    assert_close((h, jnp.concatenate(chunks)), whole, EXACT, "chunks")
    del options["truncate"]
    one_step = jax.jit(functools.partial(gru_stack_cell, **options))
    outputs, h = [], h0
    for t in range(7):
        flags = {"mask": mask[t], "resets": resets[t], "first_step": jnp.int32(t)}
        h, y = one_step(layers, xs[t], h, **flags)
        outputs.append(y)
    assert_close((h, jnp.stack(outputs)), whole, EXACT, "steps")


@in_float64
def test_one_step_of_a_stack_is_one_cell_after_the_other():
    layers = make_stack(2)
    xs, h0, _, _ = make_data(layers)
    below = gru_cell(layers[0], xs[0], h0[0])
    above = gru_cell(layers[1], below, h0[1])
    assert_close(gru_stack_cell(layers, xs[0], h0), ((below, above), above), EXACT)


@pytest.mark.parametrize("noisy", [False, True])
def test_steps_outside_jit_compile_once(noisy):
    """A loop of Python over a stream: the first step compiles, and no later one does."""
    layers = init_stack(jax.random.key(0), INPUTS, H, 2)
    rates = {"dropout": Dropout(0.1, 0.2, 0.3), "noise": Noise(0.2, 0.3), "key": jax.random.key(1)}
    xs, compilations = np.ones((20, B, INPUTS), np.float32), []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compilations.append(event)

    def run(h, step):
        options = rates if noisy else {}
        return jaxgru.gru_stack_cell(layers, xs[step], h, first_step=step, **options)[0]

    h = run(list(init_state(layers, (B,))), 0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for step in range(1, 20):
            h = run(h, step)
        assert not compilations
        jax.jit(lambda h: h * 3)(h[0])
        assert compilations  # the listener hears
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_initial_state_is_zeros_in_the_form_of_the_parameters():
    layers = (
        init_stack(jax.random.key(0), 2, 3, dtype=jnp.bfloat16)[0],
        init_stack(jax.random.key(0), 3, 4, bidirectional=True, dtype=jnp.bfloat16)[0],
    )
    below, (forward, backward) = init_state(layers, (5, 6))
    assert below.shape == (5, 6, 3) and forward.shape == backward.shape == (5, 6, 4)
    leaves = jax.tree.leaves(init_state(layers))
    assert all(h.dtype == jnp.bfloat16 and not np.any(h) for h in leaves)


@in_float64
@pytest.mark.parametrize(
    ("gradient", "reverse"),
    [
        ("bptt", True),
        ("tangent", False),
        *(pytest.param(gradient, reverse, marks=slow)
          for gradient, reverse in (("bptt", False), ("tangent", True))),
        *(pytest.param("autodiff", reverse, marks=slow) for reverse in (False, True)),
    ],
)  # fmt: skip
def test_truncated_gradient_is_that_of_chunks_with_a_stopped_state(reverse, gradient):
    """Against separate calls with stop_gradient between them; the values are those of one run."""
    params = make_stack(1)[0]
    steps, cut = 7, 3
    xs = jax.random.normal(jax.random.key(0), (steps, B, INPUTS))
    h0 = jax.random.normal(jax.random.key(1), (B, H))

    def truncated(params, xs, h0):
        chunks = {} if gradient != "bptt" else {"chunk_size": 2}
        options = grouped({"truncate": cut, "gradient": gradient, **chunks})
        return gru(params, xs, h0, reverse=reverse, **options)

    def stopped(params, xs, h):
        starts, hs = list(range(0, steps, cut)), {}
        for number, start in enumerate(reversed(starts) if reverse else starts):
            h = jax.lax.stop_gradient(h) if number else h
            window = xs[start : start + cut]
            h, hs[start] = gru(params, window, h, gradient="autodiff", reverse=reverse)
        return h, jnp.concatenate([hs[start] for start in starts])

    def run(fn):
        out, vjp = jax.vjp(fn, params, xs, h0)
        return out, vjp(make_cotangents(out))

    got, wanted = jax.jit(lambda: (run(truncated), run(stopped)))()
    assert_close(got, wanted, EXACT)


@in_float64
def test_gradient_truncated_beyond_the_sequence_is_the_full_one():
    layers = make_stack(2)
    xs, h0, _, _ = make_data(layers, steps=6)

    def gradient(truncate):
        def loss(layers):
            return jnp.sum(gru_stack(layers, xs, h0, truncate=truncate)[1][-1])

        return jax.jit(jax.grad(loss))(layers)

    full = gradient(None)
    jax.tree.map(np.testing.assert_array_equal, gradient(6), full)
    shorter = gradient(4)[0].w_h
    assert np.abs(shorter - full[0].w_h).max() > 1e-3


# Dropout.


def test_dropout_keeps_the_mean_and_drops_its_share():
    """One layer reading ones: what it drops shows in a linear readout of its inputs."""
    layers = init_stack(jax.random.key(0), 1, 1)
    seen = []

    def spy(params, xs, *arguments, **options):
        seen.append(xs)
        return run_gru(params, xs, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxgru.stacks.run.run_gru", spy)
        for variational in (False, True):
            gru_stack(
                layers, jnp.ones((20, 400, 1)), input_dropout=0.25, variational=variational,
                key=jax.random.key(3),
            )  # fmt: skip
    independent, shared = (np.asarray(xs)[..., 0] for xs in seen)
    for drawn in (independent, shared):
        assert set(np.unique(drawn)) == {0, np.float32(1 / 0.75)}
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:1], shared.shape))
    # Four standard deviations of a share over 400 and 8000 draws.
    assert abs((shared[0] == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 400)
    assert abs((independent == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 8000)
    assert (independent[0] != independent[1]).any()


def test_dropout_between_the_layers_of_one_layer_is_warned_of():
    """As by torch; not where another rate is meant, where there are layers, or in evaluation."""
    xs, key = jnp.ones((T, B, INPUTS)), jax.random.key(0)
    run = functools.partial(jaxgru.gru_stack, key=key)
    message = (
        r"gru_stack: dropout=0.5 acts between layers, and there is one layer, so it does nothing; "
        r"pass Dropout\(input=...\) or Dropout\(output=...\)."
    )
    with pytest.warns(UserWarning, match=f"^{message}$") as caught:
        jax.eval_shape(functools.partial(run, dropout=0.5), make_stack(1, dtype=jnp.float32), xs)
    assert len(caught) == 1
    one = make_stack(1, dtype=jnp.float32)
    with pytest.warns(UserWarning) as caught:
        run(one, xs, dropout=0.5)
        jaxgru.gru_stack_cell(one, xs[0], init_state(one, (B,)), dropout=0.5, key=key)
        model = models.SequenceParams(one, jnp.zeros((H, 1)), jnp.zeros(1))
        models.final_outputs(model, xs, dropout=0.5, key=key)
    assert [warning.filename for warning in caught] == [__file__] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = (make_stack(n, dtype=jnp.float32) for n in (1, 2))
        for layers, options in (
            (two, {"dropout": 0.5}),
            (one, {"dropout": 0.0}),
            (one, {"dropout": Dropout(input=0.5)}),
            (one, {"dropout": 0.5, "deterministic": True}),
        ):
            jax.eval_shape(functools.partial(run, **options), layers, xs)


def test_warning_reaches_a_caller_whose_module_has_no_name():
    """As `timeit` and `exec` call with globals of their own."""
    call = {"one": make_stack(1, dtype=jnp.float32), "xs": jnp.ones((T, B, INPUTS))}
    call |= {"run": jaxgru.gru_stack, "key": jax.random.key(0)}
    with pytest.warns(UserWarning, match="acts between layers") as caught:
        exec(compile("run(one, xs, dropout=0.5, key=key)", "bare.py", "exec"), call)
    assert [warning.filename for warning in caught] == ["bare.py"]


def test_rate_may_be_any_number_that_is_known():
    """A scalar of NumPy or a scalar array draws what the number does."""
    layers, key = make_stack(2, dtype=jnp.float32), jax.random.key(0)
    xs, h0, _, _ = make_data(layers, dtype=jnp.float32)
    run = functools.partial(jaxgru.gru_stack, layers, xs, h0, key=key)
    wanted = run(dropout=Dropout(between=0.25))
    for rate in (np.float32(0.25), np.float64(0.25), np.array(0.25), jnp.float32(0.25)):
        for dropout in (rate, Dropout(between=rate)):
            jax.tree.map(np.testing.assert_array_equal, run(dropout=dropout), wanted)
    assert hash(Dropout(np.float32(0.25))) == hash(Dropout(0.25))
    for wrong in (np.array([0.25]), np.bool_(False), np.float32(1.5), jnp.float32(-1)):
        with pytest.raises((TypeError, ValueError), match="Dropout: input must be "):
            Dropout(wrong)


@pytest.mark.parametrize("kind", ["variational", "all"])
def test_key_of_the_old_style_draws_what_the_typed_one_draws(kind):
    layers = make_stack(2, dtype=jnp.float32)
    xs, h0, _, _ = make_data(layers, dtype=jnp.float32)
    old, new = (
        gru_stack(layers, xs, h0, key=key, **KINDS[kind])[1]
        for key in (jax.random.PRNGKey(3), jax.random.key(3))
    )
    np.testing.assert_array_equal(old, new)


def test_evaluation_is_deterministic_and_needs_no_key():
    layers = make_stack(2, dtype=jnp.float32)
    xs, h0, _, _ = make_data(layers, dtype=jnp.float32)
    run = jax.jit(gru_stack, static_argnames=("deterministic", *KINDS["all"]))
    plain = run(layers, xs, h0)
    dropout = {name: rate for name, rate in KINDS["all"].items() if name != "zoneout"}
    for key in (None, jax.random.key(1)):
        evaluated = run(layers, xs, h0, deterministic=True, key=key, **dropout)
        jax.tree.map(np.testing.assert_array_equal, evaluated, plain)
    for key in (None, jax.random.key(1)):
        same = run(layers, xs, h0, key=key)  # no rate acts
        jax.tree.map(np.testing.assert_array_equal, same, plain)
    noisy = [run(layers, xs, h0, key=jax.random.key(k), **KINDS["all"])[1] for k in (1, 1, 2)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - noisy[2]).max() > 1e-2


def residuals_of(**options):
    """The dtype and size of what the backward pass keeps."""
    layers = init_stack(jax.random.key(0), 8, 8, 2)
    xs = jnp.ones((16, 4, 8))

    def run(layers, xs):
        return gru_stack(layers, xs, residuals="states", **options)

    _, vjp = jax.eval_shape(functools.partial(jax.vjp, run), layers, xs)
    leaves = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "size")]
    return sorted((str(leaf.dtype), leaf.size) for leaf in leaves)


def test_masks_of_every_step_are_drawn_again_and_not_kept():
    """Dropout saves the inputs it made, recurrent dropout one mask per layer, zoneout nothing."""
    steps, rows = 16 * 4 * 8, 4 * 8
    plain, key = residuals_of(), jax.random.key(0)
    for rates, extra in (
        ({"zoneout": 0.5}, []),
        ({"recurrent_dropout": 0.5}, [rows, rows]),
        ({"dropout": 0.5}, [steps]),
    ):
        saved = list(residuals_of(key=key, **rates))
        for entry in plain:
            saved.remove(entry)
        large = [(dtype, size) for dtype, size in saved if size >= rows]
        assert large == [("float32", size) for size in extra], rates


@pytest.mark.parametrize(
    "implementation", ["threefry2x32", "rbg", pytest.param("unsafe_rbg", marks=slow)]
)
def test_masks_do_not_depend_on_the_chunks(implementation):
    """Nor on the generator: the hardware ones draw a batch under vmap from its first key."""
    params = init_gru(jax.random.key(0), INPUTS, 8)
    xs = jax.random.normal(jax.random.key(1), (6, B, INPUTS))
    options = {"key": jax.random.key(2, impl=implementation), "noise": Noise(zoneout=0.5)}
    run = jax.jit(gru, static_argnames=("noise", "gradient"))
    whole = run(params, xs, **options)[1]
    for size in (1, 4):
        hs = run(params, xs, gradient=BPTT(chunk_size=size), **options)[1]
        np.testing.assert_allclose(hs, whole, atol=1e-6)
    unchanged = whole[1:] == whole[:-1]
    assert 0.2 < unchanged.mean() < 0.8
    assert (unchanged[0] != unchanged[1]).any()


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)], ids=["no_steps", "no_rows"])
def test_empty_sequences_are_defined_with_everything_on(shape):
    """The states are carried, and the gradient of the parameters is zero."""
    layers = init_stack(jax.random.key(0), INPUTS, H, 2, bidirectional=True, layer_norm=True)
    xs, h0 = jnp.ones((*shape, INPUTS)), init_state(layers, shape[1:])
    h0 = jax.tree.map(lambda h: h + 1, h0)
    flags = {"mask": jnp.ones(shape, bool), "resets": jnp.ones(shape, bool), "truncate": 2}

    @jax.jit
    def run(layers):
        def stack(layers):
            return gru_stack(layers, xs, h0, key=jax.random.key(1), **flags, **KINDS["all"])

        results, pull = jax.vjp(stack, layers)
        return results, pull(results)

    (h_last, ys), gradient = run(layers)
    jax.tree.map(np.testing.assert_array_equal, h_last, tuple(h0))
    assert ys.shape == (*shape, 2 * H)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


# Layouts, transforms, initialisation.


@pytest.mark.usefixtures("x64", "uncompiled")
@pytest.mark.parametrize("name", ["one_way", "both_ways", "bidirectional"])
def test_time_on_any_axis_is_time_in_front(name):
    """Every axis that time may have with two batch axes, counted from the front or from the end."""
    function, params = gru_stack, make_stack(2, name != "one_way")
    if name == "bidirectional":
        function, params = gru_bidirectional, params[0]
    xs, h0, mask, resets = make_data((params,) if name == "bidirectional" else params)
    h0 = jax.tree.map(lambda h: h[:, None], h0[0] if name == "bidirectional" else tuple(h0))
    xs, mask, resets = (v[:, :, None] for v in (xs, mask, resets))
    wanted = function(params, xs, h0, mask=mask, resets=resets)
    for axis in (0, 1, 2, -4, -3, -2):
        there = axis % 4
        moved, *flags = (jnp.moveaxis(v, 0, there) for v in (xs, mask, resets))
        options = {"mask": flags[0], "resets": flags[1], "axis": axis}
        h_last, ys = function(params, moved, h0, **options)
        assert_close((h_last, jnp.moveaxis(ys, there, 0)), wanted, EXACT, f"axis={axis}")


@in_float64
def test_ensemble_under_vmap_is_its_members():
    """Parameters and keys on a leading axis: every member has its own masks."""
    members = [make_stack(1), jax.tree.map(lambda v: 0.5 * v, make_stack(1))]
    xs, h0, _, _ = make_data(members[0])
    keys = jax.random.split(jax.random.key(2), 2)

    def gradient(layers, key):
        def loss(layers):
            return jnp.sum(jnp.sin(gru_stack(layers, xs, h0, key=key, **KINDS["all"])[1]))

        return jax.value_and_grad(loss)(layers)

    together = jax.jit(jax.vmap(gradient))(jax.tree.map(lambda *v: jnp.stack(v), *members), keys)
    for number, (member, key) in enumerate(zip(members, keys)):
        got = jax.tree.map(lambda v, number=number: v[number], together)
        assert_close(got, jax.jit(gradient)(member, key), EXACT)


def test_stack_of_half_type_returns_it_and_its_gradient():
    """A layer of both directions under one of one: whatever a stack does, with least to compile."""
    sizes = {"dtype": jnp.bfloat16, "layer_norm": True}
    layers = (*make_stack(1, True, **sizes), init_gru(jax.random.key(2), 2 * H, H, **sizes))
    xs, h0, mask, _ = make_data(layers, dtype=jnp.bfloat16)
    options = {"mask": mask, "key": jax.random.key(1), **KINDS["all"]}

    def run(layers, xs, h0):
        return gru_stack(layers, xs, h0, **options)

    @jax.jit
    def pull(layers, xs, h0):
        out, vjp = jax.vjp(run, layers, xs, h0)
        return out, vjp(make_cotangents(out))

    out, grads = pull(layers, xs, h0)
    assert {leaf.dtype for leaf in jax.tree.leaves((out, grads))} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (layers, xs, h0))
    ys = jax.jit(run)(*wide)[1]
    assert np.abs(np.asarray(out[1], np.float32) - ys).max() < 2e-2


def test_stack_is_drawn_layer_by_layer_with_the_sizes_asked_for():
    key = jax.random.key(3)
    layers = init_stack(key, 2, (3, 5), 2, bidirectional=True, merge="sum", layer_norm=True)
    shapes = [[side.w_x.shape for side in layer] for layer in layers]
    assert shapes == [[(2, 9), (2, 9)], [(3, 15), (3, 15)]]
    concatenated = init_stack(key, 2, (3, 5), 2, bidirectional=True)
    assert concatenated[1].forward.w_x.shape == (6, 15)
    forward, backward = layers[0]
    assert not np.array_equal(forward.w_h, backward.w_h)
    first_key = jax.random.split(jax.random.split(key, 2)[0])[0]
    np.testing.assert_array_equal(forward.w_h, init_gru(first_key, 2, 3).w_h)


def test_public_call_checks_every_gru_and_its_noise_once(monkeypatch):
    """However many functions it goes through."""
    checked, noises = [], []

    def counting(function, *arguments):
        checked.append(function)
        return require_params(function, *arguments)

    def counting_noise(function, *arguments):
        noises.append(function)
        return require_noise(function, *arguments)

    for module in ("core.recurrence", "stacks.checks", "models.outputs"):
        monkeypatch.setattr(f"jaxgru.{module}.require_params", counting, raising=False)
        monkeypatch.setattr(f"jaxgru.{module}.require_noise", counting_noise, raising=False)
    layers = make_stack(2, dtype=jnp.float32)
    pair = make_stack(1, bidirectional=True, dtype=jnp.float32)[0]
    model = models.init_token_model(jax.random.key(0), 5, H)
    head = models.init_sequence_model(jax.random.key(0), INPUTS, H, 1)
    xs, tokens = jnp.ones((T, B, INPUTS)), jnp.ones((T, B), int)
    for function, *arguments in (
        (gru, layers[0], xs),
        (gru_bidirectional, pair, xs),
        (jaxgru.gru_stack, layers, xs),
        (jaxgru.gru_stack_cell, layers, xs[0], init_state(layers, (B,))),
        (models.token_loss, model, tokens, tokens),
        (models.sequence_outputs, head, xs),
        (models.final_outputs, head, xs),
    ):
        checked.clear()
        noises.clear()
        jax.eval_shape(function, *arguments)
        stacks = (gru_bidirectional, jaxgru.gru_stack, jaxgru.gru_stack_cell)
        assert checked == [function.__name__] * (2 if function in stacks else 1)
        assert noises == [function.__name__]


# Errors: the message names the function, the argument, what it must be, and what came.


def call(**changes):
    arguments = {
        "params": init_stack(jax.random.key(0), INPUTS, H, 2),
        "xs": jnp.ones((T, B, INPUTS)),
    }
    arguments.update(changes)
    return jaxgru.gru_stack(**arguments)


def two_way(num_layers=1):
    return init_stack(jax.random.key(0), INPUTS, H, num_layers, bidirectional=True)


def cast_half(params):
    return jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)


STATES_FORM = "gru_stack: h0 must be a sequence of {} states, one for each layer, got {}; {}."


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (
            lambda: call(
                params=(
                    *init_stack(jax.random.key(0), INPUTS, H),
                    *init_stack(jax.random.key(0), 4, H),
                )
            ),
            ValueError,
            "gru_stack: params[1].w_x must have 3 rows (the outputs of params[0], "
            "merge='concat'), got 4.",
        ),
        (
            lambda: call(xs=jnp.ones((T, B, 5))),
            ValueError,
            "gru_stack: xs must have shape [T, ..., I] with I=2 (rows of params[0].w_x), got "
            "(4, 2, 5).",
        ),
        (
            lambda: call(params=two_way(2), merge="sum"),
            ValueError,
            "gru_stack: params[1].forward.w_x must have 3 rows (the outputs of params[0], "
            "merge='sum'), got 6.",
        ),
        (
            lambda: call(merge="mean"),
            ValueError,
            "gru_stack: merge must be one of 'concat', 'sum', got 'mean'.",
        ),
        (
            lambda: call(h0=jnp.zeros((2, B, H))),
            ValueError,
            STATES_FORM.format(2, "an array of shape (2, 2, 3)", "of torch's h_0 pass tuple(h0)"),
        ),
        (
            lambda: call(params=two_way(2), h0=jnp.zeros((4, B, H))),
            ValueError,
            STATES_FORM.format(
                2,
                "an array of shape (4, 2, 3)",
                "of torch's h_0 pass tuple(zip(h0[::2], h0[1::2]))",
            ),
        ),
        (
            lambda: call(params=two_way(2), h0=jnp.zeros((2, B, H))),
            ValueError,
            STATES_FORM.format(
                2, "an array of shape (2, 2, 3)", "init_state(params, batch_shape) has the form"
            ),
        ),
        (
            lambda: call(params=init_stack(jax.random.key(0), INPUTS, H), h0=jnp.zeros((1, B, H))),
            ValueError,
            STATES_FORM.format(1, "an array of shape (1, 2, 3)", "of torch's h_0 pass tuple(h0)"),
        ),
        (
            lambda: call(h0=jnp.ones(B, int)),
            ValueError,
            STATES_FORM.format(
                2,
                "an array of shape (2,)",
                "pass a mask by name, lengths as mask=length_mask(lengths, T)",
            ),
        ),
        (
            lambda: jax.jit(lambda rate: call(dropout=rate))(0.5),
            ValueError,
            "gru_stack: key must be a jax.random.key for dropout.between (traced), got None; pass "
            "deterministic=True for evaluation.",
        ),
        (
            lambda: call(mask=jnp.ones((B, T), bool)),
            ValueError,
            "gru_stack: mask must have shape (4, 2) (xs without its last axis), got (2, 4); "
            "time and batch are swapped.",
        ),
        (
            lambda: call(xs=jnp.ones((B, T, INPUTS)), h0=[jnp.zeros((B, H))] * 2),
            ValueError,
            "gru_stack: h0[0] must have shape (4, 3) (the batch axes of xs, then H=3, the rows of "
            "params[0].w_h), got (2, 3); for batch-major xs pass axis=1.",
        ),
        (
            lambda: call(h0=[jnp.zeros((B, H))]),
            ValueError,
            STATES_FORM.format(2, "1 of them", "init_state(params, batch_shape) has the form"),
        ),
        (
            lambda: call(h0=[jnp.zeros((B, H)), (jnp.zeros((B, H)),) * 2]),
            ValueError,
            "gru_stack: h0[1] must be an array [..., H], as params[1] has one direction, got 2 of"
            " them; init_state(params, batch_shape) has the form.",
        ),
        (
            lambda: call(params=two_way(), h0=[jnp.zeros((B, H))]),
            ValueError,
            "gru_stack: h0[0] must be a pair of states, forward and backward, got an array of "
            "shape (2, 3); init_state(params, batch_shape) has the form.",
        ),
        (
            lambda: call(h0=[jnp.zeros((B, H)), jnp.zeros((B, 4))]),
            ValueError,
            "gru_stack: h0[1] must have shape (2, 3) (the batch axes of xs, then H=3, the rows of "
            "params[1].w_h), got (2, 4).",
        ),
        (
            lambda: call(mask=length_mask([1, 2, 3], T)),
            ValueError,
            "gru_stack: mask must have shape (4, 2) (xs without its last axis), got (4, 3).",
        ),
        (
            lambda: call(resets=jnp.ones((T, B))),
            TypeError,
            "gru_stack: resets must be a bool array, got float32; cast it to bool.",
        ),
        (
            lambda: call(dropout=1.0, key=jax.random.key(0)),
            ValueError,
            "gru_stack: dropout must be in [0, 1), got 1.0.",
        ),
        (
            lambda: Noise(recurrent_dropout=1.0),
            ValueError,
            "Noise: recurrent_dropout must be in [0, 1), got 1.0.",
        ),
        *(
            (
                functools.partial(Dropout, **{rate: "a"}),
                TypeError,
                f"Dropout: {rate} must be a Python float or a floating scalar array, got 'a'.",
            )
            for rate in ("input", "between", "output")
        ),
        (lambda: Dropout(variational=1), TypeError, "Dropout: variational must be a bool, got 1."),
        (
            lambda: call(dropout=Dropout(input=0.1, output=0.2), noise=Noise(zoneout=0.3)),
            ValueError,
            "gru_stack: key must be a jax.random.key for dropout.input=0.1, dropout.output=0.2, "
            "zoneout=0.3, got None; pass deterministic=True for evaluation.",
        ),
        (
            lambda: call(dropout=0.5),
            ValueError,
            "gru_stack: key must be a jax.random.key for dropout.between=0.5, got None; pass "
            "deterministic=True for evaluation.",
        ),
        (
            lambda: call(dropout=0.5, key=3),
            TypeError,
            "gru_stack: key must be a jax.random.key, got 3; pass jax.random.key(3).",
        ),
        (
            lambda: call(deterministic=1),
            TypeError,
            "gru_stack: deterministic must be a bool, got 1.",
        ),
        (
            lambda: call(params=init_gru(jax.random.key(0), INPUTS, H)),
            TypeError,
            "gru_stack: params must be a sequence of layers, GRUParams or Bidirectional, got "
            "GRUParams; put it into a tuple.",
        ),
        (
            lambda: call(params=()),
            TypeError,
            "gru_stack: params must be a sequence of layers, GRUParams or Bidirectional, got an"
            " empty one.",
        ),
        (
            lambda: call(params=[{}]),
            TypeError,
            "gru_stack: params[0] must be a GRUParams or a Bidirectional, got dict.",
        ),
        (
            lambda: call(params=init_stack(jax.random.key(0), INPUTS, (3, 4), 2), residual=True),
            ValueError,
            "gru_stack: params[1] must have outputs of the size of its inputs for "
            "residual=True, 3, got 4.",
        ),
        (lambda: call(residual="yes"), TypeError, "gru_stack: residual must be a bool, got 'yes'."),
        (
            lambda: call(axis=2),
            ValueError,
            "gru_stack: axis must name an axis of xs other than its last, got 2 for shape (4, "
            "2, 2).",
        ),
        (
            lambda: gru_stack_cell(two_way(), jnp.ones((B, INPUTS)), None),
            ValueError,
            "gru_stack_cell: params must hold layers of one direction, got a Bidirectional, "
            "whose outputs depend on later inputs; use gru_stack on whole sequences.",
        ),
        *(
            (
                functools.partial(
                    jaxgru.gru_stack_cell,
                    init_stack(jax.random.key(0), INPUTS, H),
                    jnp.ones((B, INPUTS)),
                    None,
                    gradient=rule(truncate=2),
                ),
                ValueError,
                "gru_stack_cell: gradient must have truncate=None, since one step has no windows, "
                "got 2; cut the gradient with jax.lax.stop_gradient(h).",
            )
            for rule in (BPTT, Tangent, Autodiff)
        ),
        (
            lambda: gru_bidirectional(two_way(), jnp.ones((T, B, INPUTS))),
            TypeError,
            "gru_bidirectional: params must be a Bidirectional, got tuple; pass one layer, such as "
            "params[0], or run a stack by gru_stack.",
        ),
        (
            lambda: gru_bidirectional(two_way()[0].forward, jnp.ones((T, B, INPUTS))),
            TypeError,
            "gru_bidirectional: params must be a Bidirectional, got GRUParams; run one direction "
            "by gru.",
        ),
        (
            lambda: gru_bidirectional({}, jnp.ones((T, B, INPUTS))),
            TypeError,
            "gru_bidirectional: params must be a Bidirectional, got dict.",
        ),
        *(
            (
                functools.partial(init, 0, *sizes),
                TypeError,
                f"{init.__name__}: key must be a jax.random.key, got 0; pass jax.random.key(0).",
            )
            for init, sizes in (
                (init_stack, (2, 3)),
                (models.init_sequence_model, (2, 3, 1)),
                (models.init_token_model, (2, 3)),
            )
        ),
        (
            lambda: call(params={0: {}}),
            TypeError,
            "gru_stack: params must be a sequence of layers, GRUParams or Bidirectional, got dict; "
            "make each layer of its arrays by GRUParams(**arrays, spec=...).",
        ),
        (
            lambda: gru_bidirectional(
                two_way()[0], jnp.ones((T, B, INPUTS)), jnp.ones((T, B), bool)
            ),
            ValueError,
            "gru_bidirectional: h0 must be a pair of states, forward and backward, got an array"
            f" of shape ({T}, {B}); pass a mask by name, lengths as mask=length_mask(lengths, T).",
        ),
        (
            lambda: gru_bidirectional(two_way()[0], jnp.ones((T, B, INPUTS)), jnp.zeros((B, H))),
            ValueError,
            "gru_bidirectional: h0 must be a pair of states, forward and backward, got an array"
            " of shape (2, 3); init_state(params, batch_shape) has the form.",
        ),
        (
            lambda: gru_bidirectional(
                Bidirectional(
                    init_gru(jax.random.key(0), INPUTS, 3), init_gru(jax.random.key(0), INPUTS, 4)
                ),
                jnp.ones((T, B, INPUTS)),
                merge="sum",
            ),
            ValueError,
            "gru_bidirectional: params must have one hidden size in both directions for "
            "merge='sum', got 3 and 4.",
        ),
        (
            lambda: gru_bidirectional(two_way()[0]._replace(backward=3), jnp.ones((T, B, INPUTS))),
            TypeError,
            "gru_bidirectional: params.backward must be a GRUParams, got int.",
        ),
        (
            lambda: gru_bidirectional(
                two_way()[0]._replace(backward=init_gru(jax.random.key(0), 4, H)),
                jnp.ones((T, B, INPUTS)),
            ),
            ValueError,
            "gru_bidirectional: params.backward.w_x must have 2 rows (as the other direction), "
            "got 4.",
        ),
        (
            lambda: call(params=(two_way()[0]._replace(backward=cast_half(two_way()[0][1])),)),
            TypeError,
            "gru_stack: params[0].backward must have the dtype of params[0].forward, float32, got "
            "bfloat16; cast one of them.",
        ),
        (
            lambda: init_stack(jax.random.key(0), 2, (3, 4), 3),
            ValueError,
            "init_stack: hidden_size must hold one size for each of num_layers=3 layers, got (3, "
            "4).",
        ),
        (
            lambda: init_stack(jax.random.key(0), 2, []),
            ValueError,
            "init_stack: hidden_size must hold at least one size, got [].",
        ),
        (
            lambda: init_stack(jax.random.key(0), 2, 3, 0),
            ValueError,
            "init_stack: num_layers must be at least 1, got 0.",
        ),
        (
            lambda: init_stack(jax.random.key(0), 2, 3, bidirectional=2),
            TypeError,
            "init_stack: bidirectional must be a bool, got 2.",
        ),
        (
            lambda: init_state(3),
            TypeError,
            "init_state: params must be a sequence of layers, GRUParams or Bidirectional, got int.",
        ),
        (
            lambda: init_state(two_way(), 8),
            TypeError,
            "init_state: batch_shape must be a sequence, got 8; pass (8,).",
        ),
        (
            lambda: call(first_step=-1),
            ValueError,
            "gru_stack: first_step must be from 0 to 2**31 - 1, got -1.",
        ),
        (
            lambda: call(first_step=0.5),
            TypeError,
            "gru_stack: first_step must be an integer, got 0.5.",
        ),
        (
            lambda: call(dropout=0.5, key=jax.random.split(jax.random.key(0))),
            ValueError,
            "gru_stack: key must be one jax.random.key, got shape (2,).",
        ),
        (
            lambda: call(params=two_way(), reverse=True),
            ValueError,
            "gru_stack: reverse must be False for a Bidirectional layer, which runs in both "
            "directions, got True.",
        ),
        (
            lambda: call(
                params=(
                    *init_stack(jax.random.key(0), INPUTS, H),
                    *init_stack(jax.random.key(0), H, H, dtype=jnp.bfloat16),
                )
            ),
            TypeError,
            "gru_stack: params[1] must have the dtype of params[0], float32, got bfloat16; cast"
            " one of them.",
        ),
        (
            lambda: gru_stack_cell(
                init_stack(jax.random.key(0), INPUTS, H), jnp.ones((B, 4)), None
            ),
            ValueError,
            "gru_stack_cell: x must have shape [..., I] with I=2 (rows of params[0].w_x), got "
            "(2, 4).",
        ),
        (
            lambda: gru_stack_cell(
                init_stack(jax.random.key(0), INPUTS, H), jnp.ones((B, INPUTS)), [jnp.ones((1, H))]
            ),
            ValueError,
            "gru_stack_cell: h[0] must have shape (2, 3) (the batch axes of x, then H=3, the rows "
            "of params[0].w_h), got (1, 3).",
        ),
        (
            lambda: gru_stack_cell(
                init_stack(jax.random.key(0), INPUTS, H),
                jnp.ones((B, INPUTS)),
                None,
                mask=jnp.ones(3, bool),
            ),
            ValueError,
            "gru_stack_cell: mask must have shape (2,) (x without its last axis), got (3,).",
        ),
        (
            lambda: gru_stack_cell(init_stack(jax.random.key(0), INPUTS, H), 1.0, None),
            TypeError,
            "gru_stack_cell: x must be an array, got float; convert it with jnp.asarray.",
        ),
        (
            lambda: resets_from_dones(jnp.ones((3, 2), bool), axis=2),
            ValueError,
            "resets_from_dones: axis must be one of shape (3, 2), got 2.",
        ),
        (
            lambda: resets_from_dones(jnp.ones(3)),
            TypeError,
            "resets_from_dones: dones must be a bool array, got float32; cast it to bool.",
        ),
        (
            lambda: resets_from_dones(jnp.ones((3, 2), bool), jnp.ones(3, bool)),
            ValueError,
            "resets_from_dones: done_before must have shape (2,) (dones without its axis of "
            "time), got (3,).",
        ),
    ],
)
def test_bad_call_says_what_was_expected_and_what_came(run, error, message):
    with pytest.raises(error) as caught:
        run()
    assert str(caught.value) == message
