"""`python -m jaxgru.interop`: files in, files out, what it prints, what it refuses."""

import errno
import json
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxgru
from experiments import char_lm
from jaxgru import CHUNG_2014, PYTORCH, GRUSpec, init_gru, init_stack, interop
from jaxgru.interop.__main__ import main
from jaxgru.interop.convert.libraries import NAMES
from jaxgru.interop.convert.writing import largest_difference
from jaxgru.models import init_token_model

st = pytest.importorskip("safetensors.numpy", reason="safetensors is an extra")
onnx = pytest.importorskip("onnx", reason="onnx is an extra")

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The command compares values on a random input, and compiling would be nearly all of its time.
pytestmark = pytest.mark.usefixtures("uncompiled")


def torch_file(path, prefix="", **stack):
    """A state dict as torch would have written it."""
    layers = init_stack(jax.random.key(0), 2, 3, spec=PYTORCH, scheme="pytorch", **stack)
    weights = interop.to_torch(layers).weights
    st.save_file({f"{prefix}{k}": v for k, v in weights.items()}, path)
    return layers


def run(capsys, *argv):
    """(exit code, printed) of the command."""
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize(
    "both",
    [pytest.param(False, id="one_way", marks=pytest.mark.slow), pytest.param(True, id="both_ways")],
)
def test_weights_that_went_through_every_format_are_the_same(tmp_path, capsys, both):
    """All that hold this cell as it is, one after the other, back to PyTorch."""
    layers = torch_file(tmp_path / "torch.safetensors", num_layers=2, bidirectional=both)
    formats = ["onnx", "keras", "jaxgru", "torch"]
    ends = {"onnx": "onnx", "jaxgru": "safetensors"}
    source = ("torch", tmp_path / "torch.safetensors")
    for kind in formats:
        target = (kind, tmp_path / f"{kind}_2.{ends.get(kind, 'npz')}")
        code, printed = run(capsys, *source, *target)
        assert code == 0, printed
        assert "0.0e+00  read again, float64" in printed
        assert printed.count("note  ") == (source[0] == "keras")  # the note that tanh is assumed
        source = target
    with np.load(source[1]) as file:
        same(interop.from_torch(dict(file)).params, layers)


@pytest.mark.parametrize("kind", ["linen", "equinox"])
def test_merged_biases_are_noted_and_the_function_is_the_same(tmp_path, capsys, kind):
    torch_file(tmp_path / "t.safetensors", num_layers=2)
    target = tmp_path / "m.safetensors"
    code, printed = run(capsys, "torch", tmp_path / "t.safetensors", kind, target)
    assert code == 0, printed
    assert "note     b_x and b_h are summed: r and z have one bias" in printed
    # Biases that are merged in float32 are rounded.
    assert 0 < float(printed.split("  read again")[0].split()[-1]) < 1e-6


def test_negated_update_is_noted(tmp_path, capsys):
    params = init_stack(jax.random.key(0), 2, 3, spec=CHUNG_2014)
    interop.save_weights(tmp_path / "j", params)
    code, printed = run(capsys, "jaxgru", tmp_path / "j", "onnx", tmp_path / "o")
    assert code == 0, printed
    assert "note     the update gate's weights and biases are negated" in printed
    code, printed = run(capsys, "onnx", tmp_path / "o", "haiku", tmp_path / "h.npz")
    assert code == 0, printed
    assert "I=2 H=3 float32; reset before, update keep, tanh\n" in printed


def test_each_layer_keeps_its_own_equation(tmp_path, capsys):
    specs = CHUNG_2014, PYTORCH
    layers = tuple(init_gru(jax.random.key(0), n, 3, spec=v) for n, v in zip((2, 3), specs))
    interop.save_weights(tmp_path / "j", layers)
    argv = ("jaxgru", tmp_path / "j")
    for kind, target in (("onnx", tmp_path / "o"), ("keras", tmp_path / "k.npz")):
        code, printed = run(capsys, *argv, kind, target)
        assert code == 0, printed
        assert "reset before, update write, tanh / reset after, update keep, tanh\n" in printed
    code, printed = run(capsys, "keras", tmp_path / "k.npz", "jaxgru", tmp_path / "k")
    assert code == 0, printed
    for params in (
        interop.load_weights(tmp_path / "k").params,
        [node.params for node in interop.read_onnx(tmp_path / "o")],
    ):
        assert [cell.spec for cell in params] == [GRUSpec("before"), PYTORCH]


def test_layers_of_a_larger_model_are_chosen(tmp_path, capsys):
    layers = torch_file(tmp_path / "t.safetensors", prefix="rnn.", num_layers=2)
    argv = ("torch", tmp_path / "t.safetensors", "jaxgru", tmp_path / "j")
    code, printed = run(capsys, *argv)
    assert (code, "prefix must be one of 'rnn.', where" in printed) == (2, True)
    code, printed = run(capsys, *argv, "--layer", "rnn.")
    assert code == 0, printed
    same(interop.load_weights(tmp_path / "j").params, layers)


def test_model_goes_to_onnx_whole_and_elsewhere_without_its_head(tmp_path, capsys):
    model = init_token_model(jax.random.key(0), 5, 3, embedding_size=2, spec=PYTORCH)
    interop.save_weights(tmp_path / "j", model)
    argv = ("jaxgru", tmp_path / "j")
    code, printed = run(capsys, *argv, "onnx", tmp_path / "m.onnx")
    assert code == 0, printed
    assert "not written" not in printed
    code, printed = run(capsys, *argv, "torch", tmp_path / "t.npz")
    assert code == 0, printed
    assert "head and embedding are not written" in printed


@pytest.mark.parametrize("bias", [False, True])
def test_weights_file_of_keras_is_read(tmp_path, capsys, bias):
    h5py = pytest.importorskip("h5py", reason="h5py comes with keras")
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=v) for v in ((2, 9), (3, 9), (9,))][: 2 + bias]
    upper = [rng.normal(size=v) for v in ((3, 9), (3, 9), (9,))][: 2 + bias]
    with h5py.File(tmp_path / "k.weights.h5", "w") as file:
        for name, own in (("gru", arrays), ("gru_1", upper)):
            for number, array in enumerate(own):
                file[f"layers/{name}/cell/vars/{number}"] = array
        file["layers/dense/vars/0"] = np.ones((3, 2))
    argv = ("keras", tmp_path / "k.weights.h5", "jaxgru", tmp_path / "j")
    code, printed = run(capsys, *argv)
    assert code == 2
    assert "--layer layers/gru/ --layer layers/gru_1/" in printed
    layers = ("--layer", "layers/gru/", "--layer", "layers/gru_1/")
    code, printed = run(capsys, *argv, *layers, *(() if bias else ("--reset", "before")))
    assert code == 0, printed
    params = interop.load_weights(tmp_path / "j").params
    same(params, interop.from_keras([arrays, upper], reset_after=False).params)


def test_arrays_of_a_file_are_in_the_order_of_their_library(tmp_path, capsys):
    """Arrays that are read in the order of the file are Keras's get_weights and set_weights."""
    layers = torch_file(tmp_path / "t.safetensors", num_layers=2, bidirectional=True)
    for kind in ("keras", "torch"):
        target = (kind, tmp_path / f"{kind}.npz")
        code, printed = run(capsys, "torch", tmp_path / "t.safetensors", *target)
        assert code == 0, printed
    keras, torch = (np.load(tmp_path / f"{kind}.npz") for kind in ("keras", "torch"))
    with keras, torch:
        assert keras.files == [
            f"{layer}/{direction}/{name}"
            for layer in range(2)
            for direction in ("forward", "backward")
            for name in ("kernel", "recurrent_kernel", "bias")
        ]
        assert torch.files == [
            f"{name}_l{layer}{end}"
            for layer in range(2)
            for end in ("", "_reverse")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        arrays = [keras[name] for name in keras.files]
    same(interop.from_keras([arrays[:6], arrays[6:]]).params, layers)


def test_layers_of_numbered_names_come_in_their_order(tmp_path, capsys):
    """With more than ten layers, 10/ comes after 9/."""
    layers = init_stack(jax.random.key(0), 3, [3] * 11, spec=PYTORCH, scheme="pytorch")
    interop.save_weights(tmp_path / "j", layers)
    code, printed = run(capsys, "jaxgru", tmp_path / "j", "keras", tmp_path / "k.npz")
    assert code == 0, printed
    assert "0.0e+00  read again" in printed


def write_nodes(path, chained, **inputs_h):
    """Two GRU nodes of I = H = 3, the second on the outputs of the first or beside it."""
    helper, rng = onnx.helper, np.random.default_rng(0)
    arrays = {f"{k}{i}": rng.normal(size=(1, 9, 3)) for k in "WR" for i in range(2)}
    arrays |= inputs_h
    tensors = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()]
    h0 = ["", "h0"] if inputs_h else []
    nodes = [
        helper.make_node("GRU", ["X", "W0", "R0", "", *h0], ["Y0"], "lower", hidden_size=3),
        helper.make_node("Squeeze", ["Y0", "one"], ["Z0"]),
        helper.make_node(
            "GRU", ["Z0" if chained else "X", "W1", "R1"], ["Y"], "upper", hidden_size=3
        ),
    ]
    tensors.append(onnx.numpy_helper.from_array(np.array([1]), "one"))
    inputs = [helper.make_tensor_value_info("X", 1, None)]
    outputs = [helper.make_empty_tensor_value_info("Y")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_operatorsetid("", 17)])
    path.write_bytes(model.SerializeToString())
    return path


def test_nodes_of_onnx_are_a_stack_where_each_reads_the_one_below(tmp_path, capsys):
    target = ("jaxgru", tmp_path / "j")
    chain = write_nodes(tmp_path / "chain.onnx", True)
    assert [node.below for node in interop.read_onnx(chain)] == ["", "lower"]
    beside = write_nodes(tmp_path / "beside.onnx", False)
    code, printed = run(capsys, "onnx", beside, *target)
    message = "choose the nodes of a stack from --layer lower"
    assert (code, message in printed) == (2, True)
    code, printed = run(capsys, "onnx", beside, *target, "--layer", "upper")
    assert code == 0, printed
    same(interop.load_weights(tmp_path / "j").params, (interop.read_onnx(beside)[1].params,))
    code, printed = run(capsys, "onnx", beside, "jaxgru", tmp_path / "k", "--layer", "none")
    assert (code, "must hold one GRU node of each of ['none']" in printed) == (2, True)


def test_state_that_an_onnx_file_holds_is_not_dropped(tmp_path, capsys):
    path = write_nodes(tmp_path / "m.onnx", True, h0=np.ones((1, 4, 3)))
    code, printed = run(capsys, "onnx", path, "jaxgru", tmp_path / "j")
    assert (code, "has a constant sequence_lens or initial_h" in printed) == (2, True)


def test_rest_of_an_onnx_graph_is_noted(tmp_path, capsys):
    model = init_token_model(jax.random.key(0), 5, 3, embedding_size=2)
    interop.write_onnx(tmp_path / "m.onnx", model, lengths=True, state=True)
    argv = ("onnx", tmp_path / "m.onnx", "jaxgru", tmp_path / "j")
    code, printed = run(capsys, *argv)
    assert code == 0, printed
    assert "note     the rest of the ONNX graph is not converted: Add, Gather, MatMul\n" in printed
    assert "note     initial_h, an input of the ONNX graph" in printed


def test_names_of_flax_are_found_in_a_larger_model(tmp_path, capsys):
    cell = init_gru(jax.random.key(0), 2, 3, spec=PYTORCH)
    weights = interop.to_linen(cell).weights
    flat = {f"params/cell/{m}/{k}": v for m, own in weights.items() for k, v in own.items()}
    st.save_file(flat, tmp_path / "f.safetensors")
    argv = ("linen", tmp_path / "f.safetensors", "jaxgru", tmp_path / "j")
    code, printed = run(capsys, *argv)
    assert code == 0, printed
    assert "note     linen files do not hold the activation; tanh is assumed" in printed
    np.testing.assert_array_equal(interop.load_weights(tmp_path / "j").params[0].w_x, cell.w_x)


def test_layers_that_do_not_fit_leave_no_file(tmp_path, capsys):
    """The model sums its two directions, but --merge is concat by default."""
    layers = init_stack(jax.random.key(0), 2, 3, 2, bidirectional=True, merge="sum", spec=PYTORCH)
    interop.save_weights(tmp_path / "j", layers)
    argv = ("jaxgru", tmp_path / "j", "keras", tmp_path / "new.npz")
    code, printed = run(capsys, *argv)
    assert (code, "params[1].forward.w_x must have 6 rows" in printed) == (2, True)
    assert not (tmp_path / "new.npz").exists()
    code, printed = run(capsys, *argv, "--merge", "sum")
    assert code == 0, printed


def test_bfloat16_is_not_written_where_numpy_could_not_read_it(tmp_path, capsys):
    interop.save_weights(tmp_path / "j", init_stack(jax.random.key(0), 2, 3, dtype=jnp.bfloat16))
    argv = ("jaxgru", tmp_path / "j", "haiku", tmp_path / "new.npz")
    code, printed = run(capsys, *argv)
    assert (code, "cannot hold bfloat16; write a .safetensors file" in printed) == (2, True)
    assert not (tmp_path / "new.npz").exists()


def test_arrays_outside_of_a_keras_file_are_not_read(tmp_path, capsys):
    h5py = pytest.importorskip("h5py", reason="h5py comes with keras")
    (tmp_path / "secret").write_bytes(bytes(8 * 27))
    with h5py.File(tmp_path / "k.weights.h5", "w") as file:
        place = [(str(tmp_path / "secret"), 0, 8 * 18)]
        file.create_dataset("layers/gru/cell/vars/0", (2, 9), "f8", external=place)
        file["layers/gru/cell/vars/1"] = np.ones((3, 9))
    argv = ("keras", tmp_path / "k.weights.h5", "jaxgru", tmp_path / "j")
    code, printed = run(capsys, *argv, "--reset", "before")
    assert (code, "must be in the file itself, not in another" in printed) == (2, True)


def test_cells_of_a_keras_rnn_are_not_taken_for_a_gru(tmp_path, capsys):
    h5py = pytest.importorskip("h5py", reason="h5py comes with keras")
    with h5py.File(tmp_path / "k.weights.h5", "w") as file:
        for name in ("gru_cell", "gru_cell_1"):
            for number, shape in enumerate(((3, 9), (3, 9), (2, 9))):
                file[f"layers/rnn/cell/cells/{name}/vars/{number}"] = np.ones(shape)
    argv = ("keras", tmp_path / "k.weights.h5", "jaxgru", tmp_path / "j")
    code, printed = run(capsys, *argv)
    assert (code, "must hold a GRU layer that Keras saved, got none" in printed) == (2, True)


def test_options_of_other_formats_are_refused(tmp_path, capsys):
    argv = ["torch", "a", "onnx", "b"]
    for option, message in (
        (["--cell"], "--cell is only for the target torch"),
        (["--step"], "--step is only for the target stablehlo"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--reset", "after"], "--reset is only for a source of keras, got torch"),
        (["--activation", "tanh"], "--activation is only for a source of keras, linen, nnx, got"),
    ):
        with pytest.raises(SystemExit):
            main(argv + option)
        assert message in capsys.readouterr().err
    torch_file(tmp_path / "t.safetensors", num_layers=2)
    argv = ("torch", tmp_path / "t.safetensors", "torch", tmp_path / "n.npz")
    code, printed = run(capsys, *argv, "--cell")
    assert (code, "--cell is only for a single layer" in printed) == (2, True)
    code, printed = run(capsys, *argv, "--layer", "a", "--layer", "b")
    assert (code, "--layer must be given once for torch" in printed) == (2, True)


def bad(path, data):
    path.write_bytes(data)
    return path


REFUSED = {
    "pickle": (
        lambda path: ("torch", bad(path / "m.pt", pickle.dumps({"w": 1}))),
        "which can run code; save the weights again with safetensors.torch.save_file",
    ),
    "no_file": (lambda path: ("onnx", path / "none.onnx"), "No such file or directory"),
    "truncated_npz": (lambda path: ("keras", bad(path / "m.npz", b"PK\x03\x04")), "intact .npz"),
    "pickled_npz": (
        lambda path: (np.savez(path / "m.npz", w=np.array([{}])), ("haiku", path / "m.npz"))[1],
        "Object arrays cannot be loaded when allow_pickle=False",
    ),
    "no_model": (lambda path: ("onnx", bad(path / "m", b"no model")), "an intact ONNX model"),
    "other_names": (
        lambda path: (np.savez(path / "m.npz", w=np.ones(3)), ("haiku", path / "m.npz"))[1],
        "must hold w_h, w_i, b, got missing keys:",
    ),
    "integers": (
        lambda path: (
            np.savez(path / "m.npz", weight_ih=np.ones((9, 2), int), weight_hh=np.ones((9, 3))),
            ("torch", path / "m.npz"),
        )[1],
        "got dtype int64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_file_is_refused_in_one_line(tmp_path, capsys, case):
    make, message = REFUSED[case]
    source = make(tmp_path)
    code, printed = run(capsys, *source, "jaxgru", tmp_path / "new")
    assert code == 2
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_target_that_cannot_hold_the_cell_says_why_and_writes_nothing(tmp_path, capsys):
    torch_file(tmp_path / "t.safetensors")
    argv = ("torch", tmp_path / "t.safetensors")
    code, printed = run(capsys, *argv, "haiku", tmp_path / "new.npz")
    assert (code, "which is all that haiku.GRU computes" in printed) == (2, True)
    code, printed = run(capsys, *argv, "nnx", tmp_path / "new.npz")
    assert (code, "flax.nnx.GRUCell has no bias that the reset gate" in printed) == (2, True)
    code, printed = run(capsys, *argv, "keras", tmp_path / "new.h5")
    assert (code, "must end in .safetensors or .npz" in printed) == (2, True)
    assert not list(tmp_path.glob("new*"))


def test_no_file_is_overwritten(tmp_path, capsys):
    torch_file(tmp_path / "t.safetensors")
    (tmp_path / "old").write_text(json.dumps("mine"))
    argv = ("torch", tmp_path / "t.safetensors", "onnx", tmp_path / "old")
    assert run(capsys, *argv)[0] == 2
    assert json.loads((tmp_path / "old").read_text()) == "mine"


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_disk_without_hard_links_gets_a_file_and_keeps_one(tmp_path, capsys, monkeypatch, number):
    """As exFAT and some network mounts; another program creates a file of that name meanwhile."""
    torch_file(tmp_path / "t.safetensors")

    def link(source, target):
        (tmp_path / "old").write_text("theirs")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    argv = ("torch", tmp_path / "t.safetensors", "jaxgru")
    code, printed = run(capsys, *argv, tmp_path / "new")
    assert (code, len(interop.load_weights(tmp_path / "new").params)) == (0, 1), printed
    (tmp_path / "old").unlink()
    code, printed = run(capsys, *argv, tmp_path / "old")
    assert (code, "File exists" in printed, (tmp_path / "old").read_text()) == (2, True, "theirs")


def test_weights_that_are_not_finite_are_noted(tmp_path, capsys):
    weights = {"weight_ih": np.ones((9, 2)), "weight_hh": np.ones((9, 3))}
    weights["weight_hh"][0, 0] = np.nan
    np.savez(tmp_path / "t.npz", **weights)
    argv = ("torch", tmp_path / "t.npz", "jaxgru", tmp_path / "j")
    code, printed = run(capsys, *argv)
    assert "weight_hh'] holds 1 values that are not finite" in printed
    assert code == 0  # the values are the same, with NaN equal to NaN


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-3), ("bfloat16", 0.0625)])
def test_difference_beyond_rounding_is_exit_code_1(tmp_path, capsys, monkeypatch, dtype, error):
    params = init_gru(jax.random.key(0), 2, 3, spec=PYTORCH, dtype=dtype)
    st.save_file(interop.to_torch(params).weights, tmp_path / "t.safetensors")
    true = interop.load_weights

    def worse(path):
        loaded = true(path)
        params = jax.tree.map(lambda v: v + v.dtype.type(error), loaded.params)
        return loaded._replace(params=params)

    monkeypatch.setattr(interop, "load_weights", worse)
    argv = ("torch", tmp_path / "t.safetensors", "jaxgru", tmp_path / "j")
    code, printed = run(capsys, *argv)
    assert (code, "not written" in printed) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize(
    "kind",
    [
        "stack",
        pytest.param("tokens", marks=pytest.mark.slow),
        pytest.param("float64", marks=pytest.mark.slow),
    ],
)
def test_program_with_its_weights_runs_without_the_package(tmp_path, capsys, kind):
    """The program runs for any length and batch, as a sequence and step by step."""
    if kind == "tokens":
        model = init_token_model(
            jax.random.key(0), 5, 3, embedding_size=2, num_layers=2, spec=PYTORCH
        )
    else:
        model = init_stack(jax.random.key(0), 2, 3, num_layers=2, spec=PYTORCH)
        if kind == "float64":
            model = jax.tree.map(np.float64, model)
    interop.save_weights(tmp_path / "j", model)
    for options in ((), ("--step",)):
        target = tmp_path / f"m{len(options)}"
        argv = ("jaxgru", tmp_path / "j", "stablehlo", target)
        with jax.disable_jit(False):  # the program is what jit makes of the model
            code, printed = run(capsys, *argv, *options)
        assert code == 0, printed
        assert "in the program on cpu" in printed
    if kind == "stack":
        xs = np.random.default_rng(1).normal(size=(7, 2, 2)).astype(np.float32)
        h, ys = export.deserialize((tmp_path / "m0").read_bytes()).call(xs, np.ones((7, 2), bool))
        wanted = jaxgru.gru_stack(model, jnp.asarray(xs))
        np.testing.assert_allclose(ys, wanted[1], atol=1e-6)
        step = export.deserialize((tmp_path / "m1").read_bytes())
        h, y = step.call(xs[0], jaxgru.init_state(model, (2,)))
        np.testing.assert_allclose(y, wanted[1][0], atol=1e-6)
        assert [v.shape for v in h] == [(2, 3), (2, 3)]


def test_program_of_a_step_in_two_directions_is_refused(tmp_path, capsys):
    torch_file(tmp_path / "t.safetensors", bidirectional=True)
    argv = ("torch", tmp_path / "t.safetensors", "stablehlo", tmp_path / "m")
    code, printed = run(capsys, *argv, "--step")
    assert (code, "--step is not for two directions" in printed) == (2, True)
    assert not (tmp_path / "m").exists()


def test_unknown_format_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["caffe", "a", "onnx", "b"])
    assert caught.value.code == 2
    assert "a format must be one of torch, keras" in capsys.readouterr().err


def test_half_types_keep_their_bits(tmp_path, capsys):
    layers = init_stack(jax.random.key(0), 2, 3, spec=PYTORCH, dtype=jnp.bfloat16)
    interop.save_weights(tmp_path / "j", layers)
    argv = ("jaxgru", tmp_path / "j", "torch", tmp_path / "t.safetensors")
    code, printed = run(capsys, *argv)
    assert code == 0, printed
    arrays = interop.read_safetensors(tmp_path / "t.safetensors")
    same(interop.from_torch(arrays).params, jax.tree.map(np.asarray, layers))


@pytest.mark.parametrize("kind", sorted({*NAMES} - {"onnx"}))
def test_source_is_compared_with_its_own_library(tmp_path, capsys, monkeypatch, kind):
    """A wrong reading of the file is found, although the new file agrees with that reading."""
    pytest.importorskip({"linen": "flax", "nnx": "flax"}.get(kind, kind), reason="in extra `peers`")
    cell = init_gru(jax.random.key(0), 2, 3, spec=CHUNG_2014 if kind == "haiku" else PYTORCH)
    weights = getattr(interop, f"to_{kind}")(cell).weights
    if kind == "keras":
        weights = dict(zip(("kernel", "recurrent_kernel", "bias"), weights))
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    st.save_file({"/".join(k.key for k in p): v for p, v in leaves}, tmp_path / "m.safetensors")
    argv = (kind, tmp_path / "m.safetensors", "jaxgru")
    code, printed = run(capsys, *argv, tmp_path / "right")
    assert code == 0, printed
    assert f"the source in {NAMES[kind]}, float64" in printed
    true = getattr(interop, f"from_{kind}")

    def wrong(*arguments, **options):
        params, notes = true(*arguments, **options)
        swapped = jax.tree.map(lambda v: np.roll(v, 3, axis=-1), params)  # the blocks of the gates
        return interop.Imported(swapped, notes)

    monkeypatch.setattr(interop, f"from_{kind}", wrong)
    code, printed = run(capsys, *argv, tmp_path / "wrong")
    assert (code, "0.0e+00  read again, float64" in printed) == (1, True)
    assert not (tmp_path / "wrong").exists()


def test_nodes_that_are_no_stack_in_their_file_are_found_by_onnxruntime(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra `peers`")
    argv = ("jaxgru", tmp_path / "j", "--layer", "lower", "--layer", "upper")
    beside = write_nodes(tmp_path / "beside.onnx", False)
    code, printed = run(capsys, "onnx", beside, *argv)
    assert (code, "0.0e+00  read again, float64" in printed) == (1, True)
    assert not (tmp_path / "j").exists()
    chain = write_nodes(tmp_path / "chain.onnx", True)
    code, printed = run(capsys, "onnx", chain, *argv)
    assert code == 0, printed
    assert "  the source in onnxruntime, float32" in printed


def test_library_that_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    torch_file(tmp_path / "t.safetensors")
    for name in ("torch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    argv = ("torch", tmp_path / "t.safetensors", "onnx", tmp_path / "m.onnx")
    code, printed = run(capsys, *argv)
    assert code == 0, printed
    assert "  not run   the source in torch.nn.GRU, float64: torch is not installed\n" in printed
    assert "  not run   in onnxruntime, float32: onnxruntime is not installed\n" in printed


def test_node_that_onnxruntime_cannot_run_is_named(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra `peers`")
    interop.save_weights(tmp_path / "j", init_stack(jax.random.key(0), 2, 3, dtype=jnp.float16))
    code, printed = run(capsys, "jaxgru", tmp_path / "j", "onnx", tmp_path / "o")
    assert code == 0, printed
    assert "  not run   in onnxruntime, float32: its GRU has no float16\n" in printed


def test_run_of_char_lm_goes_to_several_targets_in_one_command(tmp_path):
    """In a folder with an experiments package of its own, and without the extra `experiments`."""
    args = char_lm.parse_args(["--smoke"])
    (tmp_path / "run").mkdir()
    params = char_lm.init_params(args, jax.random.key(0), 5)
    char_lm.save_weights(tmp_path / "run", args, params, "abcde")
    (tmp_path / "experiments").mkdir()
    for name in ("experiments/__init__.py", "tqdm.py", "matplotlib.py"):
        (tmp_path / name).write_text("raise ImportError('not of this folder')")
    files = ["jaxgru", "run", "onnx", "m.onnx", "jaxgru", "m.safetensors"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxgru.interop", *files], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 2 and done.stdout.count("read    ") == 1
    (node,) = interop.read_onnx(tmp_path / "m.onnx")
    same(node.params, params.layers[0])
    outputs = onnx.load(tmp_path / "m.onnx").graph.output
    assert [v.name for v in outputs] == ["outputs", "h_last_0"]
    saved = interop.load_weights(tmp_path / "m.safetensors")
    same(saved.params, params)
    assert saved.metadata == interop.load_weights(tmp_path / "run/weights.safetensors").metadata
    assert saved.metadata["config"]["hidden_size"] == 16


def test_target_that_is_named_twice_is_refused(tmp_path, capsys):
    torch_file(tmp_path / "t.safetensors")
    target = ("jaxgru", tmp_path / "j")
    code, printed = run(capsys, "torch", tmp_path / "t.safetensors", *target, *target)
    assert (code, "j exists or is named twice; nothing was overwritten" in printed) == (2, True)
    code, printed = run(capsys, "torch", tmp_path / "t.safetensors", "jaxgru", tmp_path / "no/j")
    assert (code, "no is not a folder" in printed) == (2, True)


def test_extra_is_needed_only_by_its_format_and_named(tmp_path, capsys, monkeypatch):
    weights = interop.to_torch(init_gru(jax.random.key(0), 2, 3, spec=PYTORCH)).weights
    np.savez(tmp_path / "t.npz", **weights)
    for name in ("onnx", "safetensors", "flatbuffers"):
        monkeypatch.setitem(sys.modules, name, None)
    source = ("torch", tmp_path / "t.npz")
    code, printed = run(capsys, *source, "keras", tmp_path / "k.npz")
    assert code == 0, printed
    for kind, end, extra in (
        ("onnx", "onnx", "onnx"),
        ("keras", "safetensors", "safetensors"),
        ("stablehlo", "bin", "export"),
    ):
        code, printed = run(capsys, *source, kind, tmp_path / f"new.{end}")
        assert code == 2
        assert printed.splitlines()[-1].endswith(f"; install jaxgru[{extra}].")
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("files", [["torch", "a"], ["torch", "a", "onnx"]])
def test_files_that_are_no_pairs_are_refused(files, capsys):
    with pytest.raises(SystemExit):
        main(files)
    assert "FROM FILE TO FILE must be two or more pairs" in capsys.readouterr().err


def test_equal_nan_does_not_hide_a_difference():
    nan = np.nan
    assert largest_difference([nan, 1.0], [nan, 2.0]) == 0.5
    assert np.isnan(largest_difference([nan, 1.0], [1.0, 1.0]))
    assert largest_difference([[1.0, 1.0]], [1.0, 1.0]) == np.inf
