"""Training on a mesh of devices is training on one: values, programs, and what is refused."""

import functools
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
from jaxgru import training

# Sums over rows in another order; 2e-7 and 4e-16 are what they come to.
TOLERANCES = {"float32": 1e-6, "float64": 1e-14}
BATCH_AXES = data_parallel.BATCH_AXES


def mesh_of(*sizes, names=("data", "model"), kind=AxisType.Auto):
    return jax.make_mesh(sizes, names[: len(sizes)], axis_types=(kind,) * len(sizes))


def layout_of(*sizes, kind=AxisType.Auto, **choices):
    return training.Layout(mesh_of(*sizes, kind=kind), batch_axes=BATCH_AXES, **choices)


@functools.cache
def on_one_device(dtype):
    with jax.enable_x64(dtype == "float64"):
        return data_parallel.run(dtype=jnp.dtype(dtype))


def assert_is_the_run_on_one_device(layout, dtype):
    with jax.enable_x64(dtype == "float64"):
        got = data_parallel.run(layout, jnp.dtype(dtype))
    wanted = on_one_device(dtype)
    for field in ("losses", "params"):
        assert_close(getattr(got, field), getattr(wanted, field), TOLERANCES[dtype], field)
    assert_close(got.norms, wanted.norms, TOLERANCES["float32"], "norms")  # they are float32
    np.testing.assert_array_equal(got.batch, wanted.batch)


@pytest.mark.slow
def test_losses_and_parameters_are_those_of_one_device_as_users_compile_them():
    assert_is_the_run_on_one_device(layout_of(4), "float32")


def test_losses_and_parameters_are_those_of_one_device():
    assert_is_the_run_on_one_device(layout_of(4), "float64")


def test_divided_parameters_are_those_of_one_device():
    """On two axes, the batch over both, inside of a mesh of another kind than the layout's own."""
    layout = layout_of(2, 2, kind=AxisType.Explicit, hidden="model", batch=("data", "model"))
    with jax.set_mesh(mesh_of(2, 2, kind=AxisType.Explicit)):
        assert_is_the_run_on_one_device(layout, "float64")


def test_leaves_are_divided_along_their_longest_axis_that_divides():
    divided = {
        (8, 24): (8, 12), (4, 6): (4, 3), (6, 5): (3, 5), (6, 6): (3, 6), (2, 4, 6): (2, 4, 3),
        (5,): (5,), (): (), (0, 3): (0, 3), (0, 4): (0, 2),
    }  # fmt: skip
    params = {str(shape): np.zeros(shape, np.float32) for shape in divided}
    state = training.TrainState(params, params, None, jax.random.key(3), 0, 0)
    state = state._replace(step=jnp.int32(4), skipped=jnp.int32(1), carry=np.zeros((4, 3)))
    for hidden in ("model", None):
        placed = training.Layout(mesh_of(2, 2), hidden=hidden).place_state(state)
        for tree in (placed.params, placed.opt_state):
            for shape, part in divided.items():
                found = tree[str(shape)].addressable_shards[0].data.shape
                assert found == (part if hidden else shape)
        assert placed.carry.addressable_shards[0].data.shape == (2, 3)
        assert (int(placed.step), int(placed.skipped)) == (4, 1)
        assert jax.random.key_data(placed.key).tolist() == [0, 3]
        assert len(placed.key.sharding.device_set) == 4


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
    params = jaxgru.GRUParams(
        *(jnp.ones(s) for s in ((4, 24), (8, 24), (24,), (24,))), spec=jaxgru.CHO_2014
    )
    state = training.init_train_state(
        params, optimizer, key=jax.random.key(0), carry=jnp.zeros((8, 8))
    )
    train_step = training.make_train_step(loss_fn, optimizer, layout=layout)
    batch = layout.place_batch(np.ones((num_steps, 8, 4), np.float32))
    return train_step.lower(layout.place_state(state), batch).compile().as_text()


@pytest.mark.usefixtures("optimized")
def test_repeated_parameters_cost_one_sum_after_the_loop_over_time():
    text = compiled(training.Layout(mesh_of(4)))
    assert collectives(text) == ([], ["all-reduce"] * 2)
    forms = re.findall(r" = (\S+|\(.*?\)) all-reduce\(", text)
    truth, sums = sorted(forms, key=len)
    assert truth == "pred[]"  # whether the carry, whose rows are divided, is finite
    assert sums.count("f32[") == 6  # the gradient, and the loss


@pytest.mark.usefixtures("optimized")
def test_divided_parameters_are_put_together_before_the_loop_over_time():
    inside, outside = collectives(compiled(training.Layout(mesh_of(4), hidden="data")))
    assert inside == []
    assert set(outside) == {"all-gather", "all-reduce"}  # no rows, no states are sent


def test_chunks_that_are_asked_for_have_a_sum_each():
    assert set(
        collectives(compiled(training.Layout(mesh_of(4)), gradient=jaxgru.BPTT(chunk_size=3)))[0]
    ) == {"all-reduce"}


def test_long_sequences_are_one_chunk_on_a_mesh(monkeypatch):
    monkeypatch.setattr("jaxgru.core.chunks._WHOLE_SEQUENCE", 1)
    monkeypatch.setattr("jaxgru.core.chunks._CHUNK", 1)
    text = compiled(training.Layout(mesh_of(4)), num_steps=24)  # on one device, chunks of 8
    assert collectives(text)[0] == []


@pytest.mark.parametrize("hidden", [None, "data"])
def test_state_stays_where_it_was_put_and_one_program_is_made(hidden):
    layout = training.Layout(mesh_of(4), batch_axes=0, hidden=hidden)
    traced = []

    def loss_fn(params, carry, batch, key):
        traced.append(1)
        h = jnp.tanh(batch @ params["w"] + carry)
        return jnp.mean(h**2) + jax.random.uniform(key), (h, {})

    optimizer = optax.sgd(0.1, momentum=0.9)
    params = {"w": jnp.ones((3, 8)), "b": jnp.ones(3)}
    state = training.init_train_state(
        params, optimizer, key=jax.random.key(0), carry=jnp.zeros((8, 8))
    )
    train_step = training.make_train_step(loss_fn, optimizer, layout=layout)
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
    layout = training.Layout(mesh_of(4), hidden="data")
    optimizer, ones = optax.sgd(0.1), jnp.ones((8, 8))
    state = training.init_train_state(ones, optimizer, key=jax.random.key(0), carry=ones)

    @jax.jit
    @layout.wrap_step
    def train_step(state, batch):  # what it makes of nothing would lie whole on every device
        return state._replace(params=jnp.zeros((8, 8)), carry=jnp.zeros((8, 8))), {}

    state, _ = train_step(layout.place_state(state), None)
    for leaf in (state.params, state.carry):
        assert leaf.addressable_shards[0].data.shape == (2, 8)


def test_update_that_is_not_finite_on_one_device_is_left_out_on_all():
    layout = training.Layout(mesh_of(4), batch_axes=0, hidden="data")

    def loss_fn(params, carry, batch, key):
        return jnp.mean((batch @ params) ** 2), (carry, {})

    optimizer = optax.sgd(0.1, momentum=0.9)
    state = training.init_train_state(jnp.ones(4), optimizer, key=jax.random.key(0))
    train_step = training.make_train_step(loss_fn, optimizer, layout=layout)
    rows = np.ones((8, 4), np.float32)
    rows[7, 0] = np.inf
    state, metrics = train_step(layout.place_state(state), layout.place_batch(rows))
    np.testing.assert_array_equal(layout.gather(state.params), np.ones(4))
    np.testing.assert_array_equal(state.opt_state[0].trace, np.zeros(4))
    assert int(metrics["skipped"]) == 1
    assert int(state.step) == 1


def test_gather_moves_arrays_from_any_devices_and_copies_them():
    """Of one device, of others, of the same in another order, of none, and its own result."""
    layout, devices = training.Layout(jax.make_mesh((2,), ("data",))), jax.devices()
    values, key = jnp.arange(4.0), jax.random.key(3)
    others = [NamedSharding(Mesh(d, "x"), P("x")) for d in (devices[2:4], devices[1::-1])]
    for place in (devices[0], devices[3], *others, None):
        leaf = np.asarray(values) if place is None else jax.device_put(values, place)
        got = layout.gather({"leaf": leaf, "key": jax.device_put(key, devices[0])})
        assert jax.random.key_data(got["key"]).tolist() == [0, 3]
        for moved in (got["leaf"], layout.gather(got["leaf"])):
            assert {shard.device for shard in moved.addressable_shards} == set(devices[:2])
            for shard in moved.addressable_shards:
                np.testing.assert_array_equal(shard.data, values)
    again = layout.gather(got["leaf"])
    jax.jit(jnp.negative, donate_argnums=0)(got["leaf"])
    np.testing.assert_array_equal(again, values)


# Ensembles.


def test_members_of_an_ensemble_never_meet_and_are_what_each_is_alone():
    """The recipe of jaxgru/training/README.md, eight members on four devices."""
    mesh = jax.make_mesh((4,), ("data",))
    optimizer = optax.sgd(0.5, momentum=0.9)

    def init_member(key):
        params = jaxgru.init_gru(key, 3, 4, scheme="pytorch")
        return training.init_train_state(params, optimizer, key=key, carry=jnp.zeros((5, 4)))

    def loss_fn(params, carry, batch, key):
        h_last, hs = jaxgru.gru(params, batch, carry, noise=jaxgru.Noise(0.2), key=key)
        return jnp.mean(hs**2), (h_last, {})

    keys = jax.random.split(jax.random.key(5), 8)
    members = NamedSharding(mesh, P("data"))
    alone = jax.jit(jax.vmap(init_member))(keys)
    states = jax.device_put(alone, members, may_alias=False)
    train_step = training.make_train_step(loss_fn, optimizer)
    each = jax.vmap(train_step, in_axes=(0, None))
    each = jax.shard_map(each, mesh=mesh, in_specs=(members.spec, P()), out_specs=members.spec)
    batch = jnp.asarray(np.random.default_rng(6).normal(size=(6, 5, 3)), jnp.float32)
    each = jax.jit(each, donate_argnums=0).lower(states, batch).compile()
    assert collectives(each.as_text()) == ([], [])
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


TOKENS = np.zeros((5, 6), np.int32)
CURE = "change it or use fewer devices."
NO_ROWS = "set batch_axes and carry_axes, None for a leaf without rows."


def place_carry(shape, **choices):
    state = training.TrainState({}, {}, {"h": np.zeros(shape)}, None, 0, 0)
    return training.Layout(mesh_of(4), **choices).place_state(state)


def take_own_step(state, batch):
    """A train step that returns a carry of other rows."""
    return state._replace(carry=jnp.zeros((6, 3))), {}


REFUSED = {
    "batch_size": (
        lambda: layout_of(4).process_rows(6),
        "Layout.process_rows: batch_size must be a multiple of 4 (the size of 'data' in the mesh), "
        "got 6; " + CURE,
    ),
    "two axes": (
        lambda: layout_of(2, 2, batch=("data", "model")).process_rows(6),
        "Layout.process_rows: batch_size must be a multiple of 4 (the size of ('data', 'model') in "
        "the mesh), got 6; " + CURE,
    ),
    "none": (
        lambda: layout_of(4).process_rows(0),
        "Layout.process_rows: batch_size must be at least 1, got 0.",
    ),
    "batch": (
        lambda: layout_of(4).place_batch((TOKENS[:, :4], TOKENS, np.array(True))),
        "Layout.place_batch: batch[1] must have a multiple of 4 rows (shards of the mesh) on axis "
        "1, got shape (5, 6); " + CURE,
    ),
    "axis of batch": (
        lambda: training.Layout(mesh_of(4)).place_batch((TOKENS[:, :4], np.array(True))),
        "Layout.place_batch: batch[1] must have its rows on axis 1, got shape (); " + NO_ROWS,
    ),
    "negative axis": (
        lambda: training.Layout(mesh_of(4), batch_axes=-3).place_batch(TOKENS[:, :4]),
        "Layout.place_batch: batch must have its rows on axis -3, got shape (5, 4); " + NO_ROWS,
    ),
    "carry": (
        lambda: place_carry((6, 3)),
        "Layout.place_state: state.carry['h'] must have a multiple of 4 rows (shards of the mesh) "
        "on axis 0, got shape (6, 3); " + CURE,
    ),
    "axis of carry": (
        lambda: place_carry((4, 3), carry_axes={"h": 2}),
        "Layout.place_state: state.carry['h'] must have its rows on axis 2, got shape (4, 3); "
        + NO_ROWS,
    ),
    "carry of a step": (
        lambda: jax.eval_shape(
            layout_of(4).wrap_step(take_own_step),
            training.TrainState({}, {}, None, None, 0, 0),
            None,
        ),
        "Layout.wrap_step: state.carry must have a multiple of 4 rows (shards of the mesh) on axis "
        "0, got shape (6, 3); " + CURE,
    ),
    "name of batch": (
        lambda: training.Layout(mesh_of(4), batch="rows"),
        "Layout: batch must name axes of the mesh, ('data',), got 'rows'.",
    ),
    "no batch": (
        lambda: training.Layout(mesh_of(4), batch=(None,)),
        "Layout: batch must name axes of the mesh, ('data',), got None.",
    ),
    "name of hidden": (
        lambda: training.Layout(mesh_of(4), hidden="model"),
        "Layout: hidden must name axes of the mesh, ('data',), got 'model'.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_the_mesh_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError) as refused:
        call()
    assert str(refused.value) == message


def test_what_is_of_another_kind_is_refused():
    with pytest.raises(TypeError) as refused:
        layout_of(4).process_rows(8.0)
    assert str(refused.value) == "Layout.process_rows: batch_size must be an integer, got 8.0."
    with pytest.raises(TypeError) as refused:
        training.Layout(jax.devices())
    assert str(refused.value) == (
        "Layout: mesh must be a jax.sharding.Mesh, got list; make one with jax.make_mesh."
    )
    with pytest.raises(TypeError) as refused:
        layout_of(4).place_state({"w": TOKENS})
    assert str(refused.value) == (
        "Layout.place_state: state must be a TrainState, got dict; make one with init_train_state."
    )


def test_axes_of_rows_count_from_the_end_too():
    placed = training.Layout(mesh_of(4), batch_axes=-2).place_batch(np.ones((5, 8, 3)))
    assert {part.data.shape for part in placed.addressable_shards} == {(5, 2, 3)}


def test_axes_that_are_no_prefix_are_refused():
    """The end of each message is JAX's."""
    with pytest.raises(ValueError) as refused:
        layout_of(4).place_batch((TOKENS, TOKENS))
    start = "Layout.place_batch: batch_axes must be a pytree prefix of batch, got (1, 1, None): "
    assert str(refused.value).startswith(start)
    with pytest.raises(ValueError) as refused:
        place_carry((4, 3), carry_axes=(0, 1))
    start = "Layout.place_state: carry_axes must be a pytree prefix of carry, got (0, 1): "
    assert str(refused.value).startswith(start)


def test_mesh_must_have_a_device_of_every_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError) as refused:
        training.Layout(mesh_of(4))
    assert str(refused.value) == (
        "Layout: mesh must have devices of all 2 processes, got only those of [0]; make it from "
        "jax.devices()."
    )


def test_rows_of_a_process_are_those_of_its_devices(monkeypatch):
    """Where there are several, which rows lie on its devices is told here by hand."""
    assert layout_of(4).process_rows(8) == slice(0, 8)
    assert layout_of(2, 2).process_rows(6) == slice(0, 6)
    one = training.Layout(Mesh(np.array(jax.devices()[:1]), ("data",)))
    assert one.process_rows(3) == slice(0, 3)
    own = [3, 2]

    def parts(sharding, shape):  # of four devices; one that is not this process's has none
        size = shape[0] // 4
        return {9: None} | {n: (slice(n * size, (n + 1) * size),) for n in own}

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", parts)
    assert layout_of(4).process_rows(8) == slice(4, 8)
    with pytest.raises(ValueError) as refused:
        training.Layout(mesh_of(4)).place_batch(TOKENS[:, :5])
    assert str(refused.value) == (
        "Layout.place_batch: batch must have a multiple of 2 rows (shards of the mesh) on axis 1, "
        "got shape (5, 5); " + CURE
    )
    own.append(0)
    with pytest.raises(ValueError) as refused:
        layout_of(4).process_rows(8)
    assert str(refused.value) == (
        "Layout.process_rows: mesh must assign contiguous rows to each process, got [(0, 2), (4, "
        "6), (6, 8)]; make it from jax.devices(), in their order."
    )
