"""GRU nodes of ONNX files: the operator's own node tests, whole models, refusals."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, make_problem

import jaxgru
from jaxgru import (
    CHO_2014,
    PYTORCH,
    Bidirectional,
    GRUSpec,
    init_gru,
    init_stack,
    init_token_model,
    read_onnx,
    run_onnx_gru,
    write_onnx,
)

onnx = pytest.importorskip("onnx", reason="onnx is an extra")
reference = pytest.importorskip("onnx.reference", reason="onnx is an extra")

NODE_TESTS = [
    *("test_gru_defaults", "test_gru_with_initial_bias", "test_gru_seq_length"),
    *("test_gru_batchwise", "test_gru_reverse", "test_gru_bidirectional"),
]


@functools.cache
def node_tests():
    """The cases that ONNX ships for the operator, by name."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():  # the cases of other operators overflow as they are made
        warnings.simplefilter("ignore")
        return {case.name: case for case in collect_testcases("GRU") if "gru" in case.name}


def test_every_node_test_of_the_operator_is_run():
    assert set(node_tests()) == set(NODE_TESTS)


@pytest.mark.parametrize("name", NODE_TESTS)
def test_node_test_passes_through_read_onnx(tmp_path, name):
    case = node_tests()[name]
    (tmp_path / "node.onnx").write_bytes(case.model.SerializeToString())
    for inputs, outputs in case.data_sets:
        given = dict(zip([i.name for i in case.model.graph.input], inputs))
        xs = jnp.asarray(given.pop("X"))
        (node,) = read_onnx(tmp_path / "node.onnx", inputs=given)
        results = dict(zip(("Y", "Y_h"), run_onnx_gru(node, xs)))
        for output, wanted in zip(case.model.graph.output, outputs):
            np.testing.assert_allclose(results[output.name], wanted, rtol=case.rtol, atol=1e-6)


def make_model(nodes, initializers=(), inputs=("X",), path=None, **arrays):
    """Bytes of a graph, or its file."""
    helper = onnx.helper
    tensors = [onnx.numpy_helper.from_array(v, k) for k, v in arrays.items()]
    infos = [helper.make_tensor_value_info(k, 1, None) for k in inputs]
    outputs = [helper.make_empty_tensor_value_info("Y")]
    graph = helper.make_graph(nodes, "g", infos, outputs, [*initializers, *tensors])
    model = helper.make_model(graph, opset_imports=[helper.make_operatorsetid("", 17)])
    path.write_bytes(model.SerializeToString())
    return path


def node_of(*inputs, **attributes):
    names = inputs or ("X", "W", "R")
    return onnx.helper.make_node("GRU", names, ["Y"], "gru", **{"hidden_size": 3} | attributes)


def kernels(directions=1):
    rng = np.random.default_rng(0)
    shapes = {"W": (directions, 9, 2), "R": (directions, 9, 3)}
    return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("layout", [0, 1])
def test_what_a_file_holds_of_lengths_and_states_is_used(tmp_path, layout):
    """Padded outputs are zero, and so is all of an empty sequence: ONNX's way, not `gru`'s."""
    rng = np.random.default_rng(1)
    h0, lengths = rng.normal(size=(2, 4, 3)).astype(np.float32), np.array([5, 2, 0, 3], np.int32)
    xs = rng.normal(size=(5, 4, 2)).astype(np.float32)
    held = np.swapaxes(h0, 0, 1) if layout else h0
    node = node_of("X", "W", "R", "", "lengths", "h0", direction="bidirectional", layout=layout)
    path = make_model([node], path=tmp_path / "m", lengths=lengths, h0=held, **kernels(2))
    (read,) = read_onnx(path)
    assert read.computed == {}
    ys, h_last = run_onnx_gru(read, jnp.asarray(np.swapaxes(xs, 0, 1) if layout else xs))
    if layout:
        ys, h_last = jnp.transpose(ys, (1, 2, 0, 3)), jnp.swapaxes(h_last, 0, 1)
    for row, length in enumerate(lengths):
        for d, params in enumerate(read.params):
            wanted, hs = jaxgru.gru(
                params, xs[:length, row], h0[d, row], spec=read.spec, reverse=d == 1
            )
            wanted = wanted if length else np.zeros(3)
            np.testing.assert_allclose(h_last[d, row], wanted, atol=1e-6)
            np.testing.assert_allclose(ys[:length, d, row], hs, atol=1e-6)
            assert not np.any(ys[length:, d, row])


def test_weights_that_the_graph_makes_of_constants_are_found(tmp_path):
    """PyTorch's exporter leaves such chains."""
    arrays = kernels()
    helper = onnx.helper
    constant = onnx.numpy_helper.from_array(np.swapaxes(arrays["W"], 1, 2).copy())
    nodes = [
        helper.make_node("Constant", [], ["W_t"], value=constant),
        helper.make_node("Transpose", ["W_t"], ["W"], perm=[0, 2, 1]),
        helper.make_node("Identity", ["X"], ["h0"]),
        node_of("X", "W", "R", "", "", "h0", linear_before_reset=1),
    ]
    (read,) = read_onnx(make_model(nodes, path=tmp_path / "m", R=arrays["R"]))
    wanted = jaxgru.from_onnx(arrays["W"], arrays["R"], linear_before_reset=1)
    jax.tree.map(np.testing.assert_array_equal, read.params, wanted.params)
    assert (read.spec, read.initial_h, read.computed) == (PYTORCH, None, {"initial_h": "h0"})


def test_nodes_of_subgraphs_are_found(tmp_path):
    helper, empty = onnx.helper, onnx.helper.make_empty_tensor_value_info
    body = helper.make_graph([node_of()], "inner", [], [empty("Y")])
    branch = helper.make_node("If", ["c"], ["Y"], then_branch=body, else_branch=body)
    path = make_model([branch], inputs=("X", "c"), path=tmp_path / "m", **kernels())
    assert [node.name for node in read_onnx(path)] == ["gru", "gru"]


@pytest.mark.parametrize("spec", [CHO_2014, GRUSpec("after", "write", "relu")], ids=str)
def test_stack_comes_back_as_it_was_written(tmp_path, spec):
    layers = init_stack(jax.random.key(0), 2, (3, 4), bidirectional=True, scheme="pytorch")
    notes = write_onnx(tmp_path / "m.onnx", layers, spec=spec, lengths=True, state=True)
    nodes = read_onnx(tmp_path / "m.onnx")
    assert {node.spec for node in nodes} == {GRUSpec(spec.reset, "keep", spec.activation)}
    assert len(notes) == (spec.update == "write")
    wanted = jaxgru.to_onnx(layers, spec=spec).weights
    for node, weights in zip(nodes, wanted, strict=True):
        assert isinstance(node.params, Bidirectional)
        again = jaxgru.to_onnx(node.params, spec=node.spec).weights
        jax.tree.map(np.testing.assert_array_equal, again, weights)
    assert nodes[0].computed == {"sequence_lens": "lengths", "initial_h": "h0_0"}


@pytest.mark.usefixtures("x64", "quick_compilation")
def test_written_model_has_our_values_in_the_reference_evaluator(tmp_path):
    """float64, without lengths, which that evaluator ignores."""
    model = init_token_model(
        jax.random.key(0), 7, 3, embedding_size=2, num_layers=2, dtype=jnp.float64
    )
    write_onnx(tmp_path / "m.onnx", model, spec=PYTORCH, residual=True)
    tokens = np.random.default_rng(0).integers(0, 7, (5, 3))
    evaluator = reference.ReferenceEvaluator(str(tmp_path / "m.onnx"))
    results = dict(zip(evaluator.output_names, evaluator.run(None, {"tokens": tokens})))
    states, wanted = jaxgru.token_logits(model, jnp.asarray(tokens), spec=PYTORCH, residual=True)
    assert_close(results["outputs"], wanted, 1e-12)
    for number, state in enumerate(states):
        assert_close(results[f"h_last_{number}"][0], state, 1e-12)


def write_bytes(path, data):
    path.write_bytes(data)
    return path


BAD_FILES = {
    "no_model": (
        lambda path: write_bytes(path, b"\x80\x04\x95not a model"),
        "read_onnx: {path} must be a whole ONNX model, got: ",
    ),
    "truncated": (
        lambda path: write_bytes(
            path, make_model([node_of()], path=path, **kernels()).read_bytes()[:-20]
        ),
        "read_onnx: {path} must be a whole ONNX model, got: ",
    ),
    "empty": (
        lambda path: write_bytes(path, b""),
        "read_onnx: {path} must hold a GRU node of ONNX, got none.",
    ),
    "weights_not_held": (
        lambda path: make_model([node_of()], inputs=("X", "W"), path=path, R=kernels()["R"]),
        "read_onnx: inputs must give 'W', the W of node 'gru', which the file does not hold: "
        "inputs={'W': array}.",
    ),
    "clip": (
        lambda path: make_model([node_of(clip=0.5)], path=path, **kernels()),
        "read_onnx: node 'gru' must have no clip, which this package has no derivative for, got "
        "0.5.",
    ),
    "unknown_activation": (
        lambda path: make_model([node_of(activations=["Sigmoid", "Elu"])], path=path, **kernels()),
        "read_onnx: node 'gru' must have the activations Sigmoid and one of Tanh, Relu, Sigmoid, "
        "Softplus, Affine (Affine with alpha 1 and beta 0), the same in both directions, got "
        "['Sigmoid', 'Elu'] with alpha None and beta None.",
    ),
    "other_gate": (
        lambda path: make_model(
            [node_of(activations=["HardSigmoid", "Tanh"])], path=path, **kernels()
        ),
        "read_onnx: node 'gru' must have the activations Sigmoid and one of Tanh, Relu, Sigmoid, "
        "Softplus, Affine (Affine with alpha 1 and beta 0), the same in both directions, got "
        "['HardSigmoid', 'Tanh'] with alpha None and beta None.",
    ),
    "other_affine": (
        lambda path: make_model(
            [
                node_of(
                    activations=["Sigmoid", "Affine"],
                    activation_alpha=[2.0],
                    activation_beta=[0.0],
                )
            ],
            path=path,
            **kernels(),
        ),
        "read_onnx: node 'gru' must have the activations Sigmoid and one of Tanh, Relu, Sigmoid, "
        "Softplus, Affine (Affine with alpha 1 and beta 0), the same in both directions, got "
        "['Sigmoid', 'Affine'] with alpha [2.0] and beta [0.0].",
    ),
    "direction": (
        lambda path: make_model([node_of(direction="sideways")], path=path, **kernels()),
        "read_onnx: direction of 'gru' must be one of 'forward', 'reverse', 'bidirectional', got "
        "'sideways'.",
    ),
    "layout": (
        lambda path: make_model([node_of(layout=7)], path=path, **kernels()),
        "read_onnx: layout of 'gru' must be one of '0', '1', got '7'.",
    ),
    "no_recurrent_weights": (
        lambda path: make_model([node_of("X", "W")], path=path, **kernels()),
        "read_onnx: node 'gru' must have W [D, 3H, I] and R [D, 3H, H], got {'W': (1, 9, 2)}.",
    ),
    "malformed_constant": (
        lambda path: make_model(
            [onnx.helper.make_node("Transpose", ["V"], ["W"], perm=[5]), node_of()],
            path=path,
            V=kernels()["W"],
            R=kernels()["R"],
        ),
        "read_onnx: node 'W' must be a whole Transpose, got: ",
    ),
    "belied_size": (
        lambda path: make_model([node_of(hidden_size=4)], path=path, **kernels()),
        "read_onnx: node 'gru' must have R of 1 directions and its hidden_size, got (1, 3) for "
        "direction 'forward' and hidden_size 4.",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_with_its_reason(tmp_path, case):
    make, message = BAD_FILES[case]
    path = make(tmp_path / "m.onnx")
    with pytest.raises(ValueError) as caught:
        read_onnx(path)
    assert str(caught.value).startswith(message.replace("{path}", str(path)))


def test_given_inputs_go_before_what_the_file_holds(tmp_path):
    path = make_model([node_of()], inputs=("X", "W"), path=tmp_path / "m", **kernels())
    (read,) = read_onnx(path, inputs={"W": 0 * kernels()["W"]})
    assert not read.params.w_x.any()
    with pytest.raises(ValueError, match=r"^read_onnx: inputs must name inputs .*, got Wtypo\.$"):
        read_onnx(path, inputs={"Wtypo": kernels()["W"]})


def test_constants_are_made_as_the_models_opset_has_it(tmp_path):
    """Before opset 13 the axes of Squeeze are an attribute."""
    helper, arrays = onnx.helper, kernels()
    nodes = [
        helper.make_node("Squeeze", ["V"], ["W"], axes=[0]),
        node_of(),
    ]
    tensors = {"V": arrays["W"][None], "R": arrays["R"]}
    path = make_model(nodes, path=tmp_path / "m", **tensors)
    model = onnx.load(path)
    model.opset_import[0].version = 11
    path.write_bytes(model.SerializeToString())
    np.testing.assert_array_equal(
        read_onnx(path)[0].params.w_x, jaxgru.from_onnx(arrays["W"], arrays["R"]).params.w_x
    )


def test_what_is_random_or_grows_is_not_evaluated(tmp_path):
    helper = onnx.helper
    for operator, inputs in (("RandomUniformLike", ["R"]), ("ConstantOfShape", ["shape"])):
        nodes = [helper.make_node(operator, inputs, ["W"]), node_of()]
        arrays = {"R": kernels()["R"], "shape": np.array([1 << 40])}
        with pytest.raises(ValueError, match=r"^read_onnx: inputs must give 'W', the W of node"):
            read_onnx(make_model(nodes, path=tmp_path / "m", **arrays))


def test_weights_of_the_outer_graph_are_found_from_a_subgraph(tmp_path):
    helper, empty = onnx.helper, onnx.helper.make_empty_tensor_value_info
    arrays = kernels()
    body = helper.make_graph([node_of()], "inner", [], [empty("Y")])
    constant = onnx.numpy_helper.from_array(arrays["W"])
    nodes = [
        helper.make_node("Constant", [], ["W"], value=constant),
        helper.make_node("If", ["c"], ["Y"], then_branch=body, else_branch=body),
    ]
    path = make_model(nodes, inputs=("X", "c"), path=tmp_path / "m", R=arrays["R"])
    wanted = jaxgru.from_onnx(arrays["W"], arrays["R"]).params
    jax.tree.map(np.testing.assert_array_equal, read_onnx(path)[0].params, wanted)


def test_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        read_onnx(tmp_path / "none.onnx")


def test_bad_calls_are_refused_and_leave_no_file(tmp_path):
    path, params = tmp_path / "m.onnx", init_gru(jax.random.key(0), 2, 3)
    with pytest.raises(ValueError, match=r"^write_onnx: outputs must be one of 'every', 'last'"):
        write_onnx(path, params, outputs="all")
    half = init_gru(jax.random.key(0), 2, 3, dtype=jnp.bfloat16)
    with pytest.raises(
        ValueError,
        match=r"^write_onnx: params must be float64, float32, float16, got bfloat16; cast them f",
    ):
        write_onnx(path, half)
    with pytest.raises(ValueError, match=r"^write_onnx: params\[1\]\.w_x must have 3 rows"):
        write_onnx(path, (params, params))
    with pytest.raises(ValueError, match=r"^write_onnx: params\[0\] must have no gains"):
        write_onnx(path, init_gru(jax.random.key(0), 2, 3, layer_norm=True))
    assert list(tmp_path.iterdir()) == []
    (read,) = read_onnx(make_model([node_of()], path=path, **kernels()))
    with pytest.raises(ValueError, match=r"^run_onnx_gru: xs must have three axes, got \(5, 2\)"):
        run_onnx_gru(read, jnp.ones((5, 2)))
    xs = jnp.ones((5, 4, 2))
    with pytest.raises(ValueError, match=r"initial_h must have shape \(1, 4, 3\) .*, got \("):
        run_onnx_gru(read, xs, initial_h=jnp.ones((3, 4, 3)))
    with pytest.raises(TypeError, match=r"^run_onnx_gru: mask must be left out, as the node tells"):
        run_onnx_gru(read, xs, mask=jnp.ones((5, 4), bool))
    with pytest.raises(TypeError, match=r"^run_onnx_gru: node must be an OnnxGRU, got GRUParams"):
        run_onnx_gru(params, xs)
    model = init_token_model(jax.random.key(0), 5, 3)
    with pytest.raises(TypeError, match=r"^write_onnx: params\.w must have the dtype of the lay"):
        write_onnx(path, model._replace(w=model.w.astype(jnp.float16)))


@pytest.mark.usefixtures("x64")
def test_what_a_node_computes_has_autodiffs_gradient(tmp_path):
    problem = make_problem(0, dtype=jnp.float64, bias="none")
    write_onnx(tmp_path / "m.onnx", problem.params, spec=PYTORCH)
    (read,) = read_onnx(tmp_path / "m.onnx")

    def loss(xs, **options):
        ys, h_last = run_onnx_gru(read, xs, jnp.array([7, 0, 3]), **options)
        return jnp.sum(jnp.sin(ys)) + jnp.sum(h_last**2)

    got = jax.jit(jax.grad(loss))(problem.xs)
    assert_close(got, jax.grad(lambda xs: loss(xs, gradient="autodiff"))(problem.xs), 1e-12)
