"""Which GRU nodes of an ONNX graph `read_onnx` calls a stack: those that read all outputs below."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_onnx_files import evaluate

import jaxgru
from jaxgru.interop import read_onnx, write_onnx
from jaxgru.interop.onnx import stacks

onnx = pytest.importorskip("onnx", reason="onnx is an extra")

CONSTANTS = {
    "zero": 0, "one": 1, "true": True, "false": False, "0": [0], "1": [1], "2": [2], "3": [3],
    "-1": [-1], "max": [2**31], "all": [5, -1, 3], "rows": [0, 0, -1], "steps": [-1, 1, 1, 1],
    "batch": [1, 1, -1, 1], "flat": [-1, 3], "few": [1000], "low": [-(2**31)],
    "pads": [1, 0, 0, -1, 0, 0], "few_steps": [0, 1, 2], "wrong": [4, -1, 3],
    "rows6": [0, -1, 6], "many": [2**20, 1, 1, 1],
    "thousand": 1000, "huge": 2**40,
}  # fmt: skip


def two_nodes(path, between, lower=(), upper=(), directions=1, width=None, opset=18, **attributes):
    """A file with the nodes "a", of outputs Y and Yh, those of `between`, and "b" with input z.

    `lower` and `upper` are the further inputs of "a" and "b", the attributes those of both. A node
    between them is "operator inputs > outputs" and its attributes.
    """
    helper, rng = onnx.helper, np.random.default_rng(0)
    both: dict = attributes | {"hidden_size": 3}
    both |= {"direction": "bidirectional"} if directions == 2 else {}
    last = both.pop("of_upper", {})
    sizes = {"W": 3, "W2": width or 3 * directions, "R": 3, "R2": 3}
    arrays = {k: rng.normal(size=(directions, 9, v)) for k, v in sizes.items()}
    arrays |= {
        "ones": np.ones(1),
        "half": np.array(0.5),
        "large": np.array(9.0),
        "near": np.ones(3) + 1e-7,
    }
    arrays = {k: v.astype(np.float32) for k, v in arrays.items()}
    arrays |= {k: np.array(v) for k, v in CONSTANTS.items()}
    nodes = [helper.make_node("GRU", ["X", "W", "R", "", *lower], ["Y", "Yh"], "a", **both)]
    for text, options in between:
        operator, *names = text.split()
        place = names.index(">")
        inputs = ["" if name == "-" else name for name in names[:place]]
        nodes.append(helper.make_node(operator, inputs, names[place + 1 :], **options))
    upper = ["z", "W2", "R2", "", *upper]
    nodes.append(helper.make_node("GRU", upper, ["Y2"], "b", **both | last))
    kinds = {"X": 1, "V": 1, "h0": 1, "lengths": 6, "other": 6, "index": 7, "gate": 9}
    infos = [helper.make_tensor_value_info(k, v, None) for k, v in kinds.items()]
    tensors = [onnx.numpy_helper.from_array(v, k) for k, v in arrays.items()]
    graph = helper.make_graph(
        nodes, "g", infos, [helper.make_empty_tensor_value_info("Y2")], tensors
    )
    model = helper.make_model(graph, opset_imports=[helper.make_operatorsetid("", opset)])
    path.write_bytes(model.SerializeToString())
    return path


def op(text, **attributes):
    return text, attributes


SQUEEZED, Z = op("Squeeze Y 1 > s"), op("Squeeze Y 1 > z")
LENGTHS = {"lower": ["lengths"], "upper": ["lengths"]}
VALID = [  # t < lengths[b] as v, [T, 1, B, 1]
    op("Shape X > d"), op("Gather d zero > T"), op("Range zero T one > t"),
    op("Reshape t steps > t4"), op("Cast lengths > l", to=7), op("Reshape l batch > l4"),
    op("Less t4 l4 > v"),
]  # fmt: skip
REPEATED = [*VALID, op("Unsqueeze Yh 0 > y4"), op("Where v Y y4 > m"), op("Squeeze m 1 > z")]
SIDE_BY_SIDE = [op("Transpose Y > y4", perm=[0, 2, 1, 3]), op("Reshape y4 rows > z")]
DIRECTIONS = [op("Gather Y zero > f", axis=1), op("Gather Y one > g", axis=1)]
STACKS = {
    "squeeze": ([Z], {}),
    "there_and_back": (
        [SQUEEZED, op("Transpose s > b", perm=[1, 0, 2]), op("Identity b > i"),
         op("Transpose i > z", perm=[1, 0, 2])],
        {},
    ),
    "dropout_in_inference": ([SQUEEZED, op("Dropout s half false > z")], {}),
    "dropout_without_a_mode": ([SQUEEZED, op("Dropout s > z")], {}),
    "cast_to_the_same_dtype": ([SQUEEZED, op("Cast s > z", to=1)], {}),
    "two_directions": (SIDE_BY_SIDE, {"directions": 2}),
    "two_directions_by_index": (
        [*DIRECTIONS, op("Concat f g > z", axis=-1)], {"directions": 2}
    ),
    "two_directions_split": (
        [op("Split Y > f g", axis=1, num_outputs=2), op("Concat f g > c", axis=-1),
         op("Squeeze c 1 > z")],
        {"directions": 2},
    ),
    "sum_of_directions": (
        [op("ReduceSum Y 1 > z", keepdims=0)], {"directions": 2, "width": 3}
    ),
    "lengths": ([Z], LENGTHS),
    "last_state_after_the_end": (REPEATED, LENGTHS),
    "states_from_the_caller": ([Z], {"lower": ["", "h0"], "upper": ["", "h0"]}),
    "zero_states_of_the_batch": (
        [Z, op("Shape X > d"), op("Gather d 1 > n"), op("Concat 1 n 3 > p", axis=0),
         op("ConstantOfShape p > zeros")],
        {"upper": ["", "zeros"]},
    ),
}  # fmt: skip


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("case", STACKS)
def test_stack_is_found_and_has_the_values_of_the_model(tmp_path, case):
    between, options = STACKS[case]
    lower, upper = read_onnx(two_nodes(tmp_path / "m", between, **options))
    assert (lower.below, upper.below) == ("", "a")
    rng, given = np.random.default_rng(1), LENGTHS if "lengths" in lower.computed.values() else {}
    xs = rng.normal(size=(5, 4, 3)).astype(np.float32)
    unused = {"V": xs, "other": 0, "index": 0, "gate": True, "h0": np.zeros((1, 4, 3), "f")}
    lengths = np.array([5, 0, 2, 4], np.int32) if given else np.full(4, 5, np.int32)
    wanted = evaluate(tmp_path / "m", X=xs, lengths=lengths, **unused)["Y2"]
    mask, merge = jaxgru.length_mask(lengths, 5), "sum" if "width" in options else "concat"
    stack = lower.params, upper.params
    hs = jaxgru.gru_stack(stack, jnp.asarray(xs), mask=mask, merge=merge)[1]
    if "directions" in options:
        wanted = wanted.transpose(0, 2, 1, 3) if merge == "concat" else wanted.sum(1)[:, :, None]
    else:
        wanted = wanted[:, 0, :, None]
    wanted = wanted.reshape(5, 4, -1)
    np.testing.assert_allclose(np.asarray(hs)[mask], wanted[mask], atol=1e-6)


BRANCH = "Where v Y y4 > m"
OTHERS = {
    "time_and_batch_swapped": ([SQUEEZED, op("Transpose s > z", perm=[1, 0, 2])], {}),
    "summed_over_time": ([SQUEEZED, op("ReduceSum s 0 > z", keepdims=1)], {}),
    "last_state": ([op("Identity Yh > z")], {}),
    "last_state_of_every_step": (
        [op("Shape Y > d"), op("Unsqueeze Yh 0 > y4"), op("Expand y4 d > e"),
         op("Squeeze e 1 > z")],
        {},
    ),
    "last_step": ([SQUEEZED, op("Gather s -1 > z", axis=0)], {}),
    "select_by_data": (
        [SQUEEZED, op("Less s half > v"), op("Where v s half > z")], {}
    ),
    "select_by_the_input": ([SQUEEZED, op("Less V half > v"), op("Where v s V > z")], {}),
    "select_by_another_input": ([SQUEEZED, op("Where gate s V > z")], {}),
    "select_that_is_always_taken": ([SQUEEZED, op("Where true s half > z")], {}),
    "select_of_the_first_thousand_steps": (
        [*VALID[:4], op("Less t4 thousand > v"), op("Where v Y half > m"), op("Squeeze m 1 > z")],
        LENGTHS,
    ),
    "select_of_short_sequences": (
        [op("Cast lengths > l", to=7), op("Reshape l batch > l4"), op("Less l4 thousand > v"),
         op("Where v Y half > m"), op("Squeeze m 1 > z")],
        LENGTHS,
    ),
    "select_of_sequences_of_two_steps": (
        [op("Shape Y > d"), op("Gather d one > n"), op("Cast lengths > l", to=7),
         op("Reshape l batch > l4"), op("Less n l4 > v"), op("Where v Y half > m"),
         op("Squeeze m 1 > z")],
        LENGTHS,
    ),
    "repeated_with_other_lengths": (
        [op(text.replace("lengths", "other"), **v) for text, v in REPEATED], LENGTHS
    ),
    "zeros_at_valid_steps": (
        [op(text.replace(BRANCH, "Where v y4 Y > m"), **v) for text, v in REPEATED], LENGTHS
    ),
    "lengths_of_one_node": ([Z], {"upper": ["lengths"]}),
    "lengths_of_the_lower_node": ([Z], {"lower": ["lengths"]}),
    "other_lengths": ([Z], {"lower": ["lengths"], "upper": ["other"]}),
    "state_of_the_lower_node": ([Z], {"upper": ["", "Yh"]}),
    "state_from_the_data": ([Z, op("ReduceMean X 0 > m")], {"upper": ["", "m"]}),
    "state_of_a_node_on_another_input": (
        [Z, op("GRU V W R > o oh", hidden_size=3)], {"upper": ["", "oh"]}
    ),
    "two_sources": ([SQUEEZED, op("Concat s V > z", axis=-1)], {"width": 6}),
    "two_copies": ([SQUEEZED, op("Concat s s > z", axis=-1)], {"width": 6}),
    "residual": ([SQUEEZED, op("Add s X > z")], {}),
    "product_with_data": ([SQUEEZED, op("Mul s V > z")], {}),
    "product_with_nearly_one": ([SQUEEZED, op("Mul s near > z")], {}),
    "activation": ([SQUEEZED, op("Relu s > z")], {}),
    "activation_that_is_the_identity_here": ([SQUEEZED, op("Clip s - large > z")], {}),
    "dropout_in_training": ([SQUEEZED, op("Dropout s half true > z")], {}),
    "dropout_of_an_unknown_mode": ([SQUEEZED, op("Dropout s half gate > z")], {}),
    "mask_of_a_dropout": ([SQUEEZED, op("Dropout s > k y4"), op("Cast y4 > z", to=1)], {}),
    "cast_to_half": ([SQUEEZED, op("Cast s > h", to=10), op("Cast h > z", to=1)], {}),
    "slice_of_time": ([SQUEEZED, op("Slice s 1 max 0 > z")], {}),
    "slice_of_a_thousand_steps": ([SQUEEZED, op("Slice s 0 few 0 > z")], {}),
    "reversed": ([SQUEEZED, op("Slice s -1 low 0 -1 > z")], {}),
    "reversed_sequences": (
        [SQUEEZED, op("ReverseSequence s lengths > z", batch_axis=1, time_axis=0)], {}
    ),
    "shifted": ([SQUEEZED, op("Pad s pads > z")], {}),
    "gather_by_an_input": ([SQUEEZED, op("Gather s index > z", axis=0)], {}),
    "gather_by_data": ([SQUEEZED, op("Cast V > i", to=7), op("Gather s i > z")], {}),
    "gather_of_some_steps": ([SQUEEZED, op("Gather s few_steps > z", axis=0)], {}),
    "batch_into_time": ([op("Reshape Y flat > r"), op("Unsqueeze r 1 > z")], {}),
    "time_into_batch": ([op("Reshape Y flat > r"), op("Unsqueeze r 0 > z")], {}),
    "fixed_sizes": ([op("Reshape Y all > z")], {}),
    "wrong_order_of_a_reshape": ([SQUEEZED, op("Reshape s wrong > z")], {}),
    "directions_not_side_by_side": ([op("Reshape Y rows6 > z")], {"directions": 2}),
    "directions_swapped": (
        [*DIRECTIONS, op("Concat g f > z", axis=-1)], {"directions": 2}
    ),
    "directions_swapped_split": (
        [op("Split Y > f g", axis=1, num_outputs=2), op("Concat g f > c", axis=-1),
         op("Squeeze c 1 > z")],
        {"directions": 2},
    ),
    "one_direction": ([op("Gather Y zero > z", axis=1)], {"directions": 2, "width": 3}),
    "one_direction_twice": (
        [*DIRECTIONS, op("Concat f f > z", axis=-1)], {"directions": 2}
    ),
    "wrong_axis_of_squeeze": ([op("Transpose Y > t", perm=[1, 0, 2, 3]),
                               op("Squeeze t 1 > z")], {}),
    "reverse": ([Z], {"direction": "reverse"}),
    "reverse_above": ([Z], {"of_upper": {"direction": "reverse"}}),
    "other_domain": ([SQUEEZED, op("Cast s > z", to=1, domain="custom")], {}),
    "expansion_too_large": ([SQUEEZED, op("Expand s many > z")], {}),
    "range_too_large": (
        [op("Range zero huge one > t"), SQUEEZED, op("Gather s t > z", axis=0)], {}
    ),
    "circle": ([op("Identity i > z"), op("Identity z > i")], {}),
    "batch_first_above": ([Z], {"of_upper": {"layout": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_nodes_with_anything_else_between_them_are_no_stack(tmp_path, case):
    between, options = OTHERS[case]
    nodes = read_onnx(two_nodes(tmp_path / "m", between, **options))
    assert len(nodes) > 1 and {node.below for node in nodes} == {""}


def test_batch_first_nodes_are_a_stack_without_a_transpose_in_time(tmp_path):
    """With layout=1 Y is [B, T, D, H]."""
    path = two_nodes(tmp_path / "m", [op("Squeeze Y 2 > z")], layout=1)
    assert read_onnx(path)[1].below == "a"
    between = [op("Squeeze Y 2 > s"), op("Transpose s > z", perm=[1, 0, 2])]
    assert read_onnx(two_nodes(tmp_path / "m", between, layout=1))[1].below == ""


def test_arrays_that_are_too_large_are_not_computed(tmp_path, monkeypatch):
    path = two_nodes(tmp_path / "m", [op("Gather Y zero > z", axis=1)])
    assert read_onnx(path)[1].below == "a"
    monkeypatch.setattr(stacks, "_MOST", 20)
    assert read_onnx(path)[1].below == ""


def test_name_that_two_nodes_have_is_no_node_below(tmp_path):
    model = onnx.load(two_nodes(tmp_path / "m", [Z]))
    for node in model.graph.node:
        node.name = "same"
    onnx.save(model, tmp_path / "m")
    assert [node.below for node in read_onnx(tmp_path / "m")] == ["", ""]


def test_nodes_of_a_subgraph_are_no_stack(tmp_path):
    """It may run often, or not at all; the outer graph may also hold the lower node."""
    helper = onnx.helper
    for moved in (1, 3):  # the last node, or all
        model = onnx.load(two_nodes(tmp_path / "m", [Z]))
        nodes, output = list(model.graph.node), [helper.make_empty_tensor_value_info("Y2")]
        body = helper.make_graph(nodes[-moved:], "body", [], output)
        branch = helper.make_node("If", ["gate"], ["Y2"], then_branch=body, else_branch=body)
        del model.graph.node[-moved:]
        model.graph.node.append(branch)
        onnx.save(model, tmp_path / "m")
        assert {node.below for node in read_onnx(tmp_path / "m")} == {""}


def test_chain_that_is_too_long_for_a_proof_is_no_stack(tmp_path):
    chain = [op(f"Identity i{n} > i{n + 1}") for n in range(2000)]
    path = two_nodes(tmp_path / "m", [op("Squeeze Y 1 > i0"), *chain, op("Identity i2000 > z")])
    assert read_onnx(path)[1].below == ""


def test_layers_of_a_written_stack_are_found(tmp_path):
    """With lengths, which are compared with the steps of the first layer's input."""
    layers = jaxgru.init_stack(jax.random.key(0), 2, 3, 4, bidirectional=True)
    for state in (True, False):
        write_onnx(tmp_path / "m", layers, lengths=True, state=state)
        below = [node.below for node in read_onnx(tmp_path / "m")]
        assert below == ["", "gru_0", "gru_1", "gru_2"]
    write_onnx(tmp_path / "m", layers, residual=True)
    assert [node.below for node in read_onnx(tmp_path / "m")] == ["", "gru_0", "", ""]
