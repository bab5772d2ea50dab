"""Every transform of JAX leaves values and gradients what the plain autodiff reference says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, flat, make_problem
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgru
from jaxgru import BPTT
from jaxgru.core.parameters import CHO_2014, PYTORCH
from jaxgru.initializers import init_gru
from jaxgru.stacks import init_stack

gru = flat(jaxgru.gru)
gru_stack = flat(jaxgru.gru_stack)

EXACT = 1e-11  # float64, relative to the largest entry: sums in another order
pytestmark = pytest.mark.usefixtures("x64")

# Each rule with one equation; both equations and all policies meet in test_gradients.py.
RULES = {
    "gates": {"spec": CHO_2014},
    "states": {"spec": PYTORCH, "residuals": "states", "chunk_size": 3},
    "boundaries": {"spec": CHO_2014, "residuals": "boundaries", "chunk_size": 3},
    "tangent": {"spec": PYTORCH, "gradient": "tangent"},
}


def rules(*fast, slow=()):
    """The cases of a test, of which some belong to the slow tier."""
    cases = [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]
    return pytest.mark.parametrize("rule", cases)


def loss(params, xs, mask, resets, h0=None, **choices):
    """A scalar, summed over rows, that uses both results."""
    h_last, hs = gru(params, xs, h0, mask=mask, resets=resets, **choices)
    return (h_last**2).sum() + jnp.sin(hs).sum()


@functools.partial(jax.jit, static_argnames="spec")
def plain_gradient(params, xs, mask, resets, h0, spec):
    plain = functools.partial(loss, spec=spec, gradient="autodiff")
    return jax.value_and_grad(plain, (0, 1))(params, xs, mask, resets, h0)


def reference(rule, problem, h0=None):
    """(loss, its gradient by params and xs) by autodiff of the plain scan, no other transform."""
    return plain_gradient(*arrays(problem), h0, spec=RULES[rule]["spec"])


def rule_loss(rule):
    return functools.partial(loss, **RULES[rule])


def rule_gradient(rule):
    return jax.value_and_grad(rule_loss(rule), (0, 1))


def arrays(problem):
    return problem.params, problem.xs, problem.mask, problem.resets


def ensemble(size):
    """Parameters of several layers, stacked on a new leading axis."""
    keys = jax.random.split(jax.random.key(99), size)
    members = [init_gru(k, 2, 3, scheme="pytorch", dtype=jnp.float64) for k in keys]
    return members, jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


# jit, vmap, remat, scan.


@rules("gates", "boundaries", slow=["states", "tangent"])
def test_gradient_of_compiled_and_compiled_gradient_are_the_plain_one(rule):
    problem = make_problem(0)
    wanted = reference(rule, problem)
    inside = jax.value_and_grad(jax.jit(rule_loss(rule)), (0, 1))
    assert_close(inside(*arrays(problem)), wanted, EXACT)
    assert_close(jax.jit(rule_gradient(rule))(*arrays(problem)), wanted, EXACT)


@rules("states", slow=["gates", "boundaries", "tangent"])
def test_gradient_of_vmap_over_rows_is_that_of_the_batch(rule):
    problem = make_problem(1)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def by_row(params, xs, mask, resets):
        per_row = jax.vmap(rule_loss(rule), in_axes=(None, 1, 1, 1))
        return per_row(params, xs, mask, resets).sum()

    assert_close(by_row(*arrays(problem)), reference(rule, problem), EXACT)


@rules("tangent", slow=["gates", "states", "boundaries"])
def test_vmap_of_gradient_over_rows_gives_each_rows_gradient(rule):
    problem = make_problem(2)
    per_row = jax.jit(jax.vmap(rule_gradient(rule), in_axes=(None, 1, 1, 1)))
    values, (dparams, dxs) = per_row(*arrays(problem))
    for row in range(3):
        cut = slice(row, row + 1)
        one = problem._replace(
            xs=problem.xs[:, cut], mask=problem.mask[:, cut], resets=problem.resets[:, cut]
        )
        value, (wanted_params, wanted_xs) = reference(rule, one)
        got = (values[row], (jax.tree.map(lambda d, row=row: d[row], dparams), dxs[row]))
        assert_close(got, (value, (wanted_params, wanted_xs[:, 0])), EXACT, f"row {row}")


@rules("boundaries", slow=["gates", "states", "tangent"])
def test_vmap_over_parameters_gives_each_members_gradient(rule):
    problem = make_problem(3)
    members, stacked = ensemble(2)
    each = jax.vmap(rule_gradient(rule), in_axes=(0, None, None, None))
    results = jax.jit(each)(stacked, problem.xs, problem.mask, problem.resets)
    for i, params in enumerate(members):
        wanted = reference(rule, problem._replace(params=params))
        assert_close(jax.tree.map(lambda v, i=i: v[i], results), wanted, EXACT, f"member {i}")


@rules("gates", slow=["tangent"])
def test_gradient_of_an_ensembles_total_reaches_every_member(rule):
    problem = make_problem(4)
    members, stacked = ensemble(2)

    @jax.jit
    @jax.grad
    def total(stacked):
        each = jax.vmap(rule_loss(rule), in_axes=(0, None, None, None))
        return each(stacked, problem.xs, problem.mask, problem.resets).sum()

    got = total(stacked)
    for i, params in enumerate(members):
        wanted = reference(rule, problem._replace(params=params))[1][0]
        assert_close(jax.tree.map(lambda v, i=i: v[i], got), wanted, EXACT, f"member {i}")


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(None, id="default"),
        pytest.param(
            jax.checkpoint_policies.nothing_saveable, id="nothing", marks=pytest.mark.slow
        ),
        pytest.param(jax.checkpoint_policies.dots_saveable, id="dots", marks=pytest.mark.slow),
    ],
)
@rules("gates", slow=["tangent"])
def test_rematerialisation_changes_no_gradient(rule, policy):
    problem = make_problem(5)
    recomputed = jax.checkpoint(rule_loss(rule), policy=policy)
    got = jax.jit(jax.value_and_grad(recomputed, (0, 1)))(*arrays(problem))
    assert_close(got, reference(rule, problem), EXACT)


@rules("states", slow=["gates", "boundaries", "tangent"])
def test_scan_over_segments_is_the_run_over_the_whole(rule):
    problem = make_problem(6, steps=8)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def in_segments(params, xs, mask, resets):
        def body(h, segment):
            xs, mask, resets = segment
            return gru(params, xs, h, mask=mask, resets=resets, **RULES[rule])

        split = jax.tree.map(lambda v: v.reshape(2, 4, *v.shape[1:]), (xs, mask, resets))
        h_last, hs = jax.lax.scan(body, jnp.zeros_like(problem.h0), split)
        return (h_last**2).sum() + jnp.sin(hs).sum()

    assert_close(in_segments(*arrays(problem)), reference(rule, problem), EXACT)


@rules("tangent", slow=["gates"])
def test_scan_over_stacked_layers_is_the_loop_over_layers(rule):
    problem = make_problem(7, inputs=3)
    keys = jax.random.split(jax.random.key(8), 3)
    layers = [init_gru(k, 3, 3, scheme="pytorch", dtype=jnp.float64) for k in keys]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    @jax.jit
    @jax.value_and_grad
    def scanned(stacked):
        def body(xs, params):
            return gru(params, xs, mask=problem.mask, **RULES[rule])[1], None

        return jnp.sin(jax.lax.scan(body, problem.xs, stacked)[0]).sum()

    @jax.jit
    @jax.value_and_grad
    def looped(layers):
        xs = problem.xs
        for params in layers:
            spec = RULES[rule]["spec"]
            xs = gru(params, xs, mask=problem.mask, spec=spec, gradient="autodiff")[1]
        return jnp.sin(xs).sum()

    value, by_layer = looped(layers)
    wanted = (value, jax.tree.map(lambda *leaves: jnp.stack(leaves), *by_layer))
    assert_close(scanned(stacked), wanted, EXACT)


# Four devices.

ROWS = P(None, "rows")  # [T, B, ...] divided over its batch


def four_devices(kind=AxisType.Auto):
    return jax.make_mesh((4,), ("rows",), axis_types=(kind,))


def shard_map(f, in_specs, out_specs, check_vma):
    return jax.shard_map(
        f, mesh=four_devices(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
    )


each_check = pytest.mark.parametrize(
    "check_vma",
    [
        pytest.param(True, id="checked"),
        pytest.param(False, id="unchecked", marks=pytest.mark.slow),
    ],
)
RULES_AND_AUTODIFF = RULES | {"autodiff": {"spec": CHO_2014, "gradient": "autodiff"}}


@rules("gates", slow=["states", "boundaries", "tangent", "autodiff"])
@each_check
def test_gradient_of_sharded_rows_is_that_of_the_batch(rule, check_vma):
    """Parameters replicated, rows divided: the gradient is taken outside, h0 made inside."""
    problem = make_problem(20, batch=(4,))
    choices = RULES_AND_AUTODIFF[rule]

    def total(*arguments):
        return jax.lax.psum(loss(*arguments, **choices), "rows")

    sharded = shard_map(total, (P(), ROWS, ROWS, ROWS), P(), check_vma)
    got = jax.jit(jax.value_and_grad(sharded, (0, 1)))(*arrays(problem))
    base = rule if rule in RULES else "gates"
    assert_close(got, reference(base, problem), EXACT)


@rules("states", slow=["gates", "boundaries", "tangent"])
@each_check
def test_gradient_taken_on_each_device_is_that_of_the_batch(rule, check_vma):
    """Checked, JAX sums a replicated input's gradient over devices itself; else we do, once."""
    problem = make_problem(21, batch=(4,))

    def per_device(*arguments):
        if check_vma:
            total = lambda *a: jax.lax.psum(rule_loss(rule)(*a), "rows")  # noqa: E731
            return jax.grad(total)(*arguments)
        return jax.lax.psum(jax.grad(rule_loss(rule))(*arguments), "rows")

    sharded = jax.jit(shard_map(per_device, (P(), ROWS, ROWS, ROWS), P(), check_vma))
    assert_close(sharded(*arrays(problem)), reference(rule, problem)[1][0], EXACT)


@each_check
@rules("tangent", slow=["gates"])
def test_initial_state_may_be_sharded_or_replicated(rule, check_vma):
    problem = make_problem(22, batch=(4,))
    same = jnp.tile(problem.h0[:1], (4, 1))
    wanted = reference(rule, problem, same)

    def total(*arguments):
        return jax.lax.psum(rule_loss(rule)(*arguments), "rows")

    for h0, spec in ((same, P("rows")), (same[:1], P())):
        sharded = shard_map(total, (P(), ROWS, ROWS, ROWS, spec), P(), check_vma)
        got = jax.jit(jax.value_and_grad(sharded, (0, 1)))(*arrays(problem), h0)
        assert_close(got, wanted, EXACT, str(spec))


@each_check
@rules("gates", slow=["tangent"])
def test_sharded_parameters_train_an_ensemble_on_shared_data(rule, check_vma):
    problem = make_problem(23)
    members, stacked = ensemble(4)

    def per_device(params, xs, mask, resets):
        one = jax.tree.map(lambda v: v[0], params)
        value, grads = jax.value_and_grad(rule_loss(rule))(one, xs, mask, resets)
        return jax.tree.map(lambda v: v[None], (value, grads))

    run = shard_map(per_device, (P("rows"), P(), P(), P()), P("rows"), check_vma)
    results = jax.jit(run)(stacked, *arrays(problem)[1:])
    for i, params in enumerate(members):
        value, (dparams, _) = reference(rule, problem._replace(params=params))
        got = jax.tree.map(lambda v, i=i: v[i], results)
        assert_close(got, (value, dparams), EXACT, f"member {i}")


@rules("boundaries", "tangent", slow=["gates", "states"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_mesh_of_devices_gives_the_gradient_of_one_device(rule, kind):
    problem = make_problem(24, batch=(4,))
    wanted = reference(rule, problem)
    mesh = four_devices(kind)
    with jax.set_mesh(mesh):
        params = jax.device_put(problem.params, NamedSharding(mesh, P()))
        data = jax.device_put(arrays(problem)[1:], NamedSharding(mesh, ROWS))
        value, (dparams, dxs) = jax.jit(rule_gradient(rule))(params, *data)
    assert_close((value, (dparams, dxs)), wanted, EXACT)
    if kind == AxisType.Explicit:  # there JAX's types promise where the results lie
        assert all(v.sharding.is_fully_replicated for v in jax.tree.leaves(dparams))
        assert not dxs.sharding.is_fully_replicated
    assert len(dxs.sharding.device_set) == 4


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_explicit_mesh_cuts_the_gradient_of_masked_rows(reverse):
    problem = make_problem(28, batch=(4,))

    def loss(params, xs, mask):
        h_last, _ = gru(params, xs, mask=mask, reverse=reverse, gradient=BPTT(truncate=2))
        return jnp.sum(jnp.sin(h_last))

    call = jax.jit(jax.grad(loss, argnums=(0, 1)))
    wanted = call(*arrays(problem)[:3])
    mesh = four_devices(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = jax.device_put(problem.params, NamedSharding(mesh, P()))
        got = call(params, *jax.device_put(arrays(problem)[1:3], NamedSharding(mesh, ROWS)))
    assert_close(got, wanted, EXACT)


@rules("tangent", slow=["gates"])
def test_explicit_mesh_takes_an_initial_state_divided_like_the_rows(rule):
    problem = make_problem(25, batch=(4,))
    wanted = reference(rule, problem, problem.h0)
    mesh = four_devices(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = jax.device_put(problem.params, NamedSharding(mesh, P()))
        data = jax.device_put(arrays(problem)[1:], NamedSharding(mesh, ROWS))
        h0 = jax.device_put(problem.h0, NamedSharding(mesh, P("rows")))
        got = jax.jit(rule_gradient(rule))(params, *data, h0)
    assert_close(got, wanted, EXACT)


def noisy_stack_gradient(layers, xs):
    """Of a stack with every kind of dropout, zoneout and layer norm, from one key."""
    options = {"input_dropout": 0.2, "dropout": 0.3, "output_dropout": 0.3}
    options |= {"recurrent_dropout": 0.3, "zoneout": 0.2}

    def total(layers, xs):
        h_last, ys = gru_stack(layers, xs, key=jax.random.key(2), **options)
        return jnp.sum(jnp.sin(ys)) + sum(jnp.sum(h) for h in jax.tree.leaves(h_last))

    return jax.value_and_grad(total, (0, 1))(layers, xs)


@pytest.mark.parametrize(
    ("kind", "num_layers"),
    [
        pytest.param(AxisType.Auto, 2, id="auto", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, 2, id="explicit", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, 1, id="explicit-one_layer"),
    ],
)
def test_mesh_of_devices_draws_the_masks_of_one_device(kind, num_layers):
    sizes = {"layer_norm": True, "dtype": jnp.float64}
    layers = init_stack(jax.random.key(0), 3, 4, bidirectional=True, **sizes)
    if num_layers == 2:
        layers = (*layers, *init_stack(jax.random.key(3), 8, 4, **sizes))
    xs = jax.random.normal(jax.random.key(1), (5, 8, 3))
    wanted = jax.jit(noisy_stack_gradient)(layers, xs)
    mesh = four_devices(kind)
    with jax.set_mesh(mesh):
        params = jax.device_put(layers, NamedSharding(mesh, P()))
        got = jax.jit(noisy_stack_gradient)(params, jax.device_put(xs, NamedSharding(mesh, ROWS)))
    assert_close(got, wanted, EXACT)


@each_check
def test_noisy_stack_runs_on_each_device(check_vma):
    """Each device draws from its own key, as it would alone."""
    layers = init_stack(jax.random.key(0), 3, 4, 2, layer_norm=True, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (5, 4, 3))
    keys = jax.random.split(jax.random.key(2), 4)
    options = {"dropout": 0.3, "recurrent_dropout": 0.3, "zoneout": 0.2}

    def run(layers, xs, keys):
        return gru_stack(layers, xs, key=keys[0], **options)[1]

    sharded = shard_map(run, (P(), ROWS, P("rows")), ROWS, check_vma)
    got = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(sharded(*a)))))(layers, xs, keys)

    def total(layers):
        parts = (xs.swapaxes(0, 1)[:, :, None], keys[:, None])
        return jnp.sum(jnp.sin(jax.lax.map(lambda part: run(layers, *part), parts)))

    assert_close(got, jax.jit(jax.grad(total))(layers), EXACT)


@each_check
def test_devices_may_differ_in_their_keys_alone(check_vma):
    """Zoneout of one sequence under four keys: what varies over the mesh is the key."""
    problem = make_problem(26)
    keys = jax.random.split(jax.random.key(3), 4)

    def run(params, xs, keys):
        return gru(params, xs, key=keys[0], zoneout=0.5)[0][None]

    sharded = jax.jit(shard_map(run, (P(), P(), P("rows")), P("rows"), check_vma))
    wanted = [gru(problem.params, problem.xs, key=key, zoneout=0.5)[0] for key in keys]
    assert_close(sharded(problem.params, problem.xs, keys), jnp.stack(wanted), EXACT)


def test_four_devices_are_there():
    assert jax.device_count() == 4
    np.testing.assert_array_equal([d.platform for d in jax.devices()], ["cpu"] * 4)
