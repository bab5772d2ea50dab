"""GRU nodes of ONNX files: the operator's own node tests, models, refused files and calls."""

import functools
import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, make_problem, with_spec

import jaxgru
from jaxgru import CHO_2014, PYTORCH, Bidirectional, GRUSpec, init_stack, interop, length_mask
from jaxgru.interop import read_onnx, write_onnx
from jaxgru.models import SequenceParams, TokenParams, final_outputs, sequence_outputs, token_logits

onnx = pytest.importorskip("onnx", reason="onnx is an extra")
reference = pytest.importorskip("onnx.reference", reason="onnx is an extra")
op_run = pytest.importorskip("onnx.reference.op_run", reason="onnx is an extra")

NODE_TESTS = [
    *("test_gru_defaults", "test_gru_with_initial_bias", "test_gru_seq_length"),
    *("test_gru_batchwise", "test_gru_reverse", "test_gru_bidirectional"),
]


def run_node(node, xs):
    """(Y, Y_h) of a node by `gru`; as in ONNX zero at masked steps and for empty sequences."""
    h0, lengths = node.initial_h, node.sequence_lens
    if node.layout:
        xs = jnp.swapaxes(xs, 0, 1)
        h0 = None if h0 is None else np.swapaxes(h0, 0, 1)
    mask = None if lengths is None else length_mask(lengths, len(xs))
    if node.direction == "bidirectional":
        h0 = None if h0 is None else tuple(map(jnp.asarray, h0))
        h_last, hs = jaxgru.gru_bidirectional(node.params, xs, h0, mask=mask)
        h_last, ys = jnp.stack(h_last), jnp.stack(jnp.split(hs, 2, axis=-1), axis=1)
    else:
        h0, reverse = None if h0 is None else jnp.asarray(h0[0]), node.direction == "reverse"
        h_last, hs = jaxgru.gru(node.params, xs, h0, mask=mask, reverse=reverse)
        h_last, ys = h_last[None], hs[:, None]
    if mask is not None:
        ys = jnp.where(mask[:, None, :, None], ys, 0.0)
        h_last = jnp.where(mask.any(axis=0)[None, :, None], h_last, 0.0)
    if node.layout:
        return jnp.transpose(ys, (2, 0, 1, 3)), jnp.swapaxes(h_last, 0, 1)
    return ys, h_last


@functools.cache
def node_tests():
    """The cases that ONNX ships for the operator, by name."""
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("onnx.backend.test.case.node.gru")  # fills the list of cases
    return {case.name: case for case in node._NodeTestCases if "gru" in case.name}


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
        results = dict(zip(("Y", "Y_h"), run_node(node, xs)))
        for output, wanted in zip(case.model.graph.output, outputs):
            np.testing.assert_allclose(results[output.name], wanted, rtol=case.rtol, atol=1e-6)


def make_model(nodes, initializers=(), inputs=("X",), path=None, **arrays):
    """Writes a graph of the nodes to the path."""
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


@pytest.mark.parametrize("layout", [0, 1])
def test_lengths_and_states_in_a_file_are_read(tmp_path, layout):
    """initial_h has the axes of the layout, as in the file."""
    h0, lengths = np.random.default_rng(1).normal(size=(2, 4, 3)), np.array([5, 2, 0, 3], np.int32)
    saved = np.swapaxes(h0, 0, 1) if layout else h0
    node = node_of("X", "W", "R", "", "lengths", "h0", direction="bidirectional", layout=layout)
    path = make_model([node], path=tmp_path / "m", lengths=lengths, h0=saved, **kernels(2))
    (read,) = read_onnx(path)
    assert (read.direction, read.layout, read.computed) == ("bidirectional", layout, {})
    np.testing.assert_array_equal(read.initial_h, saved)
    np.testing.assert_array_equal(read.sequence_lens, lengths)


def test_weights_that_the_graph_computes_from_constants_are_found(tmp_path):
    """PyTorch's exporter writes such chains."""
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
    wanted = interop.from_onnx(arrays["W"], arrays["R"], linear_before_reset=1)
    jax.tree.map(np.testing.assert_array_equal, read.params, wanted.params)
    assert read.params.spec == PYTORCH
    assert (read.initial_h, read.computed) == (None, {"initial_h": "h0"})


def test_nodes_of_subgraphs_are_found(tmp_path):
    helper, empty = onnx.helper, onnx.helper.make_empty_tensor_value_info
    body = helper.make_graph([node_of()], "inner", [], [empty("Y")])
    branch = helper.make_node("If", ["c"], ["Y"], then_branch=body, else_branch=body)
    path = make_model([branch], inputs=("X", "c"), path=tmp_path / "m", **kernels())
    assert [node.name for node in read_onnx(path)] == ["gru", "gru"]


SPECS = {
    "before": (CHO_2014, CHO_2014),
    "writes": (GRUSpec("after", "write", "relu"), GRUSpec("after", "write", "relu")),
    "both": (CHO_2014, GRUSpec("after", "write", "identity")),
}


@pytest.mark.parametrize("kind", SPECS)
def test_read_stack_is_the_written_one(tmp_path, kind):
    """The layers may have different equations."""
    layers = init_stack(jax.random.key(0), 2, (3, 4), bidirectional=True, scheme="pytorch")
    layers = tuple(map(with_spec, layers, SPECS[kind]))
    notes = write_onnx(tmp_path / "m.onnx", layers, lengths=True, state=True)
    nodes = read_onnx(tmp_path / "m.onnx")
    assert len(notes) == (kind != "before")
    wanted = interop.to_onnx(layers).weights
    for node, weights, spec in zip(nodes, wanted, SPECS[kind], strict=True):
        assert isinstance(node.params, Bidirectional)
        keeps = GRUSpec(spec.reset, "keep", spec.activation)
        assert [cell.spec for cell in node.params] == [keeps, keeps]
        again = interop.to_onnx(node.params).weights
        jax.tree.map(np.testing.assert_array_equal, again, weights)
    assert nodes[0].computed == {"sequence_lens": "lengths", "initial_h": "h0_0"}


class GRU(op_run.OpRun):
    """The operator with all of its inputs; onnx's own evaluator ignores lengths."""

    op_domain = ""

    def _run(self, x, w, r, b=None, lengths=None, h0=None, **attributes):
        del attributes["hidden_size"], attributes["clip"]
        after = attributes.pop("linear_before_reset")
        params = interop.from_onnx(w, r, b, linear_before_reset=after).params
        names = {"direction": attributes["direction"], "layout": attributes["layout"]}
        given = {"initial_h": h0, "sequence_lens": lengths, "computed": {}}
        node = interop.OnnxGRU("gru", params, **names, **given)
        return tuple(np.asarray(v) for v in run_node(node, jnp.asarray(x)))


def evaluate(path, operators=(GRU,), **inputs):
    """The results of a model by name."""
    evaluator = reference.ReferenceEvaluator(str(path), new_ops=list(operators))
    return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.usefixtures("x64", "uncompiled")
@pytest.mark.parametrize("embedding", [True, False])
def test_written_token_model_has_our_values_in_the_reference_evaluator(tmp_path, embedding):
    """In float64, with onnx's own GRU if there are no lengths."""
    layers = (
        make_problem(0, inputs=2 if embedding else 5).params,
        make_problem(1, inputs=3).params,
    )
    layers = with_spec(layers, PYTORCH)
    model = TokenParams(draw(2, 5, 2) if embedding else None, layers, draw(3, 3, 5), draw(4, 5))
    tokens = np.random.default_rng(0).integers(0, 5, (7, 3))
    write_onnx(tmp_path / "m.onnx", model, residual=True)
    results = evaluate(tmp_path / "m.onnx", operators=(), tokens=tokens)
    states, wanted = token_logits(model, jnp.asarray(tokens), residual=True)
    assert_close(results["outputs"], wanted, 1e-12)
    for number, state in enumerate(states):
        assert_close(results[f"h_last_{number}"][0], state, 1e-12)
    write_onnx(tmp_path / "m.onnx", model, lengths=True, residual=True)
    lengths = np.array([7, 0, 4], np.int32)
    results = evaluate(tmp_path / "m.onnx", tokens=tokens, lengths=lengths)
    mask = length_mask(lengths, 7)
    states, wanted = token_logits(model, jnp.asarray(tokens), mask=mask, residual=True)
    assert_close(results["outputs"], wanted, 1e-12)
    assert_close(results["h_last_1"][0], states[1], 1e-12)


@pytest.mark.usefixtures("x64", "uncompiled")
@pytest.mark.parametrize("outputs", ["every", "last"])
@pytest.mark.parametrize("merge", ["concat", "sum"])
@pytest.mark.parametrize("residual", [True, False])
def test_written_model_of_two_directions_repeats_states_as_ours(tmp_path, outputs, merge, residual):
    """With lengths, one of them 0, and initial states."""
    size = 6 if merge == "concat" else 3
    layers = tuple(
        Bidirectional(
            make_problem(n, inputs=width).params, make_problem(n + 2, inputs=width).params
        )
        for n, width in enumerate((2, size))
    )
    model = SequenceParams(layers, draw(4, size, 2), draw(5, 2))
    xs, states, lengths = draw(6, 7, 3, 2), draw(7, 2, 2, 3, 3), np.array([7, 0, 4], np.int32)
    options = {"merge": merge, "residual": residual}
    write_onnx(tmp_path / "m", model, outputs=outputs, lengths=True, state=True, **options)
    given = {"xs": np.asarray(xs), "lengths": lengths}
    given |= {f"h0_{number}": np.asarray(h0) for number, h0 in enumerate(states)}
    results = evaluate(tmp_path / "m", **given)
    h0 = tuple((state[0], state[1]) for state in states)
    run = sequence_outputs if outputs == "every" else final_outputs
    h_last, wanted = run(model, xs, h0, mask=length_mask(lengths, 7), **options)
    assert_close(results["outputs"], wanted, 1e-12)
    for number, h in enumerate(h_last):
        assert_close(results[f"h_last_{number}"], np.stack(h), 1e-12)
    found = onnx.load(tmp_path / "m").graph
    assert [v.name for v in found.input] == ["xs", "lengths", "h0_0", "h0_1"]
    assert [v.name for v in found.output] == ["outputs", "h_last_0", "h_last_1"]
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
              for v in (*found.input, *found.output)]  # fmt: skip
    every = ["T", "B", 2] if outputs == "every" else ["B", 2]
    states = [[2, "B", 3]] * 2
    assert shapes == [["T", "B", 2], ["B"], *states, every, *states]


def test_written_stack_gives_its_top_layers_outputs(tmp_path):
    params = make_problem(0, dtype=jnp.float32).params
    assert write_onnx(tmp_path / "m", params) == ()
    model = onnx.load(tmp_path / "m")
    assert (model.producer_name, model.ir_version, model.opset_import[0].version) == (
        "jaxgru", 8, 17
    )  # fmt: skip
    xs = np.ones((7, 3, 2), np.float32)
    h_last, hs = jaxgru.gru(params, xs)
    results = evaluate(tmp_path / "m", xs=xs)
    np.testing.assert_allclose(results["outputs"], hs, atol=1e-6)
    np.testing.assert_allclose(results["h_last_0"][0], h_last, atol=1e-6)


def write_bytes(path, data):
    path.write_bytes(data)
    return path


BAD_FILES = {
    "no_model": (
        lambda path: write_bytes(path, b"\x80\x04\x95not a model"),
        "read_onnx: {path} must be an intact ONNX model, got: ",
    ),
    "truncated": (
        lambda path: write_bytes(
            path, make_model([node_of()], path=path, **kernels()).read_bytes()[:-20]
        ),
        "read_onnx: {path} must be an intact ONNX model, got: ",
    ),
    "empty": (
        lambda path: write_bytes(path, b""),
        "read_onnx: {path} must hold a GRU node of ONNX, got none.",
    ),
    "weights_not_held": (
        lambda path: make_model([node_of()], inputs=("X", "W"), path=path, R=kernels()["R"]),
        "read_onnx: inputs must hold 'W', the W of node 'gru', which the file does not hold: pass "
        "inputs={'W': array}.",
    ),
    "clip": (
        lambda path: make_model([node_of(clip=0.5)], path=path, **kernels()),
        "read_onnx: node 'gru' must have no clip, which this package does not compute, got 0.5.",
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
        "read_onnx: node 'gru' must have W [D, 3H, I] and R [D, 3H, H], got {'W': (1, 9, 2)} for "
        "direction 'forward' and hidden_size 3.",
    ),
    "weights_without_axes": (
        lambda path: make_model(
            [node_of(hidden_size=None)], path=path, W=kernels()["W"], R=np.array(1, np.float32)
        ),
        "read_onnx: node 'gru' must have W [D, 3H, I] and R [D, 3H, H], got {'W': (1, 9, 2), 'R': "
        "()} for direction 'forward' and hidden_size None.",
    ),
    "malformed_constant": (
        lambda path: make_model(
            [onnx.helper.make_node("Transpose", ["V"], ["W"], perm=[5]), node_of()],
            path=path,
            V=kernels()["W"],
            R=kernels()["R"],
        ),
        "read_onnx: node 'W' must be a valid Transpose, got: ",
    ),
    "wrong_hidden_size": (
        lambda path: make_model([node_of(hidden_size=4)], path=path, **kernels()),
        "read_onnx: node 'gru' must have W [D, 3H, I] and R [D, 3H, H], got {'W': (1, 9, 2), 'R': "
        "(1, 9, 3)} for direction 'forward' and hidden_size 4.",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_with_its_reason(tmp_path, case):
    make, message = BAD_FILES[case]
    path = make(tmp_path / "m.onnx")
    with pytest.raises(ValueError) as caught:
        read_onnx(path)
    assert str(caught.value).startswith(message.replace("{path}", str(path)))


def test_given_inputs_replace_the_values_in_the_file(tmp_path):
    path = make_model([node_of()], inputs=("X", "W"), path=tmp_path / "m", **kernels())
    (read,) = read_onnx(path, inputs={"W": 0 * kernels()["W"]})
    assert not read.params.w_x.any()
    with pytest.raises(ValueError, match=r"^read_onnx: inputs must name inputs .*, got Wtypo\.$"):
        read_onnx(path, inputs={"Wtypo": kernels()["W"]})


def test_constants_are_computed_with_the_opset_of_the_model(tmp_path):
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
        read_onnx(path)[0].params.w_x, interop.from_onnx(arrays["W"], arrays["R"]).params.w_x
    )


def test_operators_that_are_random_or_grow_are_not_evaluated(tmp_path):
    helper = onnx.helper
    for operator, inputs in (("RandomUniformLike", ["R"]), ("ConstantOfShape", ["shape"])):
        nodes = [helper.make_node(operator, inputs, ["W"]), node_of()]
        arrays = {"R": kernels()["R"], "shape": np.array([1 << 40])}
        with pytest.raises(ValueError, match=r"^read_onnx: inputs must hold 'W', the W of node"):
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
    wanted = interop.from_onnx(arrays["W"], arrays["R"]).params
    jax.tree.map(np.testing.assert_array_equal, read_onnx(path)[0].params, wanted)


def test_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        read_onnx(tmp_path / "none.onnx")


CELL = make_problem(0, dtype=jnp.float32).params
BOTH = init_stack(jax.random.key(0), 2, 3, 2, bidirectional=True)
BAD_CALLS = {
    "deep_nesting": (
        lambda path: read_onnx(
            make_model(
                [
                    *(
                        onnx.helper.make_node("Identity", [f"w{n}"], [f"w{n + 1}"])
                        for n in range(2000)
                    ),
                    node_of("X", "w2000", "R"),
                ],
                path=path,
                w0=kernels()["W"],
                R=kernels()["R"],
            )
        ),
        ValueError,
        "read_onnx: {path} must compute its weights with fewer nodes, got a chain of nodes beyond "
        "Python's recursion limit.",
    ),
    "outputs": (
        lambda path: write_onnx(path, CELL, outputs="all"),
        ValueError,
        "write_onnx: outputs must be one of 'every', 'last', got 'all'.",
    ),
    "bfloat16": (
        lambda path: write_onnx(path, make_problem(0, dtype=jnp.bfloat16).params),
        ValueError,
        "write_onnx: params must be float64, float32, float16, got bfloat16; cast them first.",
    ),
    "sizes": (
        lambda path: write_onnx(path, (CELL, CELL)),
        ValueError,
        "write_onnx: params[1] must take the 3 outputs of the layer below it, got I=2.",
    ),
    "merge": (
        lambda path: write_onnx(path, BOTH, merge="sum"),
        ValueError,
        "write_onnx: params[1].forward.w_x must have 3 rows (the outputs of params[0], "
        "merge='sum'), got 6.",
    ),
    "lengths": (
        lambda path: write_onnx(path, CELL, lengths=1),
        TypeError,
        "write_onnx: lengths must be a bool, got 1.",
    ),
    "state": (
        lambda path: write_onnx(path, CELL, state="no"),
        TypeError,
        "write_onnx: state must be a bool, got 'no'.",
    ),
    "layer_norm_of_a_model": (
        lambda path: write_onnx(
            path,
            SequenceParams(
                (CELL, make_problem(0, inputs=3, layer_norm=True, dtype=jnp.float32).params),
                np.ones((3, 2), np.float32),
                np.ones(2, np.float32),
            ),
        ),
        ValueError,
        "write_onnx: params.layers[1] must have no layer-norm scale, because ONNX's GRU has no "
        "layer normalization of the gates' products, got g_x or g_h.",
    ),
    "layer_norm": (
        lambda path: write_onnx(path, make_problem(0, layer_norm=True, dtype=jnp.float32).params),
        ValueError,
        "write_onnx: params[0] must have no layer-norm scale, because ONNX's GRU has no layer "
        "normalization of the gates' products, got g_x or g_h.",
    ),
    "dtype_of_a_head": (
        lambda path: write_onnx(path, TokenParams(None, (CELL,), np.ones((3, 2)), np.ones(2))),
        TypeError,
        "write_onnx: params.w must have the dtype of the layers, float32, got float64; cast one of "
        "them.",
    ),
    "head": (
        lambda path: write_onnx(path, SequenceParams((CELL,), np.ones((4, 2)), np.ones(2))),
        ValueError,
        "write_onnx: params.w must have 3 rows (the outputs of the top layer, merge='concat'), got "
        "4; pass the merge that it was made with.",
    ),
    "bias_of_a_head": (
        lambda path: write_onnx(
            path,
            SequenceParams((CELL,), np.ones((3, 2), np.float32), np.ones(1, np.float32)),
        ),
        ValueError,
        "write_onnx: params.b must have shape (2,) (the columns of params.w), got (1,).",
    ),
    "rows_of_an_embedding": (
        lambda path: write_onnx(
            path,
            TokenParams(
                np.ones((4, 2), np.float32),
                (CELL,),
                np.ones((3, 5), np.float32),
                np.ones(5, np.float32),
            ),
        ),
        ValueError,
        "write_onnx: params.embedding must have shape (5, 2) (the columns of params.w, then the "
        "rows of the first layer's w_x), got (4, 2).",
    ),
    "no_input": (
        lambda path: read_onnx(
            make_model([node_of()], path=path, **kernels()), inputs={"b": 1, "a": 2}
        ),
        ValueError,
        "read_onnx: inputs must name inputs of the graph, R, W, X, got a, b.",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_is_refused_and_leaves_no_file(tmp_path, case):
    call, kind, message = BAD_CALLS[case]
    path = tmp_path / "m.onnx"
    with pytest.raises(kind) as caught:
        call(path)
    assert str(caught.value) == message.replace("{path}", str(path))
    assert not path.exists() or message.startswith("read_onnx")
