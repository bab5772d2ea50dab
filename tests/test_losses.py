"""Losses: entries and their derivatives against NumPy, reductions against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgru import bernoulli_loss, categorical_loss, squared_loss

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


@pytest.mark.usefixtures("x64", "quick_compilation")
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


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_axis_says_where_time_is(reduction):
    logits = jax.random.normal(jax.random.key(0), (T, B, K))
    labels, mask = jnp.ones((T, B), int), jnp.asarray(MASK)
    wanted = categorical_loss(logits, labels, mask, reduction=reduction)
    batch_major = (logits.swapaxes(0, 1), labels.T, mask.T)
    got = categorical_loss(*batch_major, reduction=reduction, axis=1)
    np.testing.assert_allclose(got.T, wanted, rtol=1e-6)
    if reduction in ("batch_mean", "sequence_mean"):
        many_to_one = categorical_loss(logits[0], labels[0], reduction=reduction, axis=None)
        np.testing.assert_allclose(many_to_one, categorical_loss(logits[0], labels[0]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "mean", "batch_mean", "sequence_mean"])
def test_half_types_are_summed_in_float32(dtype, reduction):
    """90,000 entries: their sum and their count are beyond float16."""
    logits, labels = jnp.zeros((300, 300, K), dtype), jnp.zeros((300, 300), int)
    loss = categorical_loss(logits, labels, reduction=reduction)
    assert loss.dtype == jnp.float32
    entries = {"sum": 90_000, "mean": 1, "batch_mean": 300, "sequence_mean": 1}[reduction]
    np.testing.assert_allclose(loss, entries * np.log(K), rtol=1e-5)
    ones = jnp.ones((300, 300, K), dtype)
    assert bernoulli_loss(logits, ones, reduction=reduction).dtype == jnp.float32
    np.testing.assert_allclose(squared_loss(logits, ones, reduction=reduction), entries, rtol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS[1:])
def test_loss_where_nothing_counts_is_zero(reduction):
    logits, mask = jnp.ones((T, B, K)), jnp.zeros((T, B), bool)
    targets = jnp.zeros((T, B, K))
    assert bernoulli_loss(logits, targets, mask, reduction=reduction) == 0


def test_logits_of_any_size_have_finite_losses():
    """From logits, not probabilities: exp(1e4) never appears."""
    logits = jnp.array([[1e4, -1e4]])
    np.testing.assert_allclose(categorical_loss(logits, jnp.array([1])), 2e4)
    np.testing.assert_allclose(bernoulli_loss(logits, jnp.array([[0.0, 1.0]])), 2e4)


def test_loss_of_one_entry_a_sequence_is_many_to_one():
    logits, labels = jnp.zeros((B, K)), jnp.zeros(B, int)
    np.testing.assert_allclose(categorical_loss(logits, labels), np.log(K), rtol=1e-6)
    total = categorical_loss(logits, labels, jnp.array([True, False, True]), reduction="sum")
    np.testing.assert_allclose(total, 2 * np.log(K), rtol=1e-6)


LOGITS, Y = jnp.ones((T, B, K)), jnp.ones((T, B), int)


@pytest.mark.parametrize(
    ("run", "error", "match"),
    [
        (lambda: categorical_loss(LOGITS, Y[1:]), ValueError,
         r"categorical_loss: labels must have shape \(4, 3\), got \(3, 3\)"),
        (lambda: categorical_loss(LOGITS, LOGITS), TypeError, "labels must be an integer array"),
        (lambda: categorical_loss(Y, Y), TypeError, "logits must be a floating array"),
        (lambda: bernoulli_loss(LOGITS, LOGITS[1:]), ValueError,
         "bernoulli_loss: targets must have shape"),
        (lambda: bernoulli_loss(LOGITS, Y[..., None]), TypeError,
         "targets must be a floating array"),
        (lambda: squared_loss(LOGITS, LOGITS.astype(jnp.bfloat16)), TypeError,
         "targets must have the dtype of outputs, float32, got bfloat16"),
        (lambda: squared_loss(LOGITS, LOGITS, form="half"), ValueError,
         "form must be one of 'mean', 'half_sum', got 'half'"),
        (lambda: squared_loss(LOGITS, LOGITS, reduction="avg"), ValueError,
         "reduction must be one of"),
        (lambda: squared_loss(LOGITS, LOGITS, jnp.ones((T, 1), bool)), ValueError,
         r"mask must have shape \(4, 3\) \(one entry a loss\), got \(4, 1\)"),
        (lambda: squared_loss(LOGITS, LOGITS, jnp.ones((T, B))), TypeError,
         "mask must be a bool array"),
        (lambda: squared_loss(jnp.ones(()), jnp.ones(())), ValueError, "outputs must have shape"),
        (lambda: squared_loss(LOGITS[0, 0], LOGITS[0, 0], reduction="batch_mean"), ValueError,
         r"squared_loss: axis must name the axis of time .*'batch_mean', or be None, got 0"),
        (lambda: categorical_loss(LOGITS, Y * K), ValueError,
         r"labels must lie in \[0, 5\) where they count, got 5 to 5; mask what has no label"),
        (lambda: categorical_loss(LOGITS, Y - 2), ValueError, "got -1 to -1"),
    ],
)  # fmt: skip
def test_bad_call_says_what_was_expected_and_what_came(run, error, match):
    with pytest.raises(error, match=match):
        run()
