"""The train step, the loop and the files of weights, on losses small enough to do by hand."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgru import (
    NonFiniteError,
    fit,
    init_train_state,
    load_arrays,
    make_train_step,
    read_metadata,
    save_arrays,
)


def quadratic(params, carry, batch, key):
    """1/2 sum (p - batch)^2; the carry counts the batches."""
    return 0.5 * jnp.sum((params["p"] - batch) ** 2), (carry + 1, {"batch": batch.sum()})


def start(optimizer, value=0.0):
    params = {"p": jnp.full(2, value)}
    return init_train_state(params, optimizer, key=jax.random.key(0), carry=jnp.float32(0))


def test_update_is_the_optimizer_s_on_the_gradient():
    optimizer = optax.sgd(0.25)
    state, metrics = make_train_step(quadratic, optimizer)(start(optimizer), jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(state.params["p"], [0.25, 0.5])  # p - 0.25 (p - batch)
    assert (float(metrics["loss"]), float(metrics["batch"])) == (2.5, 3.0)
    np.testing.assert_allclose(metrics["gradient_norm"], 5**0.5, rtol=1e-6)
    assert (int(state.step), int(state.skipped), float(state.carry)) == (1, 0, 1.0)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_update_that_is_not_finite_changes_no_parameter_and_is_counted(poison):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    step, state = make_train_step(quadratic, optimizer, donate=False), start(optimizer)
    state, _ = step(state, jnp.array([1.0, 1.0]))
    after, metrics = step(state, jnp.array([1.0, poison]))
    kept = (state.params, state.opt_state, state.carry)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves((*after[:2], after.carry))):
        np.testing.assert_array_equal(a, b)
    assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (2, 1, 1)
    good, _ = step(after, jnp.array([1.0, 1.0]))
    assert np.isfinite(good.params["p"]).all()
    assert not np.array_equal(good.params["p"], after.params["p"])


def test_finite_gradient_with_an_overflowing_norm_is_skipped():
    """Adam would square 1e30 to inf, and never move again."""
    optimizer = optax.sgd(0.5, momentum=0.9)
    step, state = make_train_step(quadratic, optimizer), start(optimizer)
    state, metrics = step(state, jnp.array([1e30, 1.0]))
    assert int(metrics["skipped"]) == 1
    for _ in range(3):
        state, _ = step(state, jnp.array([1.0, 1.0]))
    assert np.isfinite(state.params["p"]).all() and np.all(state.params["p"] > 0.5)


def test_update_that_would_make_parameters_not_finite_is_skipped():
    optimizer = optax.sgd(float("nan"))
    step, state = make_train_step(quadratic, optimizer), start(optimizer)
    state, _ = step(state, jnp.ones(2))
    np.testing.assert_array_equal(state.params["p"], [0.0, 0.0])
    assert int(state.skipped) == 1


def test_optimizer_whose_update_broadcasts_a_parameter_is_refused():
    wide = optax.GradientTransformation(
        lambda params: (), lambda updates, state, params=None: ({"p": jnp.ones((3, 2))}, state)
    )
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(ValueError, match=r"keep params\['p'\] as float32\[2\], got float32\[3, 2\]"),
    ):
        make_train_step(quadratic, wide)(start(wide), jnp.ones(2))


def test_each_update_draws_its_own_key():
    def loss_fn(params, carry, batch, key):
        return params.sum(), (carry, {"draw": jax.random.uniform(key)})

    optimizer = optax.sgd(0.1)
    step = make_train_step(loss_fn, optimizer)
    state = init_train_state(jnp.zeros(1), optimizer, key=jax.random.key(0))
    draws = []
    for _ in range(3):
        state, metrics = step(state, None)
        draws.append(float(metrics["draw"]))
    assert len(set(draws)) == 3


def test_callers_arrays_survive_donation_and_may_share_a_buffer():
    shared = jnp.zeros(2)
    optimizer = optax.sgd(0.5)
    state = init_train_state({"p": shared, "q": shared}, optimizer, key=jax.random.key(0))

    def loss_fn(params, carry, batch, key):
        return params["p"].sum() + 2 * params["q"].sum(), (carry, {})

    state, _ = make_train_step(loss_fn, optimizer)(state, None)
    np.testing.assert_array_equal(shared, [0.0, 0.0])
    np.testing.assert_array_equal(state.params["q"], [-1.0, -1.0])


def test_optimizer_that_keeps_the_parameters_may_be_donated():
    def init(params):
        return params  # the same buffers

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -0.5 * g, updates), state

    keeper = optax.GradientTransformation(init, update)
    state, _ = make_train_step(quadratic, keeper)(start(keeper), jnp.ones(2))
    np.testing.assert_array_equal(state.params["p"], [0.5, 0.5])


def run_fit(num_updates=7, batches=None, optimizer=None, value=0.0, **options):
    optimizer = optax.sgd(0.5) if optimizer is None else optimizer
    batches = [jnp.ones(2)] * num_updates if batches is None else batches
    return fit(
        make_train_step(quadratic, optimizer),
        start(optimizer, value),
        batches,
        num_updates=num_updates,
        progress=False,
        **options,
    )


def test_loop_makes_every_update_and_records_means():
    state, records, _ = run_fit(log_every=3, items_per_update=4, items_name="rows")
    np.testing.assert_allclose(state.params["p"], 1 - 0.5**7)  # the distance halves
    assert [record["update"] for record in records] == [3, 6, 7]
    losses = [0.25**i for i in range(7)]  # 1/2 * 2 * (0.5^i)^2
    expected = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    np.testing.assert_allclose([record["loss"] for record in records], expected, rtol=1e-6)
    assert all(record["rows_per_second"] > 0 for record in records)


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


@pytest.mark.parametrize("log_every", [1, 4, 5, 20])
def test_loop_stops_after_ten_bad_updates_in_a_row_with_the_last_good_state(log_every):
    batches = [jnp.ones(2)] * 3 + [jnp.full(2, jnp.nan)] * 17
    with pytest.raises(NonFiniteError, match=r"not finite in the last 1\d updates, up to") as e:
        run_fit(20, batches, log_every=log_every)
    np.testing.assert_allclose(e.value.state.params["p"], 1 - 0.5**3)


def test_bad_updates_that_are_not_in_a_row_are_survived():
    batches = [jnp.full(2, jnp.nan), jnp.ones(2)] * 15
    assert run_fit(30, batches, log_every=7).records[-1]["skipped"] == 15


def test_nine_bad_updates_are_survived():
    batches = [jnp.full(2, jnp.nan)] * 9 + [jnp.ones(2)] * 3
    state, records, _ = run_fit(12, batches, log_every=1)
    assert records[-1]["skipped"] == 9
    np.testing.assert_allclose(state.params["p"], 1 - 0.5**3)


def test_batches_that_end_early_are_named():
    with pytest.raises(ValueError, match="batches must hold 7, got 2"):
        run_fit(7, [jnp.ones(2)] * 2)


@pytest.mark.parametrize("name", ["num_updates", "log_every", "evaluate_every"])
def test_count_below_one_is_refused(name):
    options = {"num_updates": 3, "batches": [], name: 0}
    with pytest.raises(ValueError, match=f"fit: {name} must be at least 1, got 0"):
        run_fit(**options)


def test_progress_bar_shows_the_records(capsys):
    optimizer = optax.sgd(0.5)
    batches = [jnp.ones(2)] * 4
    fit(
        make_train_step(quadratic, optimizer), start(optimizer), batches,
        num_updates=4, log_every=2, items_per_update=3, items_name="rows",
    )  # fmt: skip
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "loss=" in shown and "rows_per_second=" in shown
    assert "skipped" not in shown


TREE = {
    "a": jnp.array([[1.5, -2.0]], jnp.float32),
    "b": (jnp.array([1.0, 3.0], jnp.bfloat16), None),
    "c": jnp.array([3], jnp.int32),
}


def test_file_gives_back_the_same_bits_dtypes_and_metadata(tmp_path):
    save_arrays(tmp_path / "x.npz", TREE, {"note": "ü", "n": 3})
    loaded = load_arrays(tmp_path / "x.npz", jax.eval_shape(lambda: TREE))
    assert jax.tree.structure(loaded) == jax.tree.structure(TREE)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(TREE)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert read_metadata(tmp_path / "x.npz") == {"note": "ü", "n": 3}
    assert os.listdir(tmp_path) == ["x.npz"]


@pytest.mark.parametrize(
    ("like", "match"),
    [
        ({"a": TREE["a"]}, r"missing \[\] and surplus"),
        ({**TREE, "d": TREE["a"]}, r"missing \[\"\['d'\]\"\]"),
        ({**TREE, "a": jnp.zeros((2, 1))}, r"\['a'\] must be float32\[2, 1\], got"),
        ({**TREE, "c": jnp.zeros(1)}, r"\['c'\] must be float32\[1\], got int32\[1\]"),
    ],
)
def test_file_of_another_model_is_refused(tmp_path, like, match):
    save_arrays(tmp_path / "x.npz", TREE, {})
    with pytest.raises(ValueError, match=match):
        load_arrays(tmp_path / "x.npz", like)


def test_damaged_file_is_refused_at_every_truncation_and_every_flipped_byte(tmp_path):
    save_arrays(tmp_path / "x.npz", TREE, {"n": 1})
    whole = (tmp_path / "x.npz").read_bytes()
    bad = tmp_path / "bad.npz"
    loaded = 0
    for position in range(len(whole)):
        flipped = whole[:position] + bytes([whole[position] ^ (1 << position % 8)])
        for content in (whole[:position], flipped + whole[position + 1 :]):
            bad.write_bytes(content)
            try:
                tree = load_arrays(bad, TREE)
            except ValueError as error:
                assert "bad.npz" in str(error)
                continue
            # What loads in spite of a flipped bit (in a date, say) holds the same arrays.
            loaded += 1
            for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(TREE)):
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert loaded < 0.2 * len(whole)


def test_file_has_the_permissions_of_any_new_file(tmp_path):
    save_arrays(tmp_path / "x.npz", TREE, {})
    (tmp_path / "plain").write_text("")
    modes = [(tmp_path / name).stat().st_mode for name in ("x.npz", "plain")]
    assert modes[0] == modes[1]


def test_pickled_objects_are_not_loaded(tmp_path):
    np.savez(tmp_path / "evil.npz", jaxgru=np.array({"code": print}, dtype=object))
    with pytest.raises(ValueError, match="must be a whole 'jaxgru arrays 2' file"):
        load_arrays(tmp_path / "evil.npz", {})


def test_failed_write_keeps_the_old_file(tmp_path):
    save_arrays(tmp_path / "x.npz", TREE, {"n": 1})
    with pytest.raises(TypeError):
        save_arrays(tmp_path / "x.npz", TREE, {"n": object()})
    assert read_metadata(tmp_path / "x.npz") == {"n": 1}
    with pytest.raises(OSError):
        save_arrays(tmp_path / "missing" / "x.npz", TREE, {})
    assert os.listdir(tmp_path) == ["x.npz"]


def test_metadata_of_another_format_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", jaxgru=np.array(json.dumps({"format": "other"})))
    with pytest.raises(ValueError, match="format 'other'"):
        read_metadata(tmp_path / "x.npz")


def test_batches_may_be_none_for_a_loss_that_draws_its_own():
    optimizer = optax.sgd(0.1)

    def loss_fn(params, carry, batch, key):
        return jnp.sum((params - jax.random.normal(key, (2,))) ** 2), (carry, {})

    state = init_train_state(jnp.zeros(2), optimizer, key=jax.random.key(0))
    train_step = make_train_step(loss_fn, optimizer)
    state, records, _ = fit(train_step, state, [None] * 3, num_updates=3, progress=False)
    assert int(state.step) == 3 and records[-1]["update"] == 3


def linear(params, carry, batch, key):
    """A loss whose gradient is the batch; the carry counts, and the metric draws."""
    return jnp.sum(params["p"] * batch), (carry + 1, {"draw": jax.random.uniform(key)})


def gradient_step(**options):
    """What an update subtracts from parameters of zero, at learning rate 1."""
    optimizer = optax.sgd(1.0)
    step = make_train_step(options.pop("loss_fn", linear), optimizer, donate=False, **options)
    return lambda batch: step(start(optimizer), jnp.asarray(batch, jnp.float32))


@pytest.mark.parametrize(
    ("options", "gradient", "clipped"),
    [
        ({"clip_norm": 1.0}, [3.0, 4.0], [0.6, 0.8]),
        ({"clip_norm": 5.0}, [3.0, 4.0], [3.0, 4.0]),
        ({"clip_norm": 5.0}, [0.0, 0.0], [0.0, 0.0]),
        ({"clip_norm": 1.0}, [1e30, 0.0], [1.0, 0.0]),
        ({"clip_norm": 1.0}, [-3e30, 4e30], [-0.6, 0.8]),
        ({"clip_norm": 2.0}, [2e38, 2e38], [2**0.5, 2**0.5]),
        ({"clip_norm": 1.0}, [3e-38, 4e-38], [3e-38, 4e-38]),
        ({"clip_value": 2.0}, [1e30, -1.0], [2.0, -1.0]),
        ({"clip_value": 3.0, "clip_norm": 1.0}, [3.0, -1e30], [0.5**0.5, -(0.5**0.5)]),
    ],
)
def test_clipped_gradient_keeps_its_direction_however_large(options, gradient, clipped):
    state, metrics = gradient_step(**options)(gradient)
    np.testing.assert_allclose(-state.params["p"], clipped, rtol=1e-6)
    norm = np.linalg.norm(np.asarray(gradient, np.float64))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-6)
    assert int(state.skipped) == 0


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"clip_value": 1.0}])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_no_clip_makes_a_number_of_what_is_none(options, poison):
    state, _ = gradient_step(**options)([1.0, poison])
    np.testing.assert_array_equal(state.params["p"], [0.0, 0.0])
    assert int(state.skipped) == 1


def test_accumulated_gradient_is_the_mean_over_parts_taken_one_after_another():
    parts = [[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]]

    def loss_fn(params, carry, batch, key):
        return jnp.sum(params["p"] * batch) * (1 + carry), (
            carry + 1, {"carry": carry, "draw": jax.random.uniform(key)}
        )  # fmt: skip

    state, metrics = gradient_step(loss_fn=loss_fn, accumulate=3)(parts)
    wanted = np.mean([np.array(part) * (1 + i) for i, part in enumerate(parts)], axis=0)
    np.testing.assert_allclose(-state.params["p"], wanted, rtol=1e-6)
    assert (float(state.carry), float(metrics["carry"]), int(state.step)) == (3.0, 1.0, 1)
    key = jax.random.split(jax.random.split(jax.random.key(0))[1], 3)
    draws = np.mean([jax.random.uniform(k) for k in key])
    np.testing.assert_allclose(metrics["draw"], draws, rtol=1e-6)
    with pytest.raises(ValueError, match=r"batch must have the 3 parts of .*, got shape \[2, 2\]"):
        gradient_step(accumulate=3)([[1.0, 2.0], [3.0, 6.0]])


def test_one_bad_part_skips_the_whole_update():
    state, _ = gradient_step(accumulate=2)([[1.0, 2.0], [np.nan, 6.0]])
    np.testing.assert_array_equal(state.params["p"], [0.0, 0.0])
    assert (int(state.skipped), float(state.carry)) == (1, 0.0)


def test_loss_is_computed_in_the_dtype_asked_for_and_all_else_keeps_its_own():
    seen = {}

    def loss_fn(params, carry, batch, key):
        seen.update(params=params["p"].dtype, carry=carry.dtype, batch=batch.dtype)
        return jnp.sum(params["p"] * batch), (carry + 1, {"half": batch[0]})

    state, metrics = gradient_step(loss_fn=loss_fn, compute_dtype=jnp.bfloat16)([1.00390625, 2.0])
    assert set(seen.values()) == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in (state.params["p"], state.carry)} == {jnp.dtype(jnp.float32)}
    assert {metrics[name].dtype for name in ("loss", "half", "gradient_norm")} == {
        jnp.dtype(jnp.float32)
    }
    np.testing.assert_array_equal(-state.params["p"], [1.0, 2.0])  # the batch in bfloat16


def test_scaled_loss_saves_float16_gradients_from_underflow():
    def loss_fn(params, carry, batch, key):
        return jnp.sum(params["p"] * batch * jnp.float16(2**-4)), (carry, {})

    options = {"loss_fn": loss_fn, "compute_dtype": jnp.float16}
    lost, _ = gradient_step(**options)([2e-7, 2e-6])
    kept, _ = gradient_step(**options, loss_scale=2.0**12)([2e-7, 2e-6])
    assert float(lost.params["p"][0]) == 0.0
    # 2e-7 is 3 times 2^-24, the least number of float16; its 2^-4th part is none.
    np.testing.assert_allclose(-kept.params["p"][0], 3 * 2.0**-28, rtol=1e-3)


def test_average_follows_the_parameters_and_misses_what_was_skipped():
    optimizer = optax.sgd(1.0)
    step = make_train_step(linear, optimizer, average_decay=0.75, donate=False)
    params = {"p": jnp.array([8.0, 0.0])}
    state = init_train_state(
        params, optimizer, key=jax.random.key(0), carry=jnp.float32(0), average=True
    )
    np.testing.assert_array_equal(state.average["p"], [8.0, 0.0])
    expected = np.array([8.0, 0.0])
    for batch in ([4.0, 0.0], [np.nan, 1.0], [0.0, 2.0]):
        state, _ = step(state, jnp.array(batch))
        if np.isfinite(batch).all():
            expected = 0.75 * expected + 0.25 * np.asarray(state.params["p"])
        np.testing.assert_allclose(state.average["p"], expected, rtol=1e-6)
    assert int(state.skipped) == 1


def test_average_and_its_decay_go_together():
    optimizer = optax.sgd(1.0)
    with pytest.raises(ValueError, match="must go together, got a state with none; give init_tra"):
        make_train_step(quadratic, optimizer, average_decay=0.5)(start(optimizer), jnp.ones(2))
    state = init_train_state({"p": jnp.ones(2)}, optimizer, key=jax.random.key(0), average=True)
    with pytest.raises(ValueError, match=r"average_decay=None must .* a state with one; give"):
        make_train_step(quadratic, optimizer)(state, jnp.ones(2))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1, got 0"),
        ({"accumulate": 2.0}, TypeError, "accumulate must be an integer, got 2.0"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be above 0 or None, got 0.0"),
        ({"clip_value": np.nan}, ValueError, "clip_value must be above 0 or None, got nan"),
        ({"compute_dtype": jnp.int32}, TypeError, "compute_dtype must be a floating dtype"),
        ({"loss_scale": 0.0}, ValueError, "loss_scale must be finite and above 0, got 0.0"),
        ({"loss_scale": np.inf}, ValueError, "loss_scale must be finite and above 0, got inf"),
        ({"average_decay": 1.0}, ValueError, "average_decay must be at least 0 and below 1"),
    ],
)
def test_bad_option_of_the_train_step_is_refused(options, error, match):
    with pytest.raises(error, match=f"make_train_step: {match}"):
        make_train_step(quadratic, optax.sgd(1.0), **options)


def test_what_became_infinite_in_carry_or_optimizer_skips_the_update():
    def loss_fn(params, carry, batch, key):
        return jnp.sum(params["p"] * batch), (carry * jnp.float32(1e30), {})

    optimizer = optax.sgd(1.0)
    step = make_train_step(loss_fn, optimizer, donate=False)
    state = start(optimizer)._replace(carry=jnp.float32(1e30))
    after, metrics = step(state, jnp.ones(2))
    assert int(metrics["skipped"]) == 1 and float(after.carry) == np.float32(1e30)
    squares = optax.GradientTransformation(
        lambda params: {"nu": jnp.float32(0), "best": jnp.float32(jnp.inf)},
        lambda updates, state, params=None: (
            updates, {"nu": jnp.square(updates["p"] * 1e15).sum() * 1e15, "best": state["best"]}
        ),
    )  # fmt: skip
    step, state = make_train_step(linear, squares, donate=False), start(squares)
    state, metrics = step(state, jnp.array([1e-6, 0.0]))
    assert int(metrics["skipped"]) == 0  # the infinity that was there at first counts for nothing
    state, metrics = step(state, jnp.array([1.0, 0.0]))
    assert int(metrics["skipped"]) == 1 and np.isfinite(state.opt_state["nu"])


def test_infinite_gradient_of_a_finite_loss_is_not_clipped_to_a_number():
    def loss_fn(params, carry, batch, key):
        return jnp.sqrt(params["p"]).sum(), (carry, {})

    state, metrics = gradient_step(loss_fn=loss_fn, clip_value=1.0)([1.0, 1.0])
    assert float(metrics["loss"]) == 0.0 and int(state.skipped) == 1


def test_state_has_no_weak_types_which_no_file_keeps():
    def loss_fn(params, carry, batch, key):
        return jnp.sum(params["p"]), (0.5 * jnp.asarray(1.0) + 0 * carry, {})

    optimizer = optax.sgd(1.0)
    params, carry = {"p": jnp.full(2, 0.5)}, jnp.asarray(0.5)
    assert params["p"].weak_type and carry.weak_type
    state = init_train_state(params, optimizer, key=jax.random.key(0), carry=carry)
    after, _ = make_train_step(loss_fn, optimizer, donate=False)(state, None)
    for leaf in jax.tree.leaves([s._replace(key=None) for s in (state, after)]):
        assert not leaf.weak_type


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (lambda loss, carry: loss, TypeError, r"return \(loss, \(carry, metrics\)\), got "),
        (lambda loss, carry: (loss, carry), TypeError, r"return \(loss, \(carry, metrics\)\), got"),
        (lambda loss, carry: (loss, (carry, 1)), TypeError, "metrics a dict of scalars, got int"),
        (lambda loss, carry: (loss, (jnp.ones(3), {})), ValueError, r"shapes, \(\), got \(3,\)"),
        (lambda loss, carry: (loss, (None, {})), ValueError, r"shapes, \(\), got None"),
        (lambda loss, carry: (loss, (carry, {"loss": loss})), ValueError, r"own, got \['loss'\]"),
        (lambda loss, carry: (loss, (carry, {"v": jnp.ones(3)})), ValueError, r"got v of \[3\]"),
    ],
)
def test_loss_that_returns_something_else_is_told(result, error, match):
    def loss_fn(params, carry, batch, key):
        return result(jnp.sum(params["p"]), carry)

    with pytest.raises(error, match=match):
        gradient_step(loss_fn=loss_fn)([1.0, 1.0])


def test_truths_are_counted_and_halves_averaged_in_full():
    def loss_fn(params, carry, batch, key):
        return jnp.sum(params["p"] * batch), (carry, {"is": batch[0] > 0})

    _, metrics = gradient_step(loss_fn=loss_fn, accumulate=4)([[1.0, 0], [1, 0], [1, 0], [-1, 0]])
    assert float(metrics["is"]) == 0.75
    params, optimizer = {"p": jnp.zeros(2, jnp.bfloat16)}, optax.sgd(1.0)
    state = init_train_state(
        params, optimizer, key=jax.random.key(0), carry=jnp.float32(0), average=True
    )
    step = make_train_step(
        lambda p, c, b, k: (jnp.sum(p["p"]).astype(jnp.float32), (c, {})), optimizer,
        average_decay=0.999, donate=False,
    )  # fmt: skip
    state, _ = step(state, None)
    np.testing.assert_allclose(state.average["p"], -0.001, rtol=1e-3)
    assert state.params["p"].dtype == jnp.bfloat16


def test_clip_keeps_float64(x64):
    def loss_fn(params, carry, batch, key):
        return jnp.sum(params["p"] * jnp.array([3e200, 4e200])), (carry, {})

    optimizer = optax.sgd(1.0)
    state = init_train_state(
        {"p": jnp.zeros(2, jnp.float64)}, optimizer, key=jax.random.key(0), carry=jnp.float32(0)
    )
    state, metrics = make_train_step(loss_fn, optimizer, clip_norm=1.0)(state, None)
    np.testing.assert_allclose(state.params["p"], [-0.6, -0.8], rtol=1e-14)
    np.testing.assert_allclose(metrics["gradient_norm"], 5e200, rtol=1e-14)
