"""Losses: entries and their derivatives against NumPy, reductions against their definitions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgru.losses import bernoulli_loss, categorical_loss, squared_loss

T, B, K = 4, 3, 5
REDUCTIONS = ("none", "sum", "mean", "batch_mean", "sequence_mean")
MASK = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], bool)  # the last row has no step


def softmax(o):
    e = np.exp(o - o.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def weights(reduction, mask):
    """What the reduction multiplies each entry by."""
    mask = np.float64(mask)
    per_row = np.maximum(mask.sum(0), 1)
    return {
        "none": mask,
        "sum": mask,
        "mean": mask / mask.sum(),
        "batch_mean": mask / B,
        "sequence_mean": mask / (B * per_row),
    }[reduction]


def make(name):
    """(function, outputs, targets, entries, derivative of an entry by the outputs)."""
    rng = np.random.default_rng(0)
    o = rng.normal(size=(T, B, K))
    if name == "categorical":
        y = rng.integers(0, K, (T, B))
        p, one_hot = softmax(o), np.eye(K)[y]
        return categorical_loss, o, y, -np.log((p * one_hot).sum(-1)), p - one_hot
    y = rng.integers(0, 2, (T, B, K)) * 1.0
    if name == "bernoulli":
        p = 1 / (1 + np.exp(-o))
        entries = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(-1)
        return bernoulli_loss, o, y, entries, p - y
    if name == "half_sum":
        loss = jax.tree_util.Partial(squared_loss, form="half_sum")
        return loss, o, y, 0.5 * ((o - y) ** 2).sum(-1), o - y
    return squared_loss, o, y, ((o - y) ** 2).mean(-1), 2 / K * (o - y)


@pytest.mark.usefixtures("x64", "uncompiled")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["categorical", "bernoulli", "half_sum", "mean"])
def test_every_reduction_weighs_every_entry_as_defined(name, masked):
    """Values and derivatives; NaN in all that does not count changes neither."""
    loss, o, y, entries, slopes = make(name)
    mask = MASK if masked else np.ones((T, B), bool)
    poisoned, targets = np.where(mask[..., None], o, np.nan), y
    if name != "categorical":
        targets = np.where(mask[..., None], y, np.nan)
    for reduction in REDUCTIONS:
        w = weights(reduction, mask)

        def total(outputs, reduction=reduction):
            given = jnp.asarray(mask) if masked else None
            value = loss(outputs, jnp.asarray(targets), given, reduction=reduction)
            return value.sum(), value

        (_, value), slope = jax.value_and_grad(total, has_aux=True)(jnp.asarray(poisoned))
        wanted = w * entries if reduction == "none" else (w * entries).sum()
        np.testing.assert_allclose(value, wanted, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(slope, w[..., None] * slopes, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("x64", "uncompiled")
@pytest.mark.parametrize("name", ["categorical", "bernoulli", "half_sum", "mean"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_axis_says_where_time_is(reduction, name):
    """From the front or from the end."""
    loss, o, y, entries, _ = make(name)
    wanted = weights(reduction, MASK) * entries
    wanted = wanted if reduction == "none" else wanted.sum()
    time_major = [jnp.asarray(v) for v in (o, y, MASK)]
    batch_major = [v.swapaxes(0, 1) for v in time_major]
    for axis in (0, -2):
        got = loss(*time_major, reduction=reduction, axis=axis)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
    for axis in (1, -1):
        got = loss(*batch_major, reduction=reduction, axis=axis)
        np.testing.assert_allclose(got.T, wanted, rtol=1e-12)


@pytest.mark.usefixtures("x64", "uncompiled")
@pytest.mark.parametrize("name", ["categorical", "bernoulli", "half_sum", "mean"])
def test_loss_of_one_entry_a_sequence_is_many_to_one(name):
    """Without an axis of time; and the mean over what counts by default."""
    loss, o, y, entries, _ = make(name)
    outputs, targets = jnp.asarray(o[0]), jnp.asarray(y[0])
    mask = jnp.asarray([True, False, True])
    for reduction in ("batch_mean", "sequence_mean"):
        got = loss(outputs, targets, reduction=reduction, axis=None)
        np.testing.assert_allclose(got, entries[0].mean(), rtol=1e-12)
        got = loss(outputs, targets, mask, reduction=reduction, axis=None)
        np.testing.assert_allclose(got, entries[0, ::2].sum() / B, rtol=1e-12)
        got = loss(outputs[:0], targets[:0], reduction=reduction, axis=None)
        assert got == 0
    np.testing.assert_allclose(loss(outputs, targets, mask), entries[0, ::2].mean(), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_summed_in_float32(dtype):
    """90,000 entries: their sum and their count are beyond float16."""
    logits, labels = np.zeros((300, 300, K), dtype=jnp.dtype(dtype)), np.zeros((300, 300), np.int32)
    counts = {"sum": 90_000, "mean": 1, "batch_mean": 300, "sequence_mean": 1}

    @jax.jit
    def run(logits):
        return {
            reduction: (
                categorical_loss(logits, labels, reduction=reduction),
                bernoulli_loss(logits, logits + 1, reduction=reduction),
                squared_loss(logits, logits + 1, reduction=reduction),
            )
            for reduction in counts
        }

    for reduction, losses in run(logits).items():
        assert {loss.dtype for loss in losses} == {jnp.dtype("float32")}
        wanted = np.array([np.log(K), K * np.log(2), 1]) * counts[reduction]
        np.testing.assert_allclose(losses, wanted, rtol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS[1:])
def test_loss_where_nothing_counts_is_zero(reduction):
    logits, mask = np.ones((T, B, K), np.float32), np.zeros((T, B), bool)
    assert bernoulli_loss(logits, 0 * logits, mask, reduction=reduction) == 0
    wrong = np.full((T, B), -7)  # what is masked needs no label
    assert categorical_loss(logits, wrong, jnp.asarray(mask), reduction=reduction) == 0


def test_logits_of_any_size_have_finite_losses():
    """From logits, not probabilities: exp(1e4) never appears."""
    logits = np.array([[1e4, -1e4]], np.float32)
    np.testing.assert_allclose(categorical_loss(logits, np.array([1])), 2e4)
    np.testing.assert_allclose(bernoulli_loss(logits, np.array([[0.0, 1.0]], np.float32)), 2e4)


@pytest.mark.usefixtures("x64", "uncompiled")
def test_every_label_from_zero_to_the_last_is_legal_and_so_is_none_at_all():
    _, o, _, _, _ = make("categorical")
    for label in (0, K - 1):
        found = categorical_loss(jnp.asarray(o[0]), jnp.full(B, label))
        np.testing.assert_allclose(found, -np.log(softmax(o[0])[:, label]).mean(), rtol=1e-12)
    assert categorical_loss(jnp.asarray(o[0, :0]), jnp.zeros(0, int)) == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
def test_labels_of_every_size_are_read_as_they_are(name):
    """With more classes than a narrow type counts; a wide one does not wrap into [0, K)."""
    logits = np.random.default_rng(0).normal(size=(3, 300))
    labels = np.array([127, 0, 5]).astype(name)
    wanted = -np.log(softmax(logits)[np.arange(3), labels.astype(int)])
    loss = functools.partial(categorical_loss, jnp.asarray(logits), reduction="none")
    for found in (loss(labels), loss(jnp.asarray(labels)), jax.jit(loss)(labels)):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    info, count = np.iinfo(name), 300 if np.iinfo(name).max > 300 else 100
    outside = {info.min if info.min else count, min(info.max, 2**32 + 5), count}
    for label in outside:
        labels = np.array([1, 2, label]).astype(name)
        few = functools.partial(categorical_loss, jnp.asarray(logits[:, :count]), reduction="none")
        assert np.isnan(jax.jit(few)(labels)).tolist() == [False, False, True]
        for given in (labels, jnp.asarray(labels)):
            with pytest.raises(ValueError, match=rf"labels must be in \[0, {count}\), got "):
                few(given)


def test_traced_label_that_is_none_of_the_classes_makes_its_loss_nan():
    """Those below zero, too, which would count from the end as indices do."""
    loss = functools.partial(categorical_loss, reduction="none")
    labels = np.array([0, -1, -K, K, -K - 1, K - 1])
    found = jax.jit(loss)(np.ones((6, K), np.float32), labels)
    assert np.isnan(found).tolist() == [False, True, True, True, True, False]
    wide = np.array([2**32 + 1, 1])  # in NumPy, where the mask alone is traced
    found = jax.jit(lambda mask: loss(np.ones((2, K), np.float32), wide, mask))(np.ones(2, bool))
    assert np.isnan(found).tolist() == [True, False]


def test_masked_labels_may_have_any_value():
    """Their gradient is zero and that of the others is as without them, traced or not."""
    logits = np.random.default_rng(0).normal(size=(4, K)).astype(np.float32)
    labels, mask = np.array([1, -100, K, 0]), np.array([True, False, False, True])
    run = jax.value_and_grad(categorical_loss)
    wanted, slope = run(logits[::3], labels[::3])
    for given in (run, jax.jit(run), lambda *v: jax.jit(lambda m: run(*v[:2], m))(v[2])):
        value, gradient = given(logits, labels, mask)
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
        np.testing.assert_allclose(gradient[::3], slope, rtol=1e-6)
        assert not gradient[1:3].any()


@pytest.mark.parametrize("reduction", ["batch_mean", "sequence_mean"])
def test_losses_of_one_axis_need_to_know_which_it_is(reduction):
    """Of one sequence of T steps the mean over sequences is over one; of B sequences over B."""
    entries = np.float32([1, 2, 6])
    run = functools.partial(squared_loss, np.sqrt(entries)[:, None], np.zeros((3, 1), np.float32))
    message = (
        f"squared_loss: axis must be given for reduction='{reduction}' of losses with one axis"
    )
    with pytest.raises(ValueError, match=message):
        run(reduction=reduction)
    found = run(reduction=reduction, axis=0)
    np.testing.assert_allclose(found, 9 if reduction == "batch_mean" else 3, rtol=1e-6)
    np.testing.assert_allclose(run(reduction=reduction, axis=None), 3, rtol=1e-6)
    np.testing.assert_allclose(run(reduction="sum"), 9, rtol=1e-6)


LOGITS, Y = np.ones((T, B, K), np.float32), np.ones((T, B), int)


@pytest.mark.parametrize(
    ("run", "kind", "message"),
    [
        (lambda: categorical_loss(LOGITS, Y[1:]), ValueError,
         "categorical_loss: labels must have shape (4, 3) (one for each loss), got (3, 3)."),
        (lambda: categorical_loss(LOGITS, LOGITS), TypeError,
         "categorical_loss: labels must be an integer array, got dtype float32."),
        (lambda: categorical_loss(Y, Y), TypeError,
         "categorical_loss: logits must be a floating array, got dtype int64; cast it first."),
        (lambda: bernoulli_loss(LOGITS, LOGITS[1:]), ValueError,
         "bernoulli_loss: targets must have shape (4, 3, 5) (that of logits), got (3, 3, 5)."),
        (lambda: bernoulli_loss(LOGITS, Y[..., None]), TypeError,
         "bernoulli_loss: targets must be a floating array, got dtype int64; cast it first."),
        (lambda: squared_loss(LOGITS, LOGITS.astype(jnp.bfloat16)), TypeError,
         "squared_loss: targets must have the dtype of outputs, float32, got bfloat16; cast "
         "one of them."),
        (lambda: squared_loss(LOGITS, LOGITS, form="half"), ValueError,
         "squared_loss: form must be one of 'mean', 'half_sum', got 'half'."),
        (lambda: squared_loss(LOGITS, LOGITS, reduction="avg"), ValueError,
         "squared_loss: reduction must be one of 'none', 'sum', 'mean', 'batch_mean', "
         "'sequence_mean', got 'avg'."),
        (lambda: squared_loss(LOGITS, LOGITS, np.ones((T, 1), bool)), ValueError,
         "squared_loss: mask must have shape (4, 3) (one for each loss), got (4, 1)."),
        (lambda: squared_loss(LOGITS, LOGITS, np.ones((T, B), np.float32)), TypeError,
         "squared_loss: mask must be a bool array, got float32; length_mask makes one from "
         "lengths."),
        (lambda: squared_loss(np.ones((), np.float32), np.ones((), np.float32)), ValueError,
         "squared_loss: outputs must have shape [..., K], got ()."),
        (lambda: squared_loss(LOGITS[0, 0], LOGITS[0, 0], reduction="batch_mean"), ValueError,
         "squared_loss: axis must name the axis of time of the losses for "
         "reduction='batch_mean', or be None, got 0 for shape ()."),
        (lambda: categorical_loss(LOGITS, Y * K), ValueError,
         "categorical_loss: labels must be in [0, 5), got 5 to 5; mask entries that do not count."),
        (lambda: categorical_loss(LOGITS, Y - 2), ValueError,
         "categorical_loss: labels must be in [0, 5), got -1 to -1; mask entries that do not "
         "count."),
        (lambda: categorical_loss(np.ones((), np.float32), Y), ValueError,
         "categorical_loss: logits must have shape [..., K], got ()."),
        (lambda: categorical_loss(LOGITS, Y > 0), TypeError,
         "categorical_loss: labels must be an integer array, got dtype bool."),
        (lambda: squared_loss(LOGITS, LOGITS, reduction="batch_mean", axis="last"), ValueError,
         "squared_loss: axis must name the axis of time of the losses for "
         "reduction='batch_mean', or be None, got 'last' for shape (4, 3)."),
        (lambda: categorical_loss(LOGITS, [1]), TypeError,
         "categorical_loss: labels must be an integer array, got list."),
        (lambda: bernoulli_loss([1.0], LOGITS), TypeError,
         "bernoulli_loss: logits must be an array, got list; convert it with jnp.asarray."),
        (lambda: squared_loss(LOGITS[0, 0], LOGITS[0, 0], reduction="sequence_mean"), ValueError,
         "squared_loss: axis must name the axis of time of the losses for "
         "reduction='sequence_mean', or be None, got 0 for shape ()."),
        (lambda: bernoulli_loss(LOGITS, LOGITS, reduction="batch_mean", axis=2), ValueError,
         "bernoulli_loss: axis must name the axis of time of the losses for "
         "reduction='batch_mean', or be None, got 2 for shape (4, 3)."),
        (lambda: categorical_loss(LOGITS, Y, reduction="batch_mean", axis=-3), ValueError,
         "categorical_loss: axis must name the axis of time of the losses for "
         "reduction='batch_mean', or be None, got -3 for shape (4, 3)."),
        (lambda: categorical_loss(LOGITS, Y, Y), TypeError,
         "categorical_loss: mask must be a bool array, got int64; "
         "length_mask makes one from lengths."),
        (lambda: categorical_loss(LOGITS, Y, reduction="avg"), ValueError,
         "categorical_loss: reduction must be one of 'none', 'sum', 'mean', 'batch_mean', "
         "'sequence_mean', got 'avg'."),
        (lambda: bernoulli_loss(LOGITS, LOGITS, reduction="avg"), ValueError,
         "bernoulli_loss: reduction must be one of 'none', 'sum', 'mean', 'batch_mean', "
         "'sequence_mean', got 'avg'."),
    ],
)  # fmt: skip
def test_bad_call_says_what_was_expected_and_what_came(run, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        run()
