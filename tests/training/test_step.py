"""The train step and the loop, on losses small enough to do by hand."""

import contextlib
import copy
import functools
import inspect
import pathlib
import re
import sys
import types
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close
from jax.dtypes import float0

import jaxgru
from jaxgru import training
from jaxgru.training import (
    NonFiniteError,
    clip_by_global_norm,
    fit,
    init_train_state,
    make_train_step,
)
from jaxgru.training.clipping import global_norm


def quadratic(params, carry, batch, key):
    """1/2 sum (p - batch)^2; the carry counts the batches."""
    return 0.5 * jnp.sum((params["p"] - batch) ** 2), (carry + 1, {"batch": batch.sum()})


def start(optimizer, value=0.0):
    params = {"p": jnp.full(2, value)}
    return init_train_state(params, optimizer, key=jax.random.key(0), carry=jnp.float32(0))


MOMENTUM = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
HALF = optax.sgd(0.5)


@functools.cache
def quadratic_step(optimizer):
    """Compiled once for all tests of the same optimizer."""
    return make_train_step(quadratic, optimizer)


def test_update_is_the_optimizer_s_on_the_gradient():
    optimizer = optax.sgd(0.25)
    state, metrics = make_train_step(quadratic, optimizer)(start(optimizer), jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(state.params["p"], [0.25, 0.5])  # p - 0.25 (p - batch)
    assert (float(metrics["loss"]), float(metrics["batch"])) == (2.5, 3.0)
    np.testing.assert_allclose(metrics["gradient_norm"], 5**0.5, rtol=1e-6)
    assert (int(state.step), int(state.skipped), float(state.carry)) == (1, 0, 1.0)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_update_that_is_not_finite_changes_no_parameter_and_is_counted(poison):
    step, state = quadratic_step(MOMENTUM), start(MOMENTUM)
    state, _ = step(state, jnp.array([1.0, 1.0]))
    kept = jax.tree.map(np.array, (state.params, state.opt_state, state.carry))
    after, metrics = step(state, jnp.array([1.0, poison]))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves((*after[:2], after.carry))):
        np.testing.assert_array_equal(a, b)
    assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (2, 1, 1)
    good, _ = step(after, jnp.array([1.0, 1.0]))
    assert np.isfinite(good.params["p"]).all()
    assert not np.array_equal(good.params["p"], after.params["p"])


def test_update_that_would_make_parameters_not_finite_is_skipped(uncompiled):
    optimizer = optax.sgd(float("nan"))
    step, state = make_train_step(quadratic, optimizer), start(optimizer)
    state, _ = step(state, jnp.ones(2))
    np.testing.assert_array_equal(state.params["p"], [0.0, 0.0])
    assert int(state.skipped) == 1


def test_loss_that_is_not_finite_skips_a_finite_gradient(uncompiled):
    def loss_fn(params, carry, batch, key):
        return params["p"].sum() + jnp.float32(jnp.inf), (carry, {})

    state, _ = make_train_step(loss_fn, HALF)(start(HALF), None)
    np.testing.assert_array_equal(state.params["p"], [0.0, 0.0])
    assert int(state.skipped) == 1


def test_optimizer_whose_update_broadcasts_a_parameter_is_refused():
    wide = optax.GradientTransformation(
        lambda params: (), lambda updates, state, params=None: ({"p": jnp.ones((3, 2))}, state)
    )
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError) as refused:
        make_train_step(quadratic, wide)(start(wide), jnp.ones(2))
    assert str(refused.value) == (
        "train_step: the optimizer must keep params['p'] as float32[2], got float32[3, 2]; cast it "
        "or change its shape."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.astype(jnp.float32), "['n'] as int32[], got float32[]; cast it or change its "
         "shape."),
        (lambda n: n[None], "['n'] as int32[], got int32[1]; cast it or change its shape."),
        (lambda n: (n,), " with the structure PyTreeDef({'n': *}), got PyTreeDef({'n': (*,)})."),
    ],
)  # fmt: skip
def test_optimizer_that_changes_its_state_is_refused(change, message):
    """The checkpoint of such a state could not be loaded again."""
    changing = optax.GradientTransformation(
        lambda params: {"n": jnp.int32(0)},
        lambda updates, state, params=None: (updates, {"n": change(state["n"])}),
    )
    with pytest.raises(ValueError) as refused:
        make_train_step(quadratic, changing)(start(changing), jnp.ones(2))
    assert str(refused.value) == f"train_step: the optimizer must keep opt_state{message}"


def test_arguments_of_another_kind_are_refused_at_once():
    optimizer = "optimizer must be an optax.GradientTransformation, got function; make one, e.g. "
    optimizer += "optax.adam(1e-3)."
    order = "; the order is make_train_step(loss_fn, optimizer)."
    for call, message in (
        (lambda: make_train_step(HALF, quadratic),
         f"make_train_step: loss_fn must be a function, got {type(HALF).__name__}{order}"),
        (lambda: make_train_step(quadratic, optax.adam), f"make_train_step: {optimizer}"),
        (lambda: make_train_step(quadratic, HALF, layout=jax.make_mesh((1,), ("data",))),
         "make_train_step: layout must be a Layout, got Mesh."),
        (lambda: init_train_state({}, optax.adam, key=jax.random.key(0)),
         f"init_train_state: {optimizer}"),
        (lambda: init_train_state({}, HALF, key=0),
         "init_train_state: key must be a jax.random.key, got 0; pass jax.random.key(0)."),
        (lambda: init_train_state({}, HALF, key=None),
         "init_train_state: key must be a jax.random.key, got None."),
    ):  # fmt: skip
        with pytest.raises(TypeError) as refused:
            call()
        assert str(refused.value) == message
    keys = jax.random.split(jax.random.key(0))
    with pytest.raises(ValueError, match="init_train_state: key must be one jax"):
        init_train_state({}, HALF, key=keys)


def test_each_update_draws_its_own_key(uncompiled):
    def loss_fn(params, carry, batch, key):
        return params.sum(), (carry, {"draw": jax.random.uniform(key)})

    optimizer = optax.sgd(0.1)
    step = make_train_step(loss_fn, optimizer)
    state = init_train_state(jnp.zeros(2), optimizer, key=jax.random.key(0))
    draws = []
    for _ in range(3):
        state, metrics = step(state, None)
        draws.append(float(metrics["draw"]))
    assert len(set(draws)) == 3


def test_callers_arrays_survive_donation_and_optimizers_may_keep_the_parameters():
    """Both parameters are one buffer, and so is what the optimizer keeps of them."""
    shared = jnp.zeros(2)
    keeper = optax.GradientTransformation(
        lambda params: params,
        lambda updates, state, params=None: (jax.tree.map(lambda g: -0.5 * g, updates), state),
    )
    key = jax.random.key(0)
    state = init_train_state({"p": shared, "q": shared}, keeper, key=key, carry=shared)

    def loss_fn(params, carry, batch, key):
        return params["p"].sum() + 2 * params["q"].sum(), (carry, {})

    after, _ = make_train_step(loss_fn, keeper)(state, None)
    assert state.params["p"].is_deleted()
    np.testing.assert_array_equal(shared, [0.0, 0.0])
    assert not key.is_deleted()
    np.testing.assert_array_equal(after.params["p"], [-0.5, -0.5])
    np.testing.assert_array_equal(after.params["q"], [-1.0, -1.0])


def run_fit(num_updates=7, batches=None, value=0.0, **options):
    batches = [jnp.ones(2)] * (num_updates or 0) if batches is None else batches
    options = {"num_updates": num_updates, "progress": False, **options}
    return fit(quadratic_step(HALF), start(HALF, value), lambda start: batches[start:], **options)


def test_loop_makes_every_update_and_records_means():
    state, records, best = run_fit(log_every=3, items_per_update=4, items_name="rows")
    np.testing.assert_allclose(state.params["p"], 1 - 0.5**7)  # the distance halves
    assert [record["update"] for record in records] == [3, 6, 7]
    losses = [0.25**i for i in range(7)]  # 1/2 * 2 * (0.5^i)^2
    expected = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    np.testing.assert_allclose([record["loss"] for record in records], expected, rtol=1e-6)
    assert all(record["rows_per_second"] > 0 for record in records)
    assert best is None
    names = {"update", "seconds", "loss", "batch", "gradient_norm", "skipped", "rows_per_second"}
    assert all(set(record) == names for record in records)


def test_records_come_every_ten_updates_and_evaluation_at_the_end_by_default():
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"distance": 0.5}

    records = run_fit(25, evaluate=evaluate, items_per_update=3).records
    assert [record["update"] for record in records] == [10, 20, 25]
    assert seen == [25]
    assert [record.get("distance") for record in records] == [None, None, 0.5]
    assert all(record["items_per_second"] > 0 for record in records)
    assert not any("per_second" in name for name in run_fit(1).records[0])


def test_evaluation_comes_when_due_and_at_the_end():
    seen, called = [], []

    def evaluate(state):
        seen.append(int(state.step))
        return {"distance": float(jnp.abs(state.params["p"] - 1).max())}

    def callback(state, record):
        called.append((record["update"], "distance" in record))

    run_fit(evaluate=evaluate, evaluate_every=3, callbacks=[callback], log_every=2)
    assert seen == [3, 6, 7]
    assert called == [(2, False), (3, True), (4, False), (6, True), (7, True)]


@pytest.mark.parametrize(("log_every", "noticed"), [(1, 13), (4, 16), (5, 15), (20, 20)])
def test_loop_stops_after_ten_bad_updates_in_a_row_with_the_last_good_state(log_every, noticed):
    batches = [jnp.ones(2)] * 3 + [jnp.full(2, jnp.nan)] * 17
    with pytest.raises(NonFiniteError) as error:
        run_fit(20, batches, log_every=log_every)
    np.testing.assert_allclose(error.value.state.params["p"], 1 - 0.5**3)
    assert str(error.value) == (
        "fit: loss, gradient or parameters were not finite in the last "
        f"{noticed - 3} updates, up to update {noticed}; the parameters are as before them. "
        "Lower the learning rate."
    )


def test_bad_updates_that_are_not_in_a_row_are_survived():
    batches = [jnp.full(2, jnp.nan), jnp.ones(2)] * 15
    assert run_fit(30, batches, log_every=7).records[-1]["skipped"] == 15


def test_nine_bad_updates_are_survived():
    batches = [jnp.full(2, jnp.nan)] * 9 + [jnp.ones(2)] * 3
    state, records, _ = run_fit(12, batches, log_every=1)
    assert records[-1]["skipped"] == 9
    np.testing.assert_allclose(state.params["p"], 1 - 0.5**3)


def test_mean_leaves_out_what_is_not_finite_and_is_nan_without_any_number():
    batches = [jnp.full(2, jnp.nan)] * 2 + [jnp.ones(2), jnp.full(2, jnp.nan)]
    records = run_fit(4, batches, log_every=2).records
    assert np.isnan(records[0]["loss"])
    assert records[1]["loss"] == 1.0
    assert [record["skipped"] for record in records] == [2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": [1.0] * 0}, "fit: batches must last for 7 updates, got 0."),
        ({"num_updates": 0}, "fit: num_updates must be at least 1, got 0."),
        ({"log_every": 0}, "fit: log_every must be at least 1, got 0."),
        ({"evaluate_every": 0, "evaluate": dict}, "fit: evaluate_every must be at least 1, got 0."),
        ({"num_updates": None}, "fit: num_updates must be an integer, got None."),
        ({"log_every": None}, "fit: log_every must be an integer, got None."),
    ],
)
def test_bad_argument_of_the_loop_is_refused(options, message):
    with pytest.raises((ValueError, TypeError)) as refused:
        run_fit(**options)
    assert str(refused.value) == message


def test_progress_bar_shows_the_records(capsys):
    options = {"log_every": 2, "items_per_update": 3, "items_name": "rows"}
    ones = [jnp.ones(2)] * 4
    first = fit(quadratic_step(HALF), start(HALF), lambda start: ones, num_updates=4, **options)
    shown = capsys.readouterr().err
    assert "2/4" in shown and "4/4" in shown and "update/s" in shown
    assert "loss=0.625," in shown and "loss=0.03906," in shown and "rows_per_second=" in shown
    assert not any(f"{name}=" in shown for name in ("skipped", "update", "seconds", "norm"))
    batches = [jnp.ones(2), jnp.full(2, jnp.nan)]
    fit(quadratic_step(HALF), first.state, lambda start: batches, num_updates=6, log_every=1)
    shown = capsys.readouterr().err
    assert "4/6" in shown and "6/6" in shown and "2/6" not in shown
    assert shown.count("skipped=1") >= 1 and "skipped=0" not in shown


def test_progress_bar_counts_updates_from_the_state_on(monkeypatch):
    options = []

    def tqdm(**given):
        options.append(given)
        return contextlib.nullcontext(types.SimpleNamespace(n=3, update=moves.append, **postfix))

    moves, postfix = [], {"set_postfix": lambda values: None}
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=tqdm))
    state = start(HALF)._replace(step=jnp.int32(3))
    fit(quadratic_step(HALF), state, lambda start: [jnp.ones(2)] * 4, num_updates=7)
    assert options == [{"total": 7, "initial": 3, "unit": "update", "dynamic_ncols": True}]
    assert moves == [4]


def test_missing_tqdm_is_warned_of_and_stops_no_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.warns(UserWarning) as told:
        fitted = run_fit(progress=True)
    assert int(fitted.state.step) == 7
    assert [str(warning.message) for warning in told] == [
        "fit: progress=True needs tqdm, so no progress is shown; install tqdm or pass "
        "progress=False"
    ]
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoints": "folder"}, "checkpoints must be a Checkpoints(folder, every), got str."),
        ({"monitor": "v"}, "monitor must be a Monitor, e.g. Monitor('validation_loss'), got str."),
        ({"callbacks": print}, "callbacks must be a list of functions, got "
         "builtin_function_or_method."),
        ({"evaluate": 3}, "evaluate must be a function, evaluate(state), got int."),
        ({"evaluate": lambda state: 3.0}, "evaluate must return a dict of numbers, got float; e.g. "
         "return {'validation_loss': loss}."),
        ({"state": {}}, "state must be a TrainState, e.g. from init_train_state, got dict."),
        ({"train_step": HALF}, "train_step must be a function, e.g. from make_train_step, got "
         f"{type(HALF).__name__}."),
    ],
)  # fmt: skip
def test_argument_of_the_loop_of_another_kind_is_refused(options, message):
    options = {"train_step": quadratic_step(HALF), "state": start(HALF), **options}
    with pytest.raises(TypeError) as refused:
        fit(batches=lambda start: [jnp.ones(2)], num_updates=1, progress=False, **options)
    assert str(refused.value) == f"fit: {message}"


@pytest.mark.parametrize("first", ["params['p']", "key"])
def test_state_that_an_update_has_donated_is_refused(first):
    """The whole of it, and a new state that holds only its key."""
    step, state = quadratic_step(HALF), start(HALF)
    step(state, jnp.ones(2))
    state = start(HALF)._replace(key=state.key) if first == "key" else state
    for function, call in (
        ("train_step", lambda: step(state, jnp.ones(2))),
        ("fit", lambda: fit(step, state, lambda start: [None], num_updates=1, progress=False)),
    ):
        with pytest.raises(ValueError) as refused:
            call()
        assert str(refused.value) == (
            f"{function}: state must hold its arrays, got state.{first} donated to an earlier "
            "update; pass the state that the update returned, or give each update a copy of its "
            "own, jax.tree.map(jnp.copy, state)."
        )


def test_train_step_copies_and_has_the_methods_of_jit():
    """The copies update as well, and none of them takes a state that another has donated."""
    train_step, batch = quadratic_step(HALF), jnp.ones(2)
    assert str(inspect.signature(train_step)) == "(state, batch)"
    assert "donates" in str(inspect.getdoc(train_step))
    assert "make_train_step" in repr(train_step)
    for step in (copy.copy(train_step), copy.deepcopy({"step": train_step})["step"]):
        shapes, _ = step.eval_shape(start(HALF), batch)
        traced = step.trace(start(HALF), batch).lower().compile()
        for update in (step.lower(start(HALF), batch).compile(), traced, step):
            after, _ = update(state := start(HALF), batch)
            np.testing.assert_array_equal(after.params["p"], [0.5, 0.5])
            assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, after)
        with pytest.raises(ValueError, match="donated to an earlier update"):
            train_step(state, batch)


def test_transformed_train_step_is_lowered_with_the_options_of_the_caller():
    """What is lowered is the whole of the caller's function, which here donates nothing."""
    many = jax.jit(jax.vmap(quadratic_step(HALF), in_axes=(None, 0)))
    state, batches = start(HALF), jnp.asarray([[1.0, 1.0], [4.0, 4.0], [2.0, 0.0]])
    after, _ = many.lower(state, batches).compile()(state, batches)
    np.testing.assert_array_equal(after.params["p"], batches / 2)
    assert not state.params["p"].is_deleted()
    once = jax.jit(quadratic_step(HALF)).lower(state, batches[0]).compile()
    once(state, batches[0])
    assert not state.params["p"].is_deleted()


def test_paths_of_a_state_are_made_only_for_the_message(monkeypatch):
    step, state = quadratic_step(HALF), start(HALF)
    monkeypatch.setattr(jax.tree, "leaves_with_path", None)
    assert step(state, jnp.ones(2))[0].params["p"].tolist() == [0.5, 0.5]


def test_copy_of_a_state_can_be_used_again():
    step, state = quadratic_step(HALF), start(HALF)
    firsts = [step(jax.tree.map(jnp.copy, state), jnp.full(2, n))[0] for n in (1.0, 4.0)]
    assert [first.params["p"].tolist() for first in firsts] == [[0.5, 0.5], [2.0, 2.0]]


def test_batches_may_be_none_for_a_loss_that_draws_its_own(uncompiled):
    optimizer = optax.sgd(0.1)

    def loss_fn(params, carry, batch, key):
        return jnp.sum((params - jax.random.normal(key, (2,))) ** 2), (carry, {})

    state = init_train_state(jnp.zeros(2), optimizer, key=jax.random.key(0))
    train_step = make_train_step(loss_fn, optimizer)
    batches = lambda start: [None] * 3  # noqa: E731
    state, records, _ = fit(train_step, state, batches, num_updates=3, progress=False)
    assert int(state.step) == 3 and records[-1]["update"] == 3


def linear(params, carry, batch, key):
    """A loss whose gradient is the batch; the carry counts, and the metric draws."""
    return jnp.sum(params["p"] * batch), (carry + 1, {"draw": jax.random.uniform(key)})


SGD = optax.sgd(1.0)


@functools.cache
def linear_step(*clips):
    """Compiled once for all tests of the same clips; at learning rate 1."""
    return make_train_step(linear, optax.chain(*clips, SGD))


def take_step(batch, *clips):
    """What an update makes of parameters of zero, at learning rate 1."""
    return linear_step(*clips)(start(optax.chain(*clips, SGD)), jnp.asarray(batch, jnp.float32))


CLIP = clip_by_global_norm(5.0)
CLIPPED = [
    ([6.0, 8.0], [3.0, 4.0]),
    ([3.0, 4.0], [3.0, 4.0]),
    ([0.0, 0.0], [0.0, 0.0]),
    ([1e30, 0.0], [5.0, 0.0]),
    ([-3e30, 4e30], [-3.0, 4.0]),
    ([2e38, 2e38], [12.5**0.5, 12.5**0.5]),
    ([3e38, -3e38], [12.5**0.5, -(12.5**0.5)]),  # the norm itself is too large for float32
    ([3e-38, 4e-38], [3e-38, 4e-38]),
]


@pytest.mark.parametrize(("gradient", "clipped"), CLIPPED)
def test_clipped_gradient_keeps_its_direction_however_large(gradient, clipped):
    state, metrics = take_step(gradient, CLIP)
    np.testing.assert_allclose(-state.params["p"], clipped, rtol=1e-6)
    norm = np.linalg.norm(np.asarray(gradient, np.float64))
    norm = norm if norm < np.finfo(np.float32).max else np.inf
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-6)
    assert int(state.skipped) == 0


def test_clip_has_the_bits_of_optax_where_optax_is_right():
    draw = np.random.default_rng(0)
    for _ in range(20):
        size = 10 ** draw.uniform(-12, 15)
        tree = {n: jnp.asarray(size * draw.normal(size=n), jnp.float32) for n in (1, 5, 12)}
        got, wanted = (
            clip(1.3).update(tree, optax.EmptyState())[0]
            for clip in (clip_by_global_norm, optax.clip_by_global_norm)
        )
        for n in tree:
            np.testing.assert_array_equal(got[n], wanted[n])


def test_clip_calls_no_function_that_accelerators_round():
    """The scale is a power of two, by which all products and quotients are exact."""
    program = str(jax.make_jaxpr(CLIP.update)({"p": jnp.ones(3)}, optax.EmptyState()))
    assert not set(re.findall(r"\w+", program)) & {"pow", "exp", "exp2", "log", "log2"}
    assert {"sqrt", "div"} <= set(re.findall(r"\w+", program))  # the words that it looks for


def test_clip_leaves_a_gradient_that_is_not_finite_as_it_came():
    for gradient in ([np.inf, 1e30], [1.0, np.nan]):
        clipped, _ = CLIP.update(jnp.asarray(gradient, jnp.float32), CLIP.init(None))
        np.testing.assert_array_equal(clipped, np.asarray(gradient, np.float32))


def test_clip_keeps_dtypes_and_squares_half_precision_in_float32():
    tree = {"a": jnp.full(4, 3e4, jnp.float16), "b": jnp.full(4, 3e5)}
    clipped, _ = clip_by_global_norm(600.0).update(tree, optax.EmptyState())
    for name, leaf in tree.items():
        assert clipped[name].dtype == leaf.dtype
        wanted = leaf.astype(jnp.float32) * 1e-3 / 1.01**0.5
        np.testing.assert_allclose(clipped[name].astype(jnp.float32), wanted, rtol=1e-3)


@pytest.mark.parametrize("tree", [{}, {"n": jnp.array([3, 4]), "empty": jnp.zeros((0, 2))}])
def test_tree_without_floating_leaves_has_norm_zero_and_is_not_clipped(tree):
    clipped, _ = CLIP.update(tree, CLIP.init(tree))
    chex.assert_trees_all_equal(clipped, tree)
    assert float(global_norm(tree)) == 0


def test_clip_leaves_alone_what_is_not_floating():
    others = {
        "integers": jnp.array([7, 8]), "flags": jnp.array([True]), "nothing": np.zeros(2, float0)
    }  # fmt: skip
    clipped, _ = CLIP.update({"p": jnp.array([6.0, 8.0]), **others}, optax.EmptyState())
    np.testing.assert_allclose(clipped.pop("p"), [3.0, 4.0])
    assert clipped.keys() == others.keys()
    assert all(clipped[name] is leaf for name, leaf in others.items())


def test_clip_refuses_complex_gradients():
    with pytest.raises(TypeError, match="every leaf must be real, got complex64"):
        CLIP.update({"p": jnp.ones(2, jnp.complex64)}, optax.EmptyState())


def test_norm_of_a_clip_may_be_a_hyperparameter():
    with jax.numpy_dtype_promotion("standard"):  # for optax.inject_hyperparams
        clip = optax.inject_hyperparams(clip_by_global_norm)(max_norm=5.0)
        state, _ = take_step([6.0, 8.0], clip)
    np.testing.assert_allclose(state.params["p"], [-3.0, -4.0], rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, np.nan])
def test_clip_to_no_norm_is_refused(max_norm):
    with pytest.raises(ValueError) as refused:
        clip_by_global_norm(max_norm)
    assert str(refused.value) == (f"clip_by_global_norm: max_norm must be above 0, got {max_norm}.")


@pytest.mark.parametrize(
    "clips", [(), (CLIP,), (optax.clip(2.0),), (optax.clip_by_global_norm(5.0),)]
)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_no_clip_turns_nan_or_infinity_into_a_number(clips, poison):
    state, _ = take_step([1.0, poison], *clips)
    np.testing.assert_array_equal(state.params["p"], [0.0, 0.0])
    assert int(state.skipped) == 1


def test_finite_update_that_would_ruin_the_parameters_is_skipped():
    """Loss and gradient are finite, and so would the parameters be."""
    state, metrics = take_step([1e30, 1.0])
    np.testing.assert_array_equal(state.params["p"], [0.0, 0.0])
    assert (int(state.skipped), float(metrics["gradient_norm"])) == (1, np.float32(1e30))


def test_optax_accumulates_the_gradients_of_several_batches(uncompiled):
    optimizer = optax.MultiSteps(SGD, 2).gradient_transformation()
    step, state = make_train_step(linear, optimizer), start(optimizer)
    for batch in ([1.0, 2.0], [np.inf, 0.0], [3.0, 6.0]):  # the second is skipped
        np.testing.assert_array_equal(state.params["p"], [0.0, 0.0])
        with jax.numpy_dtype_promotion("standard"):  # for optax.MultiSteps
            state, _ = step(state, jnp.asarray(batch, jnp.float32))
    np.testing.assert_array_equal(state.params["p"], [-2.0, -4.0])
    assert int(state.skipped) == 1


def test_accumulation_of_the_readme_is_the_update_of_the_whole_batch():
    """Its parts have 38, 5, 8 and 24 steps."""
    readme = pathlib.Path(training.__file__).with_name("README.md").read_text()
    [block] = [b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "MultiSteps" in b]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(block, names := {"__name__": "readme"})
    params, mask = jaxgru.init_gru(jax.random.key(0), 3, 16), np.asarray(names["mask"])

    def mean_over_steps(params):
        hs = jaxgru.gru(params, names["xs"], mask=names["mask"])[1]
        squares = jnp.square(hs[..., 0] - names["targets"][..., 0])
        return jnp.sum(jnp.where(names["mask"], squares, 0)) / float(mask.sum())

    grads = jax.jit(jax.grad(mean_over_steps))(params)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert_close(names["state"].params, wanted, 1e-6)
    assert mask.sum() == 75 and int(names["state"].skipped) == 0


def test_what_became_infinite_in_carry_or_optimizer_skips_the_update(uncompiled):
    def loss_fn(params, carry, batch, key):
        return jnp.sum(params["p"] * batch), (carry * jnp.float32(1e30), {})

    state = start(SGD)._replace(carry=jnp.float32(1e30))
    after, metrics = make_train_step(loss_fn, SGD)(state, jnp.ones(2))
    assert int(metrics["skipped"]) == 1 and float(after.carry) == np.float32(1e30)
    squares = optax.GradientTransformation(
        lambda params: {"nu": jnp.float32(0), "best": jnp.float32(jnp.inf)},
        lambda updates, state, params=None: (
            updates, {"nu": jnp.square(updates["p"] * 1e15).sum() * 1e15, "best": state["best"]}
        ),
    )  # fmt: skip
    step, state = make_train_step(linear, squares), start(squares)
    state, metrics = step(state, jnp.array([1e-6, 0.0]))
    assert int(metrics["skipped"]) == 0  # the infinity that was there at first counts for nothing
    state, metrics = step(state, jnp.array([1.0, 0.0]))
    assert int(metrics["skipped"]) == 1 and np.isfinite(state.opt_state["nu"])


def test_infinite_gradient_of_a_finite_loss_is_not_clipped_to_a_number(uncompiled):
    def loss_fn(params, carry, batch, key):
        return jnp.sqrt(params["p"]).sum(), (carry, {})

    optimizer = optax.chain(optax.clip(1.0), SGD)
    state, metrics = make_train_step(loss_fn, optimizer)(start(optimizer), None)
    assert float(metrics["loss"]) == 0.0 and int(state.skipped) == 1


def test_state_has_no_weak_types_which_no_file_keeps():
    def loss_fn(params, carry, batch, key):
        return jnp.sum(params["p"]), (0.5 * jnp.asarray(1.0) + 0 * carry, {})

    params, carry = {"p": jnp.full(2, 0.5)}, jnp.asarray(0.5)
    assert params["p"].weak_type and carry.weak_type
    state = init_train_state(params, SGD, key=jax.random.key(0), carry=carry)
    after = jax.eval_shape(make_train_step(loss_fn, SGD), state, None)[0]
    for leaf in jax.tree.leaves([s._replace(key=None) for s in (state, after)]):
        assert not leaf.weak_type


class Pair(NamedTuple):
    """A carry of the same shapes as a tuple, and another structure."""

    one: Any


FORM = "loss_fn must return (loss, (carry, metrics))"
KEEP = "loss_fn must keep carry"
CHANGE = "; cast it or change its shape."
LOSS = f"{FORM} with a floating scalar loss, got"
RETURNED = [
    (lambda loss, carry: None, TypeError, f"{FORM}, got NoneType."),
    (lambda loss, carry: (loss, carry, {}), TypeError, f"{FORM}, got tuple."),
    (lambda loss, carry: (loss, (carry, 1)), TypeError,
     f"{FORM} with metrics a dict of scalars, got int."),
    (lambda loss, carry: (loss.astype(jnp.int32), (carry, {})), TypeError,
     f"{LOSS} int32[]; e.g. take a mean."),
    (lambda loss, carry: (loss > 0, (carry, {})), TypeError, f"{LOSS} bool[]; e.g. take a mean."),
    (lambda loss, carry: (loss * jnp.ones(2), (carry, {})), TypeError,
     f"{LOSS} float32[2]; e.g. take a mean."),
    (lambda loss, carry: (loss.astype(jnp.complex64), (carry, {})), TypeError,
     f"{LOSS} complex64[]; e.g. take a mean."),
    (lambda loss, carry: ([loss], (carry, {})), TypeError, f"{LOSS} list; e.g. take a mean."),
    (lambda loss, carry: (loss, ((jnp.ones(3),), {})), ValueError,
     f"{KEEP}[0] as bfloat16[], got float32[3]{CHANGE}"),
    (lambda loss, carry: (loss, ((carry[0].astype(jnp.float32),), {})), ValueError,
     f"{KEEP}[0] as bfloat16[], got float32[]{CHANGE}"),
    (lambda loss, carry: (loss, (None, {})), ValueError,
     f"{KEEP} with the structure PyTreeDef((*,)), got PyTreeDef(None)."),
    (lambda loss, carry: (loss, (Pair(*carry), {})), ValueError,
     f"{KEEP} with the structure PyTreeDef((*,)), got PyTreeDef(CustomNode(namedtuple[Pair], [*]))"
     "."),
    (lambda loss, carry: (loss, (carry, {"u": 1.0, "v": jnp.ones((3, 1))})), ValueError,
     f"{FORM} with real scalars as metrics, got 'v': float32[3, 1]."),
    (lambda loss, carry: (loss, (carry, {"v": loss.astype(jnp.complex64)})), ValueError,
     f"{FORM} with real scalars as metrics, got 'v': complex64[]."),
    (lambda loss, carry: (loss, (carry, {"v": "text"})), ValueError,
     f"{FORM} with real scalars as metrics, got 'v': str."),
    (lambda loss, carry: (loss, (carry, {"v": jax.random.key(0)})), ValueError,
     f"{FORM} with real scalars as metrics, got 'v': key<fry>[]."),
    (lambda loss, carry: (loss, (carry, {1: loss})), ValueError,
     f"{FORM} with strings as the names of metrics, got 1."),
    *[(lambda loss, carry, name=name: (loss, (carry, {"mine": loss, name: loss})), ValueError,
       f"{FORM} with metric names that are not reserved, got {name!r}.")
      for name in ("skipped", "loss", "update", "gradient_norm", "seconds", "items_per_second")],
]  # fmt: skip


@pytest.mark.parametrize(("result", "error", "message"), RETURNED)
def test_loss_that_returns_something_else_is_refused(result, error, message):
    def loss_fn(params, carry, batch, key):
        return result(jnp.sum(params["p"]), carry)

    state = start(SGD)._replace(carry=(jnp.bfloat16(0),))
    with pytest.raises(error) as refused:
        jax.eval_shape(make_train_step(loss_fn, SGD), state, None)
    assert str(refused.value) == f"train_step: {message}"


def test_loss_may_return_numbers_of_python_and_keys():
    """A number of Python's takes the dtype of the carry."""

    def loss_fn(params, carry, batch, key):
        return jnp.sum(params["p"]), ({"n": 0, "key": key}, {"n": 3, "half": 0.5, "true": True})

    carry = {"n": jnp.bfloat16(1), "key": jax.random.key(1)}
    state, metrics = make_train_step(loss_fn, SGD)(start(SGD)._replace(carry=carry), None)
    assert (state.carry["n"].dtype, float(state.carry["n"])) == (jnp.bfloat16, 0.0)
    assert [metrics[name].item() for name in ("n", "half", "true")] == [3, 0.5, True]
    assert not state.carry["key"].is_deleted()


def test_clip_keeps_float64(x64):
    def loss_fn(params, carry, batch, key):
        return jnp.sum(params["p"] * jnp.array([3e200, 4e200])), (carry, {})

    optimizer, params = optax.chain(clip_by_global_norm(1.0), SGD), {"p": jnp.zeros(2, jnp.float64)}
    state = init_train_state(params, optimizer, key=jax.random.key(0), carry=jnp.float32(0))
    state, metrics = make_train_step(loss_fn, optimizer)(state, None)
    np.testing.assert_allclose(state.params["p"], [-0.6, -0.8], rtol=1e-14)
    np.testing.assert_allclose(metrics["gradient_norm"], 5e200, rtol=1e-14)
