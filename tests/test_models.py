"""The token model: its equations against NumPy, its loss against the definition, its sampling."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close, flat, make_problem
from oracle import forward

import jaxgru
from jaxgru import (
    CHO_2014,
    CHUNG_2014,
    PYTORCH,
    Bidirectional,
    Dropout,
    GRUParams,
    GRUSpec,
    Noise,
    gru_stack,
    init_state,
    length_mask,
    models,
)
from jaxgru.models import (
    SequenceParams,
    TokenParams,
    final_outputs,
    init_sequence_model,
    init_token_model,
    sequence_outputs,
    token_loss,
)

generate = flat(models.generate)
token_logits = flat(models.token_logits)

V, E, H, T, B = 7, 2, 3, 7, 3
KEY = jax.random.key(0)

# float64 where nothing else is said, and the shapes of other files' tests.
eagerly = pytest.mark.usefixtures("x64", "uncompiled")


def draw(seed, *shape, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def make(*, one_hot=False, num_layers=1, dtype=np.float64):
    """A token model without a random key of JAX."""
    sizes = [V if one_hot else E, *[H] * (num_layers - 1)]
    layers = (make_problem(n, inputs=size, dtype=dtype).params for n, size in enumerate(sizes))
    embedding = None if one_hot else draw(10, V, E, dtype=dtype)
    return TokenParams(
        embedding, tuple(layers), draw(11, H, V, dtype=dtype), draw(12, V, dtype=dtype)
    )


def make_outputs(sizes, *, num_outputs=2):
    """A sequence model of layers that are pairs where a size is negative."""
    layers = []
    for n, size in enumerate(sizes):
        pair = [make_problem(n + 10 * way, inputs=abs(size)).params for way in range(2)]
        layers.append(Bidirectional(*pair) if size < 0 else pair[0])
    return tuple(layers), draw(13, num_outputs)


def make_tokens(seed=1, steps=T):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (steps, B)))


def by_hand(params, tokens, spec=CHO_2014):
    """Logits in NumPy: a table look-up or a one-hot row, the oracle's recurrence, the head."""
    p = jax.tree.map(np.float64, params)
    table = np.eye(V) if p.embedding is None else p.embedding
    xs = table[np.asarray(tokens)]
    _, hs, _ = forward(p.layers[0], spec, xs, np.zeros((xs.shape[1], H)))
    return hs @ p.w + p.b


# Draws, logits and losses.


@pytest.mark.parametrize(("merge", "rows"), [(None, 6), ("sum", 3)])
def test_drawn_models_have_the_documented_sizes(merge, rows):
    """Of two directions, one beside the other by default; float32 by default."""
    options = {"num_layers": 2, "bidirectional": True} | ({"merge": merge} if merge else {})
    for dtype in (None, jnp.bfloat16):
        given = options | ({"dtype": dtype} if dtype else {})
        tokens, outputs = (
            jax.eval_shape(functools.partial(init, **given), KEY)
            for init in (
                lambda key, **given: init_token_model(key, V, H, embedding_size=E, **given),
                lambda key, **given: init_sequence_model(key, E, H, V, **given),
            )
        )
        for params in (tokens, outputs):
            assert (params.w.shape, params.b.shape) == ((rows, V), (V,))
            assert params.layers[0].forward.w_x.shape == (E, 3 * H) and len(params.layers) == 2
            assert {v.dtype for v in jax.tree.leaves(params)} == {jnp.dtype(dtype or "float32")}
        assert tokens.embedding.shape == (V, E)
    one_hot = jax.eval_shape(lambda key: init_token_model(key, V, H), KEY)
    assert one_hot.embedding is None and one_hot.layers[0].w_x.shape == (V, 3 * H)


def test_drawn_models_have_the_documented_distributions():
    """A standard normal embedding, and heads that are LeCun normal without a bias."""
    tokens = init_token_model(KEY, 1000, 48, embedding_size=48)
    outputs = init_sequence_model(KEY, 48, 48, 1000)
    np.testing.assert_allclose(np.std(tokens.embedding), 1, rtol=0.02)
    for params in (tokens, outputs):
        np.testing.assert_allclose(np.std(params.w), 48**-0.5, rtol=0.02)
        assert not np.any(params.b)


@eagerly
@pytest.mark.parametrize("spec", [CHUNG_2014, PYTORCH], ids=["chung", "pytorch"])
@pytest.mark.parametrize("one_hot", [False, True])
def test_logits_equal_the_equations_in_numpy(one_hot, spec):
    params, tokens = make(one_hot=one_hot), make_tokens()
    h_last, logits = token_logits(params, tokens, spec=spec)
    assert_close(logits, by_hand(params, tokens, spec), 1e-13)
    assert jax.tree.structure(h_last) == jax.tree.structure(init_state(params.layers, (B,)))


@eagerly
@pytest.mark.parametrize("reduction", [None, "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_the_cross_entropy_of_the_counted_targets(reduction, masked):
    """The mean over them by default."""
    params, tokens, targets = make(), make_tokens(), make_tokens(seed=2)
    mask = np.ones((T, B), bool)
    if masked:
        mask[4:, 0] = False  # a suffix: masked steps come after every counted one of that row
    options = {"mask": jnp.asarray(mask) if masked else None}
    options |= {"reduction": reduction} if reduction else {}
    loss = token_loss(params, tokens, targets, **options)[0]
    logits = by_hand(params, tokens)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = mask * -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    wanted = {None: picked.sum() / mask.sum(), "sum": picked.sum(), "none": picked}[reduction]
    np.testing.assert_allclose(loss, wanted, rtol=1e-13)


@pytest.mark.parametrize(("dtype", "masked"), [("float16", False), ("bfloat16", True)])
def test_loss_of_half_types_is_summed_in_float32(dtype, masked):
    """80,000 targets: their sum and even their count are beyond float16."""
    params = make(dtype=jnp.dtype(dtype))
    params = params._replace(w=jnp.zeros_like(params.w), b=jnp.zeros_like(params.b))
    tokens = np.zeros((4, 20000), np.int32)
    mask = np.ones(tokens.shape, bool) if masked else None
    loss = jax.jit(lambda params: token_loss(params, tokens, tokens, mask=mask)[0])(params)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(V), rtol=1e-5)


@eagerly
def test_loss_without_a_counted_target_is_zero_with_zero_gradient():
    params, tokens = make(), make_tokens()
    mask = jnp.zeros((T, B), bool)
    loss, grads = jax.value_and_grad(lambda p: token_loss(p, tokens, tokens, mask=mask)[0])(params)
    assert loss == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_padding_tokens_change_no_loss_and_no_gradient(optimized):
    """To the bit, in one compiled program."""
    params, mask = make(dtype=np.float32), np.ones((T, B), bool)
    mask[3:, 1] = False
    run = jax.jit(jax.value_and_grad(lambda p, x, y: token_loss(p, x, y, mask=mask)[0]))
    tokens, targets = (np.array(make_tokens(seed)) for seed in (1, 2))
    first = run(params, tokens, targets)
    tokens[3:, 1], targets[4:, 1] = 0, 6
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(run(params, tokens, targets))):
        np.testing.assert_array_equal(a, b)


@eagerly
def test_carried_state_makes_two_parts_one_sequence():
    params, parts = make(), (make_tokens(), make_tokens(seed=2))
    first, h = token_loss(params, parts[0], parts[0], reduction="sum")
    second, _ = token_loss(params, parts[1], parts[1], h, reduction="sum")
    tokens = np.concatenate(parts)
    logits = by_hand(params, tokens)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    whole = -np.take_along_axis(log_p, tokens[..., None], -1).sum()
    np.testing.assert_allclose(first + second, whole, rtol=1e-13)


def test_model_learns_a_cycle_through_the_handwritten_gradient():
    tokens = np.arange(40)[:, None] % 4
    params = make(dtype=np.float32)
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
    drawn = generate(params, KEY, np.array([0, 1]), 6, temperature=0.0)[1]
    assert drawn.tolist() == [2, 3, 0, 1, 2, 3]


# Tokens of every size, and those that are none.


def test_tokens_of_eight_bits_are_those_of_thirty_two():
    """Of 257 one-hot rows: as the embedding that is the identity; and of an embedding of 128."""
    few = make_problem(0, inputs=257, dtype=np.float32).params
    head = draw(1, H, 257, dtype=np.float32), draw(2, 257, dtype=np.float32)
    one_hot, table = (TokenParams(e, (few,), *head) for e in (None, jnp.eye(257)))
    tokens = np.array([0, 7, 0, 3], np.uint8)
    wanted = token_logits(table, tokens.astype(int))[1]
    assert_close(token_logits(one_hot, tokens)[1], wanted, 1e-5)
    assert_close(jax.jit(models.token_logits)(one_hot, tokens)[1], wanted, 1e-5)
    wanted = token_loss(table, tokens.astype(int), tokens.astype(int))[0]
    np.testing.assert_allclose(token_loss(one_hot, tokens, tokens)[0], wanted, rtol=1e-5)
    drawn = [generate(p, KEY, t, 12, temperature=0)[1]
             for p, t in ((one_hot, tokens), (table, tokens.astype(int)))]  # fmt: skip
    np.testing.assert_array_equal(*drawn)
    params = init_token_model(KEY, 128, H, embedding_size=E)
    narrow, wide = (token_logits(params, np.array([65, 66], t))[1] for t in (np.int8, np.int32))
    np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("one_hot", [False, True])
def test_token_that_is_none_makes_its_sequence_nan(one_hot):
    """Inside jit, from its step on; the other sequences are as they were, and so is padding."""
    params, tokens = make(one_hot=one_hot, dtype=np.float32), np.array(make_tokens(), np.int32)
    run, loss = jax.jit(models.token_logits), jax.jit(jax.value_and_grad(token_loss, has_aux=True))
    wanted = np.array(run(params, tokens)[1])
    mask = np.ones((T, B), bool)
    mask[4:, 1] = False
    for outside in (-1, -V, V, 2**31 - 1):
        given = tokens.copy()
        given[4, 1] = outside
        found = np.array(run(params, given)[1])
        assert np.isnan(found[4:, 1]).all()
        found[4:, 1] = wanted[4:, 1]
        np.testing.assert_array_equal(found, wanted)
        assert np.isnan(loss(params, given, tokens)[0][0])
        assert np.isnan(loss(params, tokens, given)[0][0])
        with pytest.raises(ValueError, match=rf"tokens must be in \[0, {V}\), got .*{outside}"):
            token_logits(params, given)
        with pytest.raises(ValueError, match=rf"targets must be in \[0, {V}\), got .*{outside}"):
            token_loss(params, tokens, given)
        for masked in (loss, jax.value_and_grad(token_loss, has_aux=True)):
            jax.tree.map(
                np.testing.assert_array_equal,
                masked(params, given, given, mask=mask),
                masked(params, tokens, tokens, mask=mask),
            )


# Generation.


def by_steps(params, prompt, num_steps, filters, *, stop=None, mask=None, **options):
    """`generate` with one call of the model a step, and the filters in NumPy."""
    run = jax.jit(functools.partial(token_logits, deterministic=True, **options))
    h, logits = run(params, prompt, mask=mask)
    logits, tokens = logits[-1], []
    for key in jax.random.split(KEY, num_steps):
        drawn = draw_one(key, np.asarray(logits, np.float32), *filters)
        if tokens and stop is not None:
            drawn = np.where(tokens[-1] == stop, stop, drawn)
        tokens.append(drawn)
        before, (h, logits) = h, run(params, drawn[None], h)
        stopped = (drawn == stop)[..., None]
        h, logits = tuple(np.where(stopped, *pair) for pair in zip(before, h)), logits[-1]
    return before, np.stack(tokens)


def draw_one(key, logits, temperature, top_k, top_p):
    temperature = np.broadcast_to(np.float32(temperature), logits.shape[:-1])
    kept = logits - logits.max(-1, keepdims=True)
    kept = kept / np.where(temperature > 0, temperature, 1)[..., None]
    for row in kept.reshape(-1, logits.shape[-1]):
        order = np.argsort(-row)
        row[order[top_k:]] = -np.inf
        p = np.exp(row[order]) / np.exp(row).sum()
        row[order[1:][np.cumsum(p)[:-1] >= top_p]] = -np.inf
    sampled = np.asarray(jax.random.categorical(key, jnp.asarray(kept)))
    return np.where(temperature > 0, sampled, logits.argmax(-1)).astype(np.int32)


@pytest.mark.parametrize("num_steps", [5, 9], ids=["products", "table"])
@pytest.mark.parametrize("case", ["plain", "rows", "stop", "everything"])
def test_generation_is_a_loop_over_steps_of_the_model(case, num_steps):
    """One temperature for each prompt, a token that stops them, and time on the second axis."""
    params, prompt = make(num_layers=2, dtype=np.float32), np.array(make_tokens(steps=4), np.uint8)
    params, options, filters = params._replace(w=2 * params.w), {}, [1.5, V, 1.0]
    stop = axis = mask = None
    if case in ("rows", "everything"):
        filters = [np.array([0.0, 0.5, 3.0]), 4, 0.9]
    if case == "everything":
        options = {"residual": True, "zoneout": 0.3}
        mask, axis = length_mask([4, 2, 3], 4), 1
    if case in ("stop", "everything"):
        drawn = by_steps(params, prompt, num_steps, filters, mask=mask, **options)[1]
        some = [(drawn[:-2] == t).any() and not (drawn == t).any(0).all() for t in range(V)]
        stop = some.index(True)
    h_last, wanted = by_steps(params, prompt, num_steps, filters, stop=stop, mask=mask, **options)
    if stop is not None:  # some stop early and some do not
        assert 0 < (wanted[-2:] == stop).all(0).sum() < B
    names = dict(zip(("temperature", "top_k", "top_p"), filters))
    time = 0 if axis is None else axis
    given = {"mask": None if mask is None else jnp.moveaxis(mask, 0, time), "stop_token": stop}
    h, tokens = generate(
        params, KEY, np.moveaxis(prompt, 0, time), num_steps, **names, **given, **options,
        **({} if axis is None else {"axis": axis}),
    )  # fmt: skip
    np.testing.assert_array_equal(np.moveaxis(tokens, time, 0), wanted)
    assert_close(h, h_last, 1e-5)


def test_logits_that_are_not_finite_are_no_token():
    """An error outside jit; inside -1, in that sequence alone. -inf only rules a token out."""
    params, prompt = make(dtype=np.float32), np.array([[1, 2]])
    ruled_out = params._replace(b=params.b.at[3].set(-jnp.inf))
    for temperature in (0.0, 9.0):
        drawn = generate(ruled_out, KEY, np.ones((1, 50), int), 9, temperature=temperature)[1]
        assert (drawn >= 0).all() and not (drawn == 3).any()
        run = functools.partial(models.generate, temperature=temperature)
        for wrong in (jnp.nan, jnp.inf):
            broken = params._replace(b=params.b.at[3].set(wrong))
            with pytest.raises(
                FloatingPointError, match=r"^generate: logits must be finite, got NaN or infinity"
            ):
                run(broken, KEY, prompt, 3)
            inside = jax.jit(lambda p, run=run: run(p, KEY, prompt, 3)[1])(broken)
            assert (inside == -1).all()
        for num_steps in (4, 9):  # products, and a table
            h0 = [jnp.zeros((2, H)).at[0].set(jnp.nan)]
            inside = jax.jit(lambda h0, n=num_steps, run=run: run(params, KEY, prompt, n, h0=h0))
            tokens = inside(h0)[1]
            assert (tokens[:, 0] == -1).all()
            assert tokens[:, 1].tolist() == inside([jnp.zeros((2, H))])[1][:, 1].tolist()
        traced = jax.jit(lambda prompt, run=run: run(params, KEY, prompt, 9)[1])
        assert (traced(np.array([[V, 2]]))[:, 0] == -1).all()


@pytest.mark.parametrize("num_steps", [2, 4], ids=["products", "table"])
def test_no_token_follows_one_that_could_not_be_drawn(num_steps):
    """Though the state is huge once only: any next token would bring it back to 1."""
    w_x, w_h = np.float32([[0, 0, 1]]), np.float32([[0, -1, 0]])
    layer = GRUParams(w_x, w_h, spec=GRUSpec(activation="identity"))
    embedding, w, b = np.float32([[1e38], [1], [1]]), np.float32([[1e3, 0, 0]]), np.zeros(3)
    params = TokenParams(embedding, (layer,), w, np.float32(b))
    tokens = jax.jit(lambda p: models.generate(p, KEY, np.array([0]), num_steps)[1])(params)
    assert tokens.tolist() == [-1] * num_steps
    h, logits = models.token_logits(params, np.array([0, 2]))
    assert np.isinf(logits[0]).any() and h[0] == 1 and np.isfinite(logits[1]).all()


def test_traced_filters_of_nothing_leave_the_likeliest_token():
    params, prompt = make(dtype=np.float32), np.arange(V)[None]
    wanted = generate(params, KEY, prompt, 5, temperature=0)[1]
    assert (wanted != 0).all()
    for name in ("top_k", "top_p"):
        run = jax.jit(lambda v, name=name: generate(params, KEY, prompt, 5, **{name: v})[1])
        np.testing.assert_array_equal(run(0), wanted)


@eagerly
@pytest.mark.parametrize("num_steps", [3, V], ids=["products", "table"])
@pytest.mark.parametrize(("residual", "zoneout"), [(True, 0.2), (False, 0.0)])
def test_greedy_generation_is_the_argmax_of_the_models_own_logits(num_steps, residual, zoneout):
    """Two layers, a batch of prompts: zoneout's mean, and greedy tokens from the logits.

    With as many steps as tokens what the first layer makes of a token is looked up in a table.
    """
    params, prompt = make(num_layers=2), make_tokens(steps=T + 1 - num_steps)
    options = {"residual": residual, "zoneout": zoneout, "spec": PYTORCH}
    h, drawn = generate(params, KEY, prompt, num_steps, temperature=0.0, **options)
    assert drawn.dtype == jnp.int32
    tokens = jnp.concatenate([prompt, drawn[:-1].astype(prompt.dtype)])
    h_last, logits = token_logits(params, tokens, deterministic=True, **options)
    np.testing.assert_array_equal(logits[T - num_steps :].argmax(-1), drawn)
    assert_close(h, h_last, 1e-13)


@eagerly
def test_generation_goes_on_from_its_state_and_last_token():
    params, prompt = make(), make_tokens(steps=5)
    whole = generate(params, KEY, prompt, 7, temperature=0.0)[1]
    h, first = generate(params, KEY, prompt, 4, temperature=0.0)
    rest = generate(params, KEY, first[-1:], 3, h0=h, temperature=0.0)[1]
    assert [*first.tolist(), *rest.tolist()] == whole.tolist()
    h_again, _ = generate(params, KEY, first[-1:], 3, temperature=0.0)
    h_rest, _ = generate(params, KEY, first[-1:], 3, h0=h, temperature=0.0)
    assert np.abs(h_again[0] - h_rest[0]).max() > 1e-3  # the state is used


@eagerly
def test_prompts_of_several_lengths_go_on_from_their_own_ends():
    params, prompt, lengths = make(num_layers=2), make_tokens(), [5, 7, 5]
    options = {"temperature": 0.0, "residual": True}
    _, drawn = generate(params, KEY, prompt, 5, mask=length_mask(lengths, T), **options)
    for row, length in enumerate(lengths):
        alone = jnp.broadcast_to(prompt[:length, row, None], (length, B))
        wanted = generate(params, KEY, alone, 5, **options)[1][:, row]
        np.testing.assert_array_equal(drawn[:, row], wanted)


@functools.cache
def frequencies(**options):
    """How often each token is among 4000 draws after one token 3."""
    prompt = np.full((1, 4000), 3)
    drawn = generate(make(dtype=np.float32), jax.random.key(5), prompt, 1, **options)[1]
    return np.bincount(drawn[0], minlength=V) / 4000


def probabilities(temperature=1.0):
    """What NumPy says of them."""
    logits = by_hand(make(dtype=np.float32), np.full((1, 1), 3))[0, 0] / temperature
    return np.exp(logits) / np.exp(logits).sum()


def assert_draws_of(found, wanted):
    """Four standard deviations of a frequency over 4000 draws; never what has no probability."""
    assert np.all((found > 0) <= (wanted > 0))
    assert np.all(np.abs(found - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 4000) + 1e-9)


def test_draws_follow_the_softmax_at_the_temperature():
    """1 by default."""
    assert_draws_of(frequencies(), probabilities())
    for temperature in (0.7, 3.0):
        assert_draws_of(frequencies(temperature=temperature), probabilities(temperature))
    # Divided by so little the logits would be infinite; their differences decide.
    assert_draws_of(frequencies(temperature=1e-38), np.eye(V)[probabilities().argmax()])


@pytest.mark.parametrize("k", [1, 3, V, 50])
def test_top_k_draws_from_the_k_likeliest_alone(k):
    found, p = frequencies(top_k=k), probabilities()
    chosen = np.argsort(-p)[:k]
    wanted = np.zeros(V)
    wanted[chosen] = p[chosen] / p[chosen].sum()
    assert_draws_of(found, wanted)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_top_p_draws_from_the_smallest_set_that_reaches_p(top_p):
    found, p = frequencies(top_p=top_p), probabilities()
    order = np.argsort(-p)
    count = int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-6)) + 1
    wanted = np.zeros(V)
    wanted[order[:count]] = p[order[:count]] / p[order[:count]].sum()
    assert_draws_of(found, wanted)


def test_generation_compiles_once_for_all_temperatures_and_filters():
    params, prompt = make(dtype=np.float32), np.array([1, 2])

    def run(temperature=1.0, k=2, p=0.5, prompt=prompt, mask=None):
        options = {"temperature": temperature, "top_k": k, "top_p": p, "mask": mask}
        return generate(params, KEY, prompt, 3, **options)[1]

    compilations = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compilations.append(event)

    drawn = [run(1.0, 2, 0.5).tolist()]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        drawn.append(run(9.0, 7, 1).tolist())
        assert not compilations
        greedy = run(0.0).tolist()  # draws nothing: a program of its own
        assert len(compilations) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # Traced, nothing can be checked before it runs; a temperature that turns out 0 is greedy too.
    traced, mask = jax.jit(run), np.ones(2, bool)
    assert traced(1.0, 2, 0.5, prompt, mask).tolist() == drawn[0]
    assert traced(9.0, 7, 1.0, prompt, mask).tolist() == drawn[1]
    assert traced(0.0, 2, 0.5, prompt, mask).tolist() == greedy


# Outputs of every step, and of the last.


@eagerly
@pytest.mark.parametrize("merge", ["concat", "sum"])
@pytest.mark.parametrize("residual", [False, True])
def test_final_output_reads_the_last_valid_step_of_each_direction(merge, residual):
    """From the outputs of all steps: forward's at the row's end, backward's at its start."""
    layers, b = make_outputs([-2, -6 if merge == "concat" else -3])
    params = SequenceParams(layers, draw(14, 6 if merge == "concat" else 3, 2), b)
    xs, lengths = draw(15, T, B, E), [3, 7, 1]
    options = {"merge": merge, "residual": residual, "mask": length_mask(lengths, T)}
    given, outputs = final_outputs(params, xs, **options)
    h_last, ys = gru_stack(params.layers, xs, **options)
    assert_close(given, h_last, 1e-15)
    if merge == "concat":
        ends = [[*ys[n - 1, row, :H], *ys[0, row, H:]] for row, n in enumerate(lengths)]
        top = np.array(ends)
    else:
        top = sum(f + b for f, b in h_last) if residual else h_last[-1][0] + h_last[-1][1]
    assert_close(outputs, np.asarray(top) @ np.asarray(params.w) + np.asarray(b), 1e-13)


@eagerly
def test_dropout_before_the_head_scales_what_it_reads():
    """A head that sums: each output is the sum of the kept entries times 1 / (1 - rate)."""
    layers, b = make_outputs([2], num_outputs=1)
    params, xs, key = SequenceParams(layers, jnp.ones((H, 1)), b), draw(15, T, B, E), KEY
    h_last, clean = final_outputs(params, xs)
    assert_close(clean, h_last[0].sum(-1, keepdims=True) + b[None], 1e-13)
    _, noisy = final_outputs(params, xs, dropout=Dropout(output=0.75), key=key)
    kept = np.asarray(jax.random.bernoulli(jax.random.split(key, 3)[-1], 0.25, (B, H)))
    wanted = np.where(kept, 4 * np.asarray(h_last[0]), 0.0).sum(-1, keepdims=True) + np.asarray(b)
    np.testing.assert_allclose(noisy, wanted, rtol=1e-13)
    for given in (None, key):
        options = {"dropout": Dropout(output=0.75), "key": given, "deterministic": True}
        np.testing.assert_array_equal(final_outputs(params, xs, **options)[1], clean)


def test_final_state_is_that_of_the_stack_with_the_same_key():
    """Whatever is drawn, and the head's dropout with it."""
    params = init_sequence_model(KEY, E, H, 2, num_layers=2, bidirectional=True)
    xs = draw(15, T, B, E, dtype=np.float32)
    options = {"dropout": Dropout(0.2, 0.3, 0.4), "noise": Noise(0.2, 0.3), "key": KEY}
    wanted, _ = jaxgru.gru_stack(params.layers, xs, **options)
    h_last, noisy = final_outputs(params, xs, **options)
    jax.tree.map(np.testing.assert_array_equal, h_last, wanted)
    options["dropout"] = Dropout(0.2, 0.3)
    assert np.abs(noisy - final_outputs(params, xs, **options)[1]).max() > 1e-3


@eagerly
def test_sequence_outputs_are_the_head_of_every_step():
    layers, b = make_outputs([2])
    params, xs = SequenceParams(layers, draw(14, H, 2), b), draw(15, T, B, E)
    h_last, outputs = sequence_outputs(params, xs)
    _, hs, _ = forward(params.layers[0], CHO_2014, xs, np.zeros((B, H)))
    assert_close(outputs, hs @ np.asarray(params.w) + np.asarray(b), 1e-13)
    assert_close(h_last[0], hs[-1], 1e-13)


@eagerly
@pytest.mark.parametrize(
    ("function", "timed", "reductions"),
    [
        (sequence_outputs, 1, [None]),
        (final_outputs, None, [None]),
        (models.token_logits, 1, [None]),
        (token_loss, 0, ["none", "batch_mean", "sequence_mean"]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_time_on_any_axis_is_time_in_front(function, timed, reductions):
    """Of two batch axes; a negative axis counts from the end of what the layers read, [T, ..., I].

    `timed` says which of the two results has an axis of time.
    """
    flags = length_mask([2, 6, 7], T), jnp.arange(T * B).reshape(T, B) % 5 == 3
    if function in (sequence_outputs, final_outputs):
        layers, b = make_outputs([-2])
        params, arrays = SequenceParams(layers, draw(14, 2 * H, 2), b), [draw(15, T, B, E)]
    else:
        params, arrays = make(), [make_tokens(), make_tokens(seed=2)][: 1 + (timed == 0)]

    def run(axis, **options):
        there = axis % 4
        moved = [jnp.moveaxis(v[:, :, None], 0, there) for v in (*arrays, *flags)]
        options |= {"mask": moved[-2], "resets": moved[-1], "axis": axis}
        results = list(function(params, *moved[:-2], **options))
        if timed is not None and results[timed].ndim:
            results[timed] = jnp.moveaxis(results[timed], there, 0)
        return results

    for options in ({} if name is None else {"reduction": name} for name in reductions):
        wanted = run(0, **options)
        for axis in (1, 2, -4, -3, -2):
            assert_close(run(axis, **options), wanted, 1e-13, f"axis={axis}")


@pytest.mark.parametrize("two_directions", [False, True])
def test_exported_function_takes_and_returns_the_parameters_of_models(two_directions):
    """Written to bytes and read again, with the equation of each layer."""
    options = {"bidirectional": two_directions, "spec": PYTORCH}
    given = (
        init_token_model(KEY, V, H, embedding_size=E, **options),
        init_sequence_model(KEY, E, H, 1, **options),
    )
    halve = jax.jit(lambda models: jax.tree.map(lambda v: v / 2, models))
    exported = jax.export.deserialize(jax.export.export(halve)(given).serialize())
    assert_close(exported.call(given), jax.tree.map(lambda v: np.asarray(v) / 2, given), 1e-7)


# Bad calls.

TOKENS = np.zeros(3, int)
INTEGERS = "must be an integer array, got"
BAD_CALLS = {
    "no_vocabulary": (
        lambda p: init_token_model(KEY, 0, H),
        "init_token_model: vocab_size must be at least 1, got 0.",
    ),
    "no_embedding": (
        lambda p: init_token_model(KEY, V, H, embedding_size=0),
        "init_token_model: embedding_size must be at least 1, got 0.",
    ),
    "embedding_of_half_a_number": (
        lambda p: init_token_model(KEY, V, H, embedding_size=1.5),
        "init_token_model: embedding_size must be an integer, got 1.5.",
    ),
    "dtype": (
        lambda p: init_token_model(KEY, V, H, dtype=int),
        "init_token_model: dtype must be one of float64, float32, bfloat16, float16, got int64.",
    ),
    "no_outputs": (
        lambda p: init_sequence_model(KEY, 2, 3, 0),
        "init_sequence_model: output_size must be at least 1, got 0.",
    ),
    "floating_tokens": (
        lambda p: token_logits(p, np.ones(3)),
        f"token_logits: tokens {INTEGERS} dtype float64.",
    ),
    "list_of_tokens": (
        lambda p: token_logits(p, [1, 2]),
        f"token_logits: tokens {INTEGERS} list.",
    ),
    "floating_targets": (
        lambda p: token_loss(p, TOKENS, np.ones(3)),
        f"token_loss: targets {INTEGERS} dtype float64.",
    ),
    "shape_of_targets": (
        lambda p: token_loss(p, TOKENS, TOKENS[1:]),
        "token_loss: targets must have shape (3,) (that of tokens), got (2,).",
    ),
    "reduction": (
        lambda p: token_loss(p, TOKENS, TOKENS, reduction="avg"),
        "token_loss: reduction must be one of 'none', 'sum', 'mean', 'batch_mean', "
        "'sequence_mean', got 'avg'.",
    ),
    "model_for_logits": (
        lambda p: token_logits(p.layers, TOKENS),
        "token_logits: params must be a TokenParams, got tuple.",
    ),
    "model_for_outputs": (
        lambda p: sequence_outputs(p, np.ones((4, 2))),
        "sequence_outputs: params must be a SequenceParams, got TokenParams.",
    ),
    "model_for_final_outputs": (
        lambda p: final_outputs(p, np.ones((4, 2))),
        "final_outputs: params must be a SequenceParams, got TokenParams.",
    ),
    "model_for_generation": (
        lambda p: generate(p.layers, KEY, TOKENS, 1),
        "generate: params must be a TokenParams, got tuple.",
    ),
    "merge_of_outputs": (
        lambda p: sequence_outputs(SequenceParams(*make_outputs([-2])[:1], np.ones((3, 2)), 0), 0),
        "sequence_outputs: params.w must have 6 rows (the outputs of the top layer, "
        "merge='concat'), got 3; pass the merge that it was made with.",
    ),
    "merge_of_final_outputs": (
        lambda p: final_outputs(
            SequenceParams(*make_outputs([-2])[:1], np.ones((6, 2)), 0), 0, merge="sum"
        ),
        "final_outputs: params.w must have 3 rows (the outputs of the top layer, "
        "merge='sum'), got 6; pass the merge that it was made with.",
    ),
    "merge_of_logits": (
        lambda p: token_logits(p._replace(layers=make_outputs([-2])[0]), TOKENS),
        "token_logits: params.w must have 6 rows (the outputs of the top layer, "
        "merge='concat'), got 3; pass the merge that it was made with.",
    ),
    **{
        f"shape_of_{name}_{number}": (
            lambda p, name=name, value=value: token_logits(p._replace(**{name: value}), TOKENS),
            f"token_logits: params.{name} must have shape {wanted}, got {found}.",
        )
        for name, wanted, values in (
            ("b", "(7,) (the columns of params.w)", {"(1,)": np.ones(1), "None": None}),
            (
                "embedding",
                "(7, 2) (the columns of params.w, then the rows of the first layer's w_x)",
                {"(6, 2)": np.ones((6, 2)), "(7, 3)": np.ones((7, 3)), "None": None},
            ),
        )
        for number, (found, value) in enumerate(values.items())
    },
    "axes_of_w": (
        lambda p: token_logits(p._replace(w=np.ones(3)), TOKENS),
        "token_logits: params.w must have 3 rows (the outputs of the top layer, "
        "merge='concat'), got shape (3,); pass the merge that it was made with.",
    ),
    "dtype_of_the_embedding": (
        lambda p: token_logits(p._replace(embedding=np.ones((V, E), np.float32)), TOKENS),
        "token_logits: params.embedding must have the dtype of the layers, float64, got float32; "
        "cast one of them.",
    ),
    "one_hot_rows": (
        lambda p: generate(make(one_hot=True)._replace(layers=p.layers), KEY, TOKENS, 1),
        "generate: params.embedding must have shape (7, 2) (the columns of params.w, then the rows "
        "of the first layer's w_x), got None.",
    ),
    "place_of_a_layer": (
        lambda p: token_loss(p._replace(layers=(p.layers[0], None)), TOKENS, TOKENS),
        "token_loss: params.layers[1] must be a GRUParams or a Bidirectional, got NoneType.",
    ),
    "place_of_a_size": (
        lambda p: final_outputs(SequenceParams(*make(num_layers=2)[1:]), np.ones((T, 5))),
        "final_outputs: xs must have shape [T, ..., I] with I=2 (rows of params.layers[0].w_x), "
        "got (7, 5).",
    ),
    "rows_of_a_layer": (
        lambda p: sequence_outputs(SequenceParams(p.layers * 2, *p[2:]), np.ones((T, E))),
        "sequence_outputs: params.layers[1].w_x must have 3 rows (the outputs of params.layers[0], "
        "merge='concat'), got 2.",
    ),
    "state_for_logits": (
        lambda p: token_logits(p, TOKENS, [np.ones(4)]),
        "token_logits: h0[0] must have shape (3,) (the batch axes of xs, then H=3, the rows of "
        "params.layers[0].w_h), got (4,).",
    ),
    "form_of_a_tap": (
        lambda p: token_logits(p, TOKENS, tap=[]),
        "token_logits: tap must be a sequence of 1 taps, one for each layer, got 0 of them; "
        "init_taps(params.layers, lead_shape) has the form.",
    ),
    "state_for_generation": (
        lambda p: generate(p, KEY, TOKENS, 1, h0=[np.ones(4)]),
        "generate: h0[0] must have shape (3,) (the batch axes of xs, then H=3, the rows of "
        "params.layers[0].w_h), got (4,).",
    ),
    "residual": (
        lambda p: generate(p, KEY, TOKENS, 1, residual=[]),
        "generate: residual must be a bool, got [].",
    ),
    "number_for_a_key": (
        lambda p: generate(p, 3, TOKENS, 1),
        "generate: key must be a jax.random.key, got 3; pass jax.random.key(3).",
    ),
    "no_key": (
        lambda p: generate(p, None, TOKENS, 1),
        "generate: key must be a jax.random.key, got None.",
    ),
    "axis_of_a_prompt": (
        lambda p: generate(p, KEY, TOKENS, 1, axis=1),
        "generate: axis must name an axis of xs other than its last, got 1 for shape (3, 2).",
    ),
    "stop_token": (
        lambda p: generate(p, KEY, TOKENS, 1, stop_token=V),
        "generate: stop_token must be in [0, 7), got 7.",
    ),
    "temperatures": (
        lambda p: generate(p, KEY, TOKENS[None], 1, temperature=np.ones(2)),
        "generate: temperature must be a number or have shape (3,) (one for each prompt), got "
        "(2,).",
    ),
    "one_temperature_below": (
        lambda p: generate(p, KEY, TOKENS[None], 1, temperature=np.array([1, -1, 1])),
        "generate: temperature must be finite and >= 0, got [ 1 -1  1].",
    ),
    "words_for_a_temperature": (
        lambda p: generate(p, KEY, TOKENS, 1, temperature="hot"),
        "generate: temperature must be a number, got 'hot'.",
    ),
    "dropout_without_key": (
        lambda p: final_outputs(SequenceParams(*p[1:]), 0, dropout=Dropout(output=0.5)),
        "final_outputs: key must be a jax.random.key for dropout.output=0.5, got None; pass "
        "deterministic=True for evaluation.",
    ),
    "two_directions": (
        lambda p: generate(
            p._replace(layers=make_outputs([-2])[0], w=np.ones((6, V))), KEY, TOKENS, 1
        ),
        "generate: params.layers must hold layers of one direction, got a Bidirectional, whose "
        "outputs depend on later tokens.",
    ),
    "floating_prompt": (
        lambda p: generate(p, KEY, np.ones(2), 1),
        f"generate: prompt {INTEGERS} dtype float64.",
    ),
    "no_steps": (
        lambda p: generate(p, KEY, TOKENS, 0),
        "generate: num_steps must be at least 1, got 0.",
    ),
    "token_above": (
        lambda p: generate(p, KEY, np.array([V, 2]), 1),
        "generate: prompt must be in [0, 7), got 2 to 7; mask entries that do not count.",
    ),
    "token_below": (
        lambda p: generate(p, KEY, np.array([-1, 2]), 1),
        "generate: prompt must be in [0, 7), got -1 to 2; mask entries that do not count.",
    ),
    "empty_prompt": (
        lambda p: generate(p, KEY, TOKENS[:0], 1),
        "generate: prompt must hold at least one token, got (0,).",
    ),
    "prompt_without_time": (
        lambda p: generate(p, KEY, np.array(1), 1),
        "generate: prompt must hold at least one token, got ().",
    ),
    "prompt_that_is_masked": (
        lambda p: generate(p, KEY, np.ones((2, 2), int), 1, mask=length_mask([0, 2], 2)),
        "generate: mask must be True on a token of every prompt, got none of one.",
    ),
    "shape_of_mask": (
        lambda p: generate(p, KEY, TOKENS, 1, mask=np.ones(2, bool)),
        "generate: mask must have shape (3,) (that of prompt), got (2,).",
    ),
    "negative_temperature": (
        lambda p: generate(p, KEY, TOKENS, 1, temperature=-1.0),
        "generate: temperature must be finite and >= 0, got -1.0.",
    ),
    "infinite_temperature": (
        lambda p: generate(p, KEY, TOKENS, 1, temperature=float("inf")),
        "generate: temperature must be finite and >= 0, got inf.",
    ),
    "top_k": (
        lambda p: generate(p, KEY, TOKENS, 1, top_k=0),
        "generate: top_k must be at least 1, got 0.",
    ),
    "top_p_above": (
        lambda p: generate(p, KEY, TOKENS, 1, top_p=1.5),
        "generate: top_p must be in (0, 1], got 1.5.",
    ),
    "top_p_of_zero": (
        lambda p: generate(p, KEY, TOKENS, 1, top_p=0.0),
        "generate: top_p must be in (0, 1], got 0.0.",
    ),
}
OF_KIND = {
    "embedding_of_half_a_number", "dtype", "floating_tokens", "list_of_tokens", "floating_targets",
    "model_for_logits", "model_for_outputs", "model_for_final_outputs", "model_for_generation",
    "floating_prompt", "dtype_of_the_embedding", "place_of_a_layer", "residual",
    "number_for_a_key", "no_key", "words_for_a_temperature",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_says_what_was_expected_and_what_came(case, x64):
    call, message = BAD_CALLS[case]
    with pytest.raises(
        TypeError if case in OF_KIND else ValueError, match=f"^{re.escape(message)}$"
    ):
        call(make())
