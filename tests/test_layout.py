"""Training on a mesh of devices is training on one: values, programs, and what is refused."""

import re

import data_parallel
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgru

# Sums over rows in another order; 2e-7 and 4e-16 are what they come to.
TOLERANCES = {"float32": 1e-6, "float64": 1e-14}
BATCH_AXES = data_parallel.BATCH_AXES


def mesh_of(*sizes, names=("data", "model"), kind=AxisType.Auto):
    return jax.make_mesh(sizes, names[: len(sizes)], axis_types=(kind,) * len(sizes))


def layout_of(*sizes, kind=AxisType.Auto, **choices):
    return jaxgru.Layout(mesh_of(*sizes, kind=kind), batch_axes=BATCH_AXES, **choices)


def assert_is_the_run_on_one_device(layout, dtype):
    with jax.enable_x64(dtype == "float64"):
        wanted = data_parallel.run(dtype=jnp.dtype(dtype))
        got = data_parallel.run(layout, jnp.dtype(dtype))
    for field in ("losses", "params"):
        assert_close(getattr(got, field), getattr(wanted, field), TOLERANCES[dtype], field)
    assert_close(got.norms, wanted.norms, TOLERANCES["float32"], "norms")  # they are float32
    np.testing.assert_array_equal(got.batch, wanted.batch)


def test_losses_and_parameters_are_those_of_one_device():
    assert_is_the_run_on_one_device(layout_of(4), "float32")


@pytest.mark.usefixtures("quick_compilation")
def test_divided_parameters_are_those_of_one_device():
    """On two axes, the batch over both, inside of a mesh of another kind than the layout's own."""
    layout = layout_of(2, 2, kind=AxisType.Explicit, hidden="model", batch=("data", "model"))
    with jax.set_mesh(mesh_of(2, 2, kind=AxisType.Explicit)):
        placed = layout.place_state(data_parallel.make_state()[0])
        assert placed.params["gru"].w_h.addressable_shards[0].data.shape == (8, 12)
        assert_is_the_run_on_one_device(layout, "float64")


# The program: what devices send each other, and that it is one program.

COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")


def collectives(text):
    """(inside of loops, outside of them): the collectives' names in a compiled program."""
    computations, name = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        name = head[1] if head else name
        computations.setdefault(name, []).append(line)
    computations = {name: "\n".join(lines) for name, lines in computations.items()}
    bodies, looped = re.findall(r"body=%?([\w.\-]+)", text), set()
    assert bodies, "no loop found: the program is not the one that this test is about"
    while bodies:
        name = bodies.pop()
        if name not in looped:
            looped.add(name)
            bodies += CALLED.findall(computations[name])
    found = {name: COLLECTIVE.findall(body) for name, body in computations.items()}
    inside = [c for name, names in found.items() if name in looped for c in names]
    outside = [c for name, names in found.items() if name not in looped for c in names]
    return inside, outside


def compiled(layout, num_steps=6, **gru_options):
    """The text of the program of an update of a GRU."""

    def loss_fn(params, carry, batch, key):
        h_last, hs = jaxgru.gru(params, batch, carry, **gru_options)
        return jnp.mean(hs**2), (h_last, {})

    optimizer = optax.sgd(0.1, momentum=0.9)
    params = jaxgru.GRUParams(*(jnp.ones(s) for s in ((4, 24), (8, 24), (24,), (24,))))
    state = jaxgru.init_train_state(
        params, optimizer, key=jax.random.key(0), carry=jnp.zeros((8, 8))
    )
    train_step = jaxgru.make_train_step(loss_fn, optimizer, layout=layout)
    batch = layout.place_batch(np.ones((num_steps, 8, 4), np.float32))
    return train_step.lower(layout.place_state(state), batch).compile().as_text()


def test_repeated_parameters_cost_one_sum_after_the_loop_over_time():
    text = compiled(jaxgru.Layout(mesh_of(4)))
    assert collectives(text) == ([], ["all-reduce"] * 2)
    forms = re.findall(r" = (\S+|\(.*?\)) all-reduce\(", text)
    truth, sums = sorted(forms, key=len)
    assert truth == "pred[]"  # whether the carry, whose rows are divided, is finite
    assert sums.count("f32[") == 6  # the gradient, and the loss


def test_divided_parameters_are_put_together_before_the_loop_over_time():
    inside, outside = collectives(compiled(jaxgru.Layout(mesh_of(4), hidden="data")))
    assert inside == []
    assert set(outside) == {"all-gather", "all-reduce"}  # no rows, no states are sent


@pytest.mark.usefixtures("quick_compilation")
def test_chunks_that_are_asked_for_have_a_sum_each():
    assert set(collectives(compiled(jaxgru.Layout(mesh_of(4)), chunk_size=3))[0]) == {"all-reduce"}


@pytest.mark.usefixtures("quick_compilation")
def test_long_sequences_are_one_chunk_on_a_mesh(monkeypatch):
    monkeypatch.setattr("jaxgru.sweeps._WHOLE_SEQUENCE", 1)
    monkeypatch.setattr("jaxgru.sweeps._CHUNK", 1)
    text = compiled(jaxgru.Layout(mesh_of(4)), num_steps=24)  # on one device, chunks of 8
    assert collectives(text)[0] == []


@pytest.mark.parametrize("hidden", [None, "data"])
def test_state_stays_where_it_was_put_and_one_program_is_made(hidden):
    layout = jaxgru.Layout(mesh_of(4), batch_axes=0, hidden=hidden)
    traced = []

    def loss_fn(params, carry, batch, key):
        traced.append(1)
        h = jnp.tanh(batch @ params["w"] + carry)
        return jnp.mean(h**2) + jax.random.uniform(key), (h, {})

    optimizer = optax.sgd(0.1, momentum=0.9)
    params = {"w": jnp.ones((3, 8)), "b": jnp.ones(3)}
    state = jaxgru.init_train_state(
        params, optimizer, key=jax.random.key(0), carry=jnp.zeros((8, 8))
    )
    train_step = jaxgru.make_train_step(loss_fn, optimizer, layout=layout)
    placed = before = layout.place_state(state)
    batches = [layout.place_batch(np.ones((8, 3), np.float32)) for _ in range(3)]
    parts = 1 if hidden is None else 4
    for tree in (placed.params, placed.opt_state[0].trace):
        assert tree["w"].addressable_shards[0].data.shape == (3, 8 // parts)
        assert tree["b"].addressable_shards[0].data.shape == (3,)
    assert placed.carry.addressable_shards[0].data.shape == (2, 8)
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    )
    for batch in batches:
        placed, _ = train_step(placed, batch)
    assert len(compilations) == 1
    for leaf, first in zip(jax.tree.leaves(placed), jax.tree.leaves(before)):
        assert leaf.sharding.is_equivalent_to(first.sharding, leaf.ndim)
    assert len(traced) == 1
    assert before.params["w"].is_deleted()  # donated
    np.testing.assert_array_equal(state.params["w"], params["w"])  # the caller's own is not
    assert int(placed.step) == 3


def test_step_of_ones_own_leaves_the_state_as_it_came():
    layout = jaxgru.Layout(mesh_of(4), hidden="data")
    optimizer, ones = optax.sgd(0.1), jnp.ones((8, 8))
    state = jaxgru.init_train_state(ones, optimizer, key=jax.random.key(0), carry=ones)

    @jax.jit
    @layout.wrap_step
    def train_step(state, batch):  # what it makes of nothing would lie whole on every device
        return state._replace(params=jnp.zeros((8, 8)), carry=jnp.zeros((8, 8))), {}

    state, _ = train_step(layout.place_state(state), None)
    for leaf in (state.params, state.carry):
        assert leaf.addressable_shards[0].data.shape == (2, 8)


def test_update_that_is_not_finite_on_one_device_is_left_out_on_all():
    layout = jaxgru.Layout(mesh_of(4), batch_axes=0, hidden="data")

    def loss_fn(params, carry, batch, key):
        return jnp.mean((batch @ params) ** 2), (carry, {})

    optimizer = optax.sgd(0.1, momentum=0.9)
    state = jaxgru.init_train_state(jnp.ones(4), optimizer, key=jax.random.key(0))
    train_step = jaxgru.make_train_step(loss_fn, optimizer, layout=layout)
    rows = np.ones((8, 4), np.float32)
    rows[7, 0] = np.inf
    state, metrics = train_step(layout.place_state(state), layout.place_batch(rows))
    np.testing.assert_array_equal(layout.gather(state.params), np.ones(4))
    np.testing.assert_array_equal(state.opt_state[0].trace, np.zeros(4))
    assert int(metrics["skipped"]) == 1
    assert int(state.step) == 1


# Ensembles.


@pytest.mark.usefixtures("quick_compilation")
def test_members_of_an_ensemble_never_meet_and_are_what_each_is_alone():
    """The recipe of the module's docstring, eight members on four devices."""
    mesh = jax.make_mesh((4,), ("data",))
    optimizer = optax.sgd(0.5, momentum=0.9)

    def init_member(key):
        params = jaxgru.init_gru(key, 3, 4, scheme="pytorch")
        return jaxgru.init_train_state(params, optimizer, key=key, carry=jnp.zeros((5, 4)))

    def loss_fn(params, carry, batch, key):
        h_last, hs = jaxgru.gru(params, batch, carry, recurrent_dropout=0.2, key=key)
        return jnp.mean(hs**2), (h_last, {})

    keys = jax.random.split(jax.random.key(5), 8)
    members = NamedSharding(mesh, P("data"))
    alone = jax.jit(jax.vmap(init_member))(keys)
    states = jax.device_put(alone, members, may_alias=False)
    train_step = jaxgru.make_train_step(loss_fn, optimizer, donate=False)
    each = jax.vmap(train_step, in_axes=(0, None))
    each = jax.shard_map(each, mesh=mesh, in_specs=(members.spec, P()), out_specs=members.spec)
    each = jax.jit(each, donate_argnums=0)
    batch = jax.random.normal(jax.random.key(6), (6, 5, 3))
    assert collectives(each.lower(states, batch).compile().as_text()) == ([], [])
    for _ in range(2):
        states, metrics = each(states, batch)
    assert states.params.w_h.addressable_shards[0].data.shape == (2, 4, 12)
    for number in (0, 3, 7):
        state = jax.tree.map(lambda leaf, i=number: leaf[i], alone)
        for _ in range(2):
            state, wanted = train_step(state, batch)
        got = jax.tree.map(
            lambda leaf, i=number: np.asarray(leaf)[i], (states.params, metrics["loss"])
        )
        assert_close(got, (state.params, wanted["loss"]), TOLERANCES["float32"], f"{number}")


# What is refused.


def test_rows_that_do_not_divide_are_refused():
    layout = layout_of(4)
    with pytest.raises(ValueError, match=r"batch_size must divide by 4 .*got 6; take a multiple"):
        layout.process_rows(6)
    with pytest.raises(TypeError, match=r"batch_size must be an integer, got 8\.0"):
        layout.process_rows(8.0)
    tokens = np.zeros((5, 6), np.int32)
    with pytest.raises(ValueError, match=r"batch\[1\] must have rows that divide by 4 on axis 1"):
        layout.place_batch((tokens[:, :4], tokens, np.array(True)))
    with pytest.raises(ValueError, match=r"batch\[2\] must have an axis 1 of rows, got shape \(\)"):
        jaxgru.Layout(mesh_of(4)).place_batch((tokens[:, :4], tokens[:, :4], np.array(True)))
    with pytest.raises(ValueError, match="batch_axes must be a prefix of batch, got"):
        layout.place_batch((tokens, tokens))
    state = data_parallel.make_state()[0]._replace(carry={"h": jnp.zeros((6, 3))})
    with pytest.raises(ValueError, match=r"state.carry\['h'\] must have rows that divide by 4"):
        layout.place_state(state)


def test_axes_that_the_mesh_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"batch must name axes .*\('data',\), got 'rows'"):
        jaxgru.Layout(mesh_of(4), batch="rows")
    with pytest.raises(ValueError, match=r"hidden must name axes of the mesh, .*got 'model'"):
        jaxgru.Layout(mesh_of(4), hidden="model")
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh, got list"):
        jaxgru.Layout(jax.devices())


def test_rows_of_a_process_are_all_rows_where_it_is_alone():
    assert layout_of(4).process_rows(8) == slice(0, 8)
    assert layout_of(2, 2).process_rows(6) == slice(0, 6)
    one = jaxgru.Layout(Mesh(np.array(jax.devices()[:1]), ("data",)))
    assert one.process_rows(3) == slice(0, 3)
