"""The token model: its equations against NumPy, its loss against the definition, its sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import forward

from jaxgru import (
    CHO_2014,
    CHUNG_2014,
    PYTORCH,
    final_outputs,
    generate,
    gru_cell,
    gru_stack,
    init_sequence_model,
    init_state,
    init_token_model,
    length_mask,
    sequence_outputs,
    token_logits,
    token_loss,
)

quickly = pytest.mark.usefixtures("quick_compilation")

V, E, H = 7, 3, 5


def make(embedding_size=E, seed=0):
    key, key_b = jax.random.split(jax.random.key(seed))
    params = init_token_model(key, V, H, embedding_size=embedding_size, scheme="pytorch")
    return params._replace(b=jax.random.normal(key_b, (V,)))


def make_tokens(shape, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, V)


def by_hand(params, tokens, spec):
    """Logits in NumPy: a table look-up or a one-hot row, the oracle's recurrence, the head."""
    p = jax.tree.map(np.float64, params)
    table = np.eye(V) if p.embedding is None else p.embedding
    xs = table[np.asarray(tokens)]
    _, hs, _ = forward(p.layers[0], spec, xs, np.zeros((xs.shape[1], H)))
    return hs @ p.w + p.b


@quickly
@pytest.mark.parametrize("spec", [CHUNG_2014, PYTORCH])
@pytest.mark.parametrize("embedding_size", [None, E])
def test_logits_equal_the_equations_in_numpy(embedding_size, spec):
    params, tokens = make(embedding_size), make_tokens((6, 2))
    logits = token_logits(params, tokens, spec=spec)[1]
    # 1e-5: float32 against float64 over six steps.
    np.testing.assert_allclose(logits, by_hand(params, tokens, spec), rtol=1e-5, atol=1e-5)


@quickly
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_the_cross_entropy_of_the_counted_targets(reduction, masked):
    params, tokens, targets = make(), make_tokens((6, 2)), make_tokens((6, 2), seed=2)
    mask = np.ones((6, 2), bool)
    if masked:
        mask[4:, 0] = False  # a suffix: held steps come after every counted one of that row
    loss = token_loss(
        params, tokens, targets, reduction=reduction, mask=jnp.array(mask) if masked else None
    )[0]
    logits = by_hand(params, tokens, CHO_2014)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    expected = -picked[mask].sum() / (mask.sum() if reduction == "mean" else 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_of_half_types_is_summed_in_float32(dtype, masked):
    """80,000 targets: their sum and even their count are beyond float16."""
    params = init_token_model(jax.random.key(0), V, 2, dtype=dtype)
    params = params._replace(w=jnp.zeros_like(params.w))
    tokens = jnp.zeros((4, 20000), int)
    mask = jnp.ones(tokens.shape, bool) if masked else None
    loss = token_loss(params, tokens, tokens, mask=mask)[0]
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(V), rtol=1e-5)


@quickly
def test_loss_without_a_counted_target_is_zero_with_zero_gradient():
    params, tokens = make(), make_tokens((3, 2))
    mask = jnp.zeros((3, 2), bool)
    loss, grads = jax.value_and_grad(lambda p: token_loss(p, tokens, tokens, mask=mask)[0])(params)
    assert loss == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


@quickly
def test_padding_tokens_change_no_loss_and_no_gradient():
    params, tokens, targets = make(), make_tokens((5, 2)), make_tokens((5, 2), seed=2)
    mask = jnp.ones((5, 2), bool).at[3:, 1].set(False)
    run = jax.jit(jax.value_and_grad(lambda p, x, y: token_loss(p, x, y, mask=mask)[0]))
    first = run(params, tokens, targets)
    second = run(params, tokens.at[3:, 1].set(0), targets.at[4:, 1].set(6))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        np.testing.assert_array_equal(a, b)


@quickly
def test_carried_state_makes_two_halves_one_sequence():
    params, tokens, targets = make(), make_tokens((6, 2)), make_tokens((6, 2), seed=2)
    whole = token_loss(params, tokens, targets, reduction="sum")[0]
    first, h = token_loss(params, tokens[:3], targets[:3], reduction="sum")
    second, _ = token_loss(params, tokens[3:], targets[3:], h, reduction="sum")
    np.testing.assert_allclose(first + second, whole, rtol=1e-6)


@quickly
def test_model_learns_a_cycle_through_the_handwritten_gradient():
    tokens = jnp.arange(40)[:, None] % 4
    params = init_token_model(jax.random.key(0), V, H)
    optimizer = optax.sgd(0.5, momentum=0.9)

    @jax.jit
    def update(params, opt_state):
        loss, grads = jax.value_and_grad(lambda p: token_loss(p, tokens[:-1], tokens[1:])[0])(
            params
        )
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = optimizer.init(params)
    for _ in range(150):
        params, opt_state, loss = update(params, opt_state)
    assert loss < 0.05
    drawn = generate(params, jax.random.key(1), jnp.array([0, 1]), 6, temperature=0.0)[1]
    assert drawn.tolist() == [2, 3, 0, 1, 2, 3]


def test_greedy_generation_is_the_argmax_step_by_step():
    params, prompt = make(), jnp.array([1, 4, 2])
    h = jnp.zeros(H)
    for token in prompt:
        h = gru_cell(params.layers[0], params.embedding[token], h, spec=PYTORCH)
    expected = []
    for _ in range(5):
        token = jnp.argmax(h @ params.w + params.b)
        expected.append(int(token))
        h = gru_cell(params.layers[0], params.embedding[token], h, spec=PYTORCH)
    drawn = generate(params, jax.random.key(0), prompt, 5, temperature=0.0, spec=PYTORCH)[1]
    assert drawn.tolist() == expected


def test_generation_goes_on_from_its_state_and_last_token():
    params, key = make(), jax.random.key(0)
    whole = generate(params, key, jnp.array([1, 4]), 8, temperature=0.0)[1]
    h, first = generate(params, key, jnp.array([1, 4]), 5, temperature=0.0)
    rest = generate(params, key, first[-1:], 3, h0=h, temperature=0.0)[1]
    assert [*first.tolist(), *rest.tolist()] == whole.tolist()


def test_draws_follow_the_softmax_at_the_temperature():
    params = make()
    prompt = jnp.full((1, 4000), 3)
    drawn = np.asarray(generate(params, jax.random.key(5), prompt, 1, temperature=0.7)[1][0])
    logits = by_hand(params, prompt[:, :1], CHO_2014)[0, 0] / 0.7
    p = np.exp(logits) / np.exp(logits).sum()
    # Four standard deviations of a frequency over 4000 draws.
    bound = 4 * np.sqrt(p * (1 - p) / 4000)
    assert np.all(np.abs(np.bincount(drawn, minlength=V) / 4000 - p) < bound)


def frequencies(params, **options):
    """Of each token among 4000 draws after one token 3, beside its probability in NumPy."""
    prompt = jnp.full((1, 4000), 3)
    drawn = np.asarray(generate(params, jax.random.key(5), prompt, 1, **options)[1][0])
    logits = by_hand(params, prompt[:, :1], CHO_2014)[0, 0]
    p = np.exp(logits) / np.exp(logits).sum()
    return np.bincount(drawn, minlength=V) / 4000, p


@pytest.mark.parametrize("k", [1, 3, V, 50])
def test_top_k_draws_from_the_k_likeliest_alone(k):
    found, p = frequencies(make(), top_k=k)
    chosen = np.argsort(-p)[:k]
    wanted = np.zeros(V)
    wanted[chosen] = p[chosen] / p[chosen].sum()
    assert np.all((found > 0) <= (wanted > 0))
    assert np.all(np.abs(found - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 4000) + 1e-9)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_top_p_draws_from_the_smallest_set_that_reaches_p(top_p):
    found, p = frequencies(make(), top_p=top_p)
    order = np.argsort(-p)
    count = int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-6)) + 1
    wanted = np.zeros(V)
    wanted[order[:count]] = p[order[:count]] / p[order[:count]].sum()
    assert np.all((found > 0) <= (wanted > 0))
    assert np.all(np.abs(found - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 4000) + 1e-9)


def test_generation_compiles_once_for_all_temperatures_and_filters():
    from jaxgru.models import _generate

    params, key, prompt = make(), jax.random.key(0), jnp.array([1, 2])
    before = _generate._cache_size()
    for temperature, k, p in ((1.0, 2, 0.5), (0.5, 3, 0.9)):
        generate(params, key, prompt, 3, temperature=temperature, top_k=k, top_p=p)
    assert _generate._cache_size() == before + 1
    generate(params, key, prompt, 3, temperature=0.0)  # draws nothing: a program of its own
    assert _generate._cache_size() == before + 2


@quickly
@pytest.mark.parametrize("num_steps", [4, 2 * V], ids=["products", "table"])
def test_deep_generation_is_the_model_run_step_by_step(num_steps):
    """Two layers, a batch of prompts, residual, zoneout's mean: greedy tokens from the logits.

    With as many steps as tokens what the first layer makes of a token is looked up in a table.
    """
    params = init_token_model(jax.random.key(0), V, H, embedding_size=E, num_layers=2)
    prompt, options = make_tokens((3, 2)), {"residual": True, "zoneout": 0.2}
    key = jax.random.key(0)
    h, drawn = generate(params, key, prompt, num_steps, temperature=0.0, **options)
    tokens = jnp.concatenate([prompt, drawn[:-1]])
    h_last, logits = token_logits(params, tokens, deterministic=True, **options)
    np.testing.assert_array_equal(logits[2:].argmax(-1), drawn)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), h, h_last)


@quickly
def test_prompts_of_several_lengths_go_on_from_their_own_ends():
    params = init_token_model(jax.random.key(0), V, H, embedding_size=E, num_layers=2)
    prompt, lengths = make_tokens((4, 2)), [2, 4]
    options = {"temperature": 0.0, "residual": True}
    mask = length_mask(lengths, 4)
    _, drawn = generate(params, jax.random.key(0), prompt, 5, mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = generate(params, jax.random.key(0), prompt[:length, row], 5, **options)[1]
        np.testing.assert_array_equal(drawn[:, row], alone)


@quickly
def test_batch_major_loss_is_the_time_major_one():
    params, tokens, targets = make(), make_tokens((6, 2)), make_tokens((6, 2), seed=2)
    mask = length_mask([2, 6], 6)
    for reduction in ("mean", "batch_mean", "sequence_mean"):
        wanted = token_loss(params, tokens, targets, mask=mask, reduction=reduction)[0]
        got = token_loss(params, tokens.T, targets.T, mask=mask.T, reduction=reduction, axis=1)[0]
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@quickly
@pytest.mark.parametrize("merge", ["concat", "sum"])
@pytest.mark.parametrize("residual", [False, True])
def test_final_output_reads_the_last_real_step_of_each_direction(merge, residual):
    """From the outputs of all steps: forward's at the row's end, backward's at its start."""
    sizes = {"num_layers": 2, "bidirectional": True, "merge": merge}
    params = init_sequence_model(jax.random.key(0), E, H, 2, scheme="pytorch", **sizes)
    xs, lengths = jax.random.normal(jax.random.key(1), (5, 2, E)), [3, 5]
    options = {"merge": merge, "residual": residual}
    _, outputs = final_outputs(params, xs, mask=length_mask(lengths, 5), **options)
    for row, length in enumerate(lengths):
        h_last, ys = gru_stack(params.layers, xs[:length, row], **options)
        if merge == "concat":
            top = jnp.concatenate([ys[-1, :H], ys[0, H:]])
        else:
            top = sum(f + b for f, b in h_last) if residual else h_last[-1][0] + h_last[-1][1]
        np.testing.assert_allclose(outputs[row], top @ params.w + params.b, atol=1e-6)


@quickly
def test_dropout_before_the_head_scales_what_it_reads():
    """A head that sums: each output is the sum of the kept entries times 1 / (1 - rate)."""
    params = init_sequence_model(jax.random.key(0), E, H, 1)
    params = params._replace(w=jnp.ones((H, 1)))
    xs = jax.random.normal(jax.random.key(1), (5, 200, E))
    h_last, clean = final_outputs(params, xs)
    key = jax.random.key(2)
    _, noisy = final_outputs(params, xs, output_dropout=0.5, key=key)
    kept = jax.random.bernoulli(jax.random.split(key)[1], 0.5, (200, H))
    wanted = jnp.where(kept, 2 * h_last[0], 0.0).sum(-1, keepdims=True)
    np.testing.assert_allclose(noisy, wanted, atol=1e-5)
    _, same = final_outputs(params, xs, output_dropout=0.5, deterministic=True)
    np.testing.assert_array_equal(same, clean)
    with pytest.raises(ValueError, match=r"final_outputs: key must be .* for output_dropout=0.5"):
        final_outputs(params, xs, output_dropout=0.5)


def test_sequence_outputs_are_the_head_of_every_step():
    params = init_sequence_model(jax.random.key(0), E, H, 2, scheme="pytorch")
    params = params._replace(b=jnp.array([1.0, -1.0]))
    xs = jax.random.normal(jax.random.key(1), (5, 2, E))
    h_last, outputs = sequence_outputs(params, xs)
    _, hs, _ = forward(params.layers[0], CHO_2014, xs, np.zeros((2, H)))
    np.testing.assert_allclose(outputs, hs @ np.asarray(params.w) + [1, -1], atol=1e-5)
    np.testing.assert_allclose(h_last[0], hs[-1], atol=1e-5)
    assert jax.tree.structure(h_last) == jax.tree.structure(init_state(params.layers, (2,)))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p: init_token_model(jax.random.key(0), 0, H), ValueError, "vocab_size must be at"),
        (
            lambda p: init_token_model(jax.random.key(0), V, H, embedding_size=0),
            ValueError,
            "embedding_size must be at least 1, got 0",
        ),
        (lambda p: token_logits(p, jnp.ones(3)), TypeError, "tokens must be an integer array, got"),
        (lambda p: token_logits(p, [1, 2]), TypeError, "got list"),
        (
            lambda p: token_loss(p, jnp.ones(3, int), jnp.ones(2, int)),
            ValueError,
            r"targets must have the shape of tokens, \(3,\), got \(2,\)",
        ),
        (
            lambda p: token_loss(p, jnp.ones(3, int), jnp.ones(3, int), reduction="avg"),
            ValueError,
            "token_loss: reduction must be one of 'none', 'sum', 'mean', .*, got 'avg'",
        ),
        (
            lambda p: generate(p, jax.random.key(0), jnp.array([V]), 1),
            ValueError,
            r"prompt must hold tokens in \[0, 7\), got 7 to 7",
        ),
        (
            lambda p: generate(p, jax.random.key(0), jnp.array([], int), 1),
            ValueError,
            "prompt must hold at least one token",
        ),
        (
            lambda p: generate(p, jax.random.key(0), jnp.array([1]), 1, temperature=-1.0),
            ValueError,
            "temperature must be finite and >= 0, got -1.0",
        ),
        (
            lambda p: generate(p, jax.random.key(0), jnp.array([1]), 0),
            ValueError,
            "num_steps must be at least 1, got 0",
        ),
        (
            lambda p: generate(p, jax.random.key(0), jnp.array([1]), 1, top_k=0),
            ValueError,
            "generate: top_k must be at least 1, got 0",
        ),
        (
            lambda p: generate(
                p, jax.random.key(0), jnp.ones((2, 2), int), 1, mask=length_mask([0, 2], 2)
            ),
            ValueError,
            "generate: mask must be True on a token of every prompt",
        ),
        (
            lambda p: generate(p, jax.random.key(0), jnp.array([1]), 1, top_p=1.5),
            ValueError,
            r"generate: top_p must be in \(0, 1\], got 1.5",
        ),
        (
            lambda p: sequence_outputs(
                init_sequence_model(jax.random.key(0), 2, 3, 1, bidirectional=True, merge="sum"),
                jnp.ones((4, 2)),
            ),
            ValueError,
            r"sequence_outputs: params.w must have 6 rows .*merge='concat'\), got 3; pass",
        ),
        (
            lambda p: final_outputs(p, jnp.ones((4, 2))),
            TypeError,
            "final_outputs: params must be a SequenceParams, got TokenParams",
        ),
        (
            lambda p: generate(
                init_token_model(jax.random.key(0), V, H, bidirectional=True),
                jax.random.key(0),
                jnp.array([1]),
                1,
            ),
            ValueError,
            "generate: params must hold layers of one direction",
        ),
        (
            lambda p: init_sequence_model(jax.random.key(0), 2, 3, 0),
            ValueError,
            "output_size must be at least 1, got 0",
        ),
    ],
)
def test_bad_call_names_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call(make())
