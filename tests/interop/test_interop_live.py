"""Random cases against every installed peer and onnxruntime, and training after a conversion."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close, with_spec
from peer_layers import PEERS, VARIANTS, as_peers_like_it, draw_case
from test_interop import as_stack, outputs_and_gradients, without_merged

import jaxgru
from jaxgru import GRUSpec, init_stack, interop, length_mask, models
from jaxgru.interop import write_onnx
from jaxgru.models import init_token_model

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is in the extra `peers`")
for _module in ("torch", "keras", "flax", "equinox", "haiku", "onnxruntime"):
    pytest.importorskip(_module, reason=f"{_module} is in the extra `peers`")
from hypothesis import strategies as st  # noqa: E402

EXACT = 1e-12
SIZES = {
    "seed": st.integers(0, 2**20),
    "steps": st.integers(1, 5),
    "batch": st.integers(1, 3),
    "inputs": st.integers(1, 4),
    "hidden": st.integers(1, 4),
}
fresh_cases = functools.partial(
    hypothesis.settings,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_fresh_case_has_the_peers_values_and_gradients(name, variant):
    @fresh_cases(max_examples=3)
    @hypothesis.given(**SIZES)
    def check(**sizes):
        with as_peers_like_it():
            case = draw_case(name, variant, **sizes)
        imported = PEERS[name].read(case.weights, variant)
        stack = as_stack(imported.params)
        with jax.disable_jit():
            hs, grads, dxs = outputs_and_gradients(stack, case.xs, case.cotangents)
        wanted = as_stack(PEERS[name].read(case.grads, variant).params)
        assert_close(hs, case.hs, EXACT, "hs")
        assert_close(dxs, case.dxs, 10 * EXACT, "dxs")  # sums of a few entries cancel
        assert_close(without_merged(grads, imported.notes), wanted, 10 * EXACT, "grads")

    check()


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
@pytest.mark.parametrize("reset", ["before", "after"])
def test_fresh_model_has_our_values_in_onnxruntime(tmp_path, reset, bidirectional):
    """With states and lengths of zero, which onnxruntime's kernel treats differently."""
    runtime = pytest.importorskip("onnxruntime")
    runtime.set_default_logger_severity(3)

    @fresh_cases(max_examples=4)
    @hypothesis.given(
        **SIZES,
        update=st.sampled_from(["keep", "write"]),
        activation=st.sampled_from(["tanh", "relu", "sigmoid", "softplus", "identity"]),
        embedding=st.sampled_from([None, 2]),
        merge=st.sampled_from(["concat", "sum"]),
    )
    def check(seed, steps, batch, inputs, hidden, update, activation, embedding, merge):
        spec, rng = GRUSpec(reset, update, activation), np.random.default_rng(seed)
        stack = {"num_layers": 2, "bidirectional": bidirectional, "merge": merge}
        model = init_token_model(
            jax.random.key(seed), inputs + 1, hidden, embedding_size=embedding, spec=spec, **stack
        )
        write_onnx(tmp_path / "m.onnx", model, merge=merge, lengths=True, state=True)
        session = runtime.InferenceSession(tmp_path / "m.onnx")
        tokens = rng.integers(0, inputs + 1, (steps, batch))
        counts = rng.integers(0, steps + 1, batch).astype(np.int32)
        states = rng.normal(size=(2, 1 + bidirectional, batch, hidden)).astype(np.float32)
        given = {"tokens": tokens, "lengths": counts, "h0_0": states[0], "h0_1": states[1]}
        mask = length_mask(counts, steps)
        h0 = tuple(tuple(h) if bidirectional else h[0] for h in states)
        results = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, given), strict=True)
        )
        with jax.disable_jit():
            h_last, logits = models.token_logits(
                model, jnp.asarray(tokens), h0, mask=mask, merge=merge
            )
        # Both sides compute in float32, with different exp and order of sums.
        np.testing.assert_allclose(results["outputs"], logits, atol=2e-5, rtol=2e-5)
        for number, h in enumerate(h_last):
            h = np.stack(h) if bidirectional else np.asarray(h)[None]
            np.testing.assert_allclose(results[f"h_last_{number}"], h, atol=2e-5, rtol=2e-5)

    check()


def test_last_outputs_and_residuals_have_our_values_in_onnxruntime(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = models.init_sequence_model(
        jax.random.key(0), 6, 3, 2, num_layers=2, bidirectional=True, scheme="pytorch"
    )
    options = {"residual": True, "lengths": True, "outputs": "last"}
    write_onnx(tmp_path / "m.onnx", model, **options)
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    xs = np.random.default_rng(0).normal(size=(5, 4, 6)).astype(np.float32)
    lengths = np.array([5, 0, 2, 1], np.int32)
    results = dict(
        zip(
            [o.name for o in session.get_outputs()],
            session.run(None, {"xs": xs, "lengths": lengths}),
        )
    )
    mask = length_mask(lengths, 5)
    h_last, outputs = models.final_outputs(model, jnp.asarray(xs), mask=mask, residual=True)
    np.testing.assert_allclose(results["outputs"], outputs, atol=2e-6)
    np.testing.assert_allclose(results["h_last_1"], np.stack(h_last[1]), atol=2e-6)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
def test_file_of_torchs_exporter_is_read(tmp_path, bidirectional):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.GRU(2, 3, 2, bidirectional=bidirectional)
    xs = torch.randn(5, 4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (xs,), tmp_path / "m.onnx", dynamo=False, opset_version=17)
    nodes = interop.read_onnx(tmp_path / "m.onnx")
    stack = tuple(node.params for node in nodes)
    jax.tree.map(np.testing.assert_array_equal, stack, with_spec(stack, jaxgru.PYTORCH))
    _, hs = jaxgru.gru_stack(stack, jnp.asarray(xs.numpy()))
    np.testing.assert_allclose(hs, module(xs)[0].detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
def test_packed_sequences_and_states_of_torch_are_those_of_the_readme(bidirectional):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.GRU(2, 3, 2, bidirectional=bidirectional)
    xs, lengths = torch.randn(5, 4, 2), torch.tensor([5, 3, 1, 2])
    h0 = torch.randn(2 * (1 + bidirectional), 4, 3)
    pack = torch.nn.utils.rnn.pack_padded_sequence(xs, lengths, enforce_sorted=False)
    with torch.no_grad():
        packed, h_n = module(pack, h0)
        padded = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=5)[0].numpy()
    params = jax.tree.map(jnp.asarray, interop.from_torch(module.state_dict()).params)
    structure = jax.tree.structure(jaxgru.init_state(params, (4,)))
    mask = length_mask(jnp.asarray(lengths.numpy()), 5)
    h0 = jax.tree.unflatten(structure, list(jnp.asarray(h0.numpy())))
    h_last, ys = jaxgru.gru_stack(params, jnp.asarray(xs.numpy()), h0, mask=mask)
    np.testing.assert_allclose(jnp.stack(jax.tree.leaves(h_last)), h_n.numpy(), atol=1e-6)
    np.testing.assert_allclose(np.asarray(ys)[mask], padded[mask], atol=1e-6)


@pytest.mark.parametrize("one", ["GRU", "GRUCell"])
def test_one_layer_loads_into_the_module_that_to_torch_names(one):
    """A stack of one is an nn.GRU, a GRUParams an nn.GRUCell; they come back as such."""
    torch = pytest.importorskip("torch")
    (params,) = init_stack(jax.random.key(0), 2, 3, spec=jaxgru.PYTORCH, scheme="pytorch")
    params = (params,) if one == "GRU" else params
    exported = interop.to_torch(params)
    module = getattr(torch.nn, one)(**exported.options)
    module.load_state_dict({k: torch.from_numpy(v) for k, v in exported.weights.items()})
    again = interop.from_torch(module.state_dict()).params
    assert type(again) is type(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_training_after_conversion_has_the_loss_curve_of_torch():
    """SGD has no state, so both sides take the same steps after the conversion, in float32."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    gru, head = torch.nn.GRU(2, 8, num_layers=2), torch.nn.Linear(8, 1)
    weights = [*gru.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    rng = np.random.default_rng(0)
    batches = rng.normal(size=(60, 10, 4, 2)).astype(np.float32)
    targets = np.cumsum(batches, axis=1)[..., :1] / 3

    def torch_update(xs, ys):
        optimizer.zero_grad()
        loss = ((head(gru(torch.from_numpy(xs))[0]) - torch.from_numpy(ys)) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    before = [torch_update(*batch) for batch in zip(batches[:20], targets[:20])]
    imported = interop.from_torch(gru.state_dict())
    params = (
        jax.tree.map(jnp.asarray, imported.params),
        jnp.asarray(head.weight.detach().numpy().T),
        jnp.asarray(head.bias.detach().numpy().copy()),
    )

    @jax.jit
    def update(params, xs, ys):
        def loss(params):
            layers, w, b = params
            outputs = jaxgru.gru_stack(layers, xs)[1] @ w
            return jnp.mean((outputs + b[None, None] - ys) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        return optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads)), value

    ours, theirs = [], []
    for xs, ys in zip(batches[20:], targets[20:]):
        theirs.append(torch_update(xs, ys))
        params, value = update(params, xs, ys)
        ours.append(float(value))
    assert np.mean(theirs[-10:]) < 0.5 * np.mean(before[:10])  # the model has learned
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_chain_of_conversions_is_the_same_function():
    """torch -> linen -> equinox -> keras: equal outputs, up to rounding."""
    with jax.enable_x64(True):
        options = {"spec": jaxgru.PYTORCH, "scheme": "pytorch", "dtype": jnp.float64}
        (cell,) = init_stack(jax.random.key(0), 2, 3, **options)
        xs = jax.random.normal(jax.random.key(1), (5, 4, 2), jnp.float64)
        params = cell
        for name in ("torch", "linen", "equinox", "keras"):
            weights = getattr(interop, f"to_{name}")(params).weights
            params = getattr(interop, f"from_{name}")(weights).params
        params = jax.tree.map(jnp.asarray, params)
        got, wanted = (jaxgru.gru(p, xs)[1] for p in (params, cell))
        assert_close(got, wanted, EXACT)
