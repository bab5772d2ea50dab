"""Weights in safetensors files: exact round trips, and refused files and calls."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_problem, with_spec

from jaxgru import CHO_2014, PYTORCH, Bidirectional, GRUParams, GRUSpec
from jaxgru.interop import load_weights, read_safetensors, save_weights
from jaxgru.interop import safetensors as weight_files
from jaxgru.models import SequenceParams, TokenParams

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is an extra")


def cell(seed=0, dtype=np.float32, **options):
    return jax.tree.map(np.asarray, make_problem(seed, dtype=dtype, **options).params)


def head(*shape):
    return np.random.default_rng(9).normal(size=shape).astype(np.float32)


KINDS = {
    "cell": cell(),
    "layer_norm": cell(layer_norm=True),
    "both_ways": Bidirectional(cell(), cell(1)),
    "equations": (
        with_spec(Bidirectional(cell(), cell(1)), PYTORCH),
        with_spec(cell(inputs=6, hidden=4), GRUSpec("before", "write", "identity")),
    ),
    "summed": (Bidirectional(cell(), cell(1)), cell(2, inputs=3)),
    "summed_model": SequenceParams((Bidirectional(cell(), cell(1)),), head(3, 1), head(1)),
    "sizes": Bidirectional(cell(), cell(1, hidden=4)),
    "stack": (Bidirectional(cell(bias="none"), cell(1)), cell(inputs=6, hidden=4, bias="b_h")),
    "model": SequenceParams((cell(),), head(3, 1), head(1)),
    "tokens": TokenParams(head(5, 2), (cell(), cell(1, inputs=3)), head(3, 5), head(5)),
    "one_hot": TokenParams(None, (cell(inputs=5),), head(3, 5), head(5)),
    "bfloat16": cell(dtype=jnp.bfloat16),
    "float16": cell(dtype=np.float16),
    "float64": cell(dtype=np.float64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_load_returns_the_saved_bits(tmp_path, kind):
    """The spec of every GRU, which is part of the structure, is loaded too."""
    params = KINDS[kind]
    if kind != "equations":
        params = with_spec(params, GRUSpec("after", "write", "relu"))
    save_weights(tmp_path / "w", params, metadata={"epoch": 3})
    loaded = load_weights(tmp_path / "w")
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    assert loaded.metadata == {"epoch": 3}
    for got, wanted in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params)):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, np.asarray(wanted))


def test_other_programs_read_the_arrays_by_name(tmp_path):
    params = KINDS["tokens"]
    save_weights(tmp_path / "w", params)
    assert load_weights(tmp_path / "w").metadata == {}
    arrays = safetensors.load_file(tmp_path / "w")
    np.testing.assert_array_equal(arrays["layers.1.w_h"], params.layers[1].w_h)
    np.testing.assert_array_equal(arrays["embedding"], params.embedding)


def saved(tmp_path):
    path = tmp_path / "w"
    save_weights(path, with_spec(cell(), PYTORCH))
    return path


def structure_of(spec, **changes):
    """The JSON of the structure that `saved` writes, with another spec or fields."""
    names = ("w_x", "w_h", "b_x", "b_h", "g_x", "g_h")
    fields = {k: k if k[0] != "g" else None for k in names} | changes
    return json.dumps({"kind": "GRUParams", "fields": fields, "spec": spec})


def test_every_flipped_bit_is_an_error(tmp_path):
    path = saved(tmp_path)
    intact = path.read_bytes()
    for position in range(len(intact)):
        data = bytearray(intact)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises((ValueError, TypeError)):
            load_weights(path)


def test_every_truncation_is_an_error(tmp_path):
    path = saved(tmp_path)
    intact = path.read_bytes()
    for size in range(0, len(intact), 7):
        path.write_bytes(intact[:size])
        with pytest.raises(
            ValueError, match=r"^load_weights: .* must be an intact safetensors file"
        ):
            load_weights(path)


def header_of(path, **changes):
    """Rewrites the metadata of a file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_spec_of_every_gru_is_in_the_structure(tmp_path):
    path = saved(tmp_path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    described = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    assert described["format"] == "jaxgru weights 2"
    assert set(described) == {"format", "structure", "metadata", "sha256"}
    wanted = structure_of({"reset": "after", "update": "keep", "activation": "tanh"})
    assert json.loads(described["structure"]) == json.loads(wanted)


OTHER = {"reset": "before", "update": "keep", "activation": "tanh"}


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("structure", structure_of(OTHER)),
        ("structure", '{"x": 1}'),
        ("metadata", '{"x": 1}'),
    ],
    ids=["spec", "structure", "metadata"],
)
def test_description_is_part_of_the_sha256(tmp_path, field, text):
    path = saved(tmp_path)
    header_of(path, **{field: text})
    with pytest.raises(ValueError) as caught:
        load_weights(path)
    assert str(caught.value) == (
        f"load_weights: {path} must have the sha256 that it was saved with, got another: the file "
        "is damaged."
    )


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("structure", '{"kind": "Foo", "fields": {}}', "KeyError"),
        ("structure", '{"kind": "GRUParams", "fields": {"w_x": "x"}}', "KeyError"),
        ("structure", structure_of(OTHER, w="w_x"), "TypeError"),
        ("structure", "[1]", "TypeError"),
        ("structure", "null", "load_weights: params must be a GRUParams"),
        ("structure", "[" * 100_000 + "]" * 100_000, "RecursionError"),
        ("structure", structure_of([1]), "TypeError"),
        ("structure", structure_of(OTHER | {"x": 1}), "TypeError"),
        ("structure", structure_of({"update": "keep", "activation": "tanh"}), "KeyError('reset')"),
        ("structure", structure_of(OTHER | {"reset": "never"}), "GRUSpec: reset must be one of"),
        ("structure", structure_of(OTHER).replace("spec", "equation"), "KeyError('spec')"),
        ("metadata", "[1]", "load_weights: metadata must be a dict, got [1]."),
    ],
)
def test_description_that_describes_no_parameters_is_refused(
    tmp_path, monkeypatch, field, text, message
):
    """A file with a correct sha256 may still have a wrong description, which is checked too."""
    monkeypatch.setattr(weight_files, "_digest", lambda description, arrays: "same")
    path = saved(tmp_path)
    header_of(path, **{field: text})
    with pytest.raises(ValueError) as caught:
        load_weights(path)
    assert str(caught.value).startswith(
        f"load_weights: {path} must describe parameters of this package, got "
    )
    assert message in str(caught.value)


def test_array_that_no_parameter_uses_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "_digest", lambda description, arrays: "same")
    path = saved(tmp_path)
    header_of(path, structure=structure_of(OTHER, b_x=None))
    with pytest.raises(ValueError, match="its structure does not use all of its arrays"):
        load_weights(path)


def test_header_whose_length_looks_like_the_start_of_a_pickle_is_read(tmp_path):
    """Lengths of 0x280 and 0x480 start with the bytes of the pickle protocols 2 and 4."""
    seen = set()
    for length in range(700):
        safetensors.save_file({"w": np.ones(2)}, tmp_path / "w", {"x": "y" * length})
        start = (tmp_path / "w").read_bytes()[:2]
        if start[0] == 0x80:
            seen.add(start)
            np.testing.assert_array_equal(read_safetensors(tmp_path / "w")["w"], np.ones(2))
    assert b"\x80\x02" in seen


INTACT = "{path} must be an intact safetensors file"
PICKLE = (
    "{path} must be a safetensors file, got a pickle or a zip of one, which can run code; save the "
    "weights again with safetensors.torch.save_file(module.state_dict(), 'weights.safetensors')."
)
ODD_DTYPE = json.dumps({"w": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}).encode()
BAD_FILES = {
    "pickle": (pickle.dumps({"w": 1}), PICKLE),
    "zip": (b"PK\x03\x04archive", PICKLE),
    "short": (
        b"ab",
        f"{INTACT} with a header of at most 8388608 bytes, got a file of 2 bytes with a header of "
        "25185.",
    ),
    "huge_header": (
        (2**40).to_bytes(8, "little") + b"{}" * 100,
        f"{INTACT} with a header of at most 8388608 bytes, got a file of 208 bytes with a header "
        "of 1099511627776.",
    ),
    "no_header": (
        (1).to_bytes(8, "little") + b"{",
        f"{INTACT}, got: Error while deserializing: ",
    ),
    "dtype": (
        len(ODD_DTYPE).to_bytes(8, "little") + ODD_DTYPE + b"0",
        "{path} must hold arrays of F64, F32, BF16, F16, I8, I16, I32, I64, U8, U16, U32, U64, "
        "BOOL, got 'F8_E5M2'.",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_with_its_reason(tmp_path, case):
    data, expected = BAD_FILES[case]
    (tmp_path / "w").write_bytes(data)
    for read in (load_weights, read_safetensors):
        message = f"{read.__name__}: {expected.replace('{path}', str(tmp_path / 'w'))}"
        with pytest.raises(ValueError) as caught:
            read(tmp_path / "w")
        found = str(caught.value)
        assert found.startswith(message) if message.endswith(": ") else found == message


def test_largest_header_is_read(tmp_path, monkeypatch):
    path = saved(tmp_path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(weight_files, "_MOST_HEADER", size)
    load_weights(path)
    monkeypatch.setattr(weight_files, "_MOST_HEADER", size - 1)
    with pytest.raises(ValueError, match=f"a header of at most {size - 1} bytes, got"):
        load_weights(path)


@pytest.mark.parametrize("dtype", [*"?bhilBHIL", "e", "f", "d", jnp.bfloat16])
def test_arrays_of_every_dtype_of_numpy_are_read(tmp_path, dtype):
    arrays = {"w": np.arange(6).reshape(2, 3).astype(dtype)}
    safetensors.save_file(arrays, tmp_path / "w")
    (found,) = read_safetensors(tmp_path / "w").values()
    assert found.dtype == arrays["w"].dtype and found.flags.writeable
    np.testing.assert_array_equal(found, arrays["w"])


def test_error_for_a_file_of_another_program_names_the_converters(tmp_path):
    safetensors.save_file({"weight_ih_l0": np.ones((9, 2))}, tmp_path / "w")
    with pytest.raises(ValueError) as caught:
        load_weights(tmp_path / "w")
    assert str(caught.value) == (
        f"load_weights: {tmp_path / 'w'} must be a file of 'jaxgru weights 2', got format None; "
        "convert arrays of other libraries with read_safetensors and jaxgru.interop.from_torch (or "
        "another from_*)."
    )


def test_file_of_the_previous_format_is_refused_with_a_cure_that_works(tmp_path):
    path = saved(tmp_path)
    header_of(path, format="jaxgru weights 1", spec=json.dumps(OTHER))
    with pytest.raises(ValueError) as caught:
        load_weights(path)
    assert str(caught.value) == (
        f"load_weights: {path} must be a file of 'jaxgru weights 2', got format 'jaxgru weights "
        "1'; an older version of jaxgru wrote it, and its GRUParams have no spec: read the arrays "
        "with read_safetensors, make each GRUParams with the spec that it was trained with, and "
        "save them with save_weights."
    )
    params = GRUParams(**read_safetensors(path), spec=PYTORCH)
    save_weights(tmp_path / "new", params)
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "new").params, params)


KIND = "must be a GRUParams, Bidirectional, stack, SequenceParams or TokenParams, got"
# The second layer reads the sums of the first one's directions.
SUMS = tuple(Bidirectional(*(cell(n, inputs=size) for n in range(2))) for size in (2, 3))
BAD_CALLS = {
    "dict": (({"w": np.ones(3)},), {}, TypeError, f"params {KIND} dict."),
    "none": ((None,), {}, TypeError, f"params {KIND} NoneType."),
    "array": ((np.ones(3),), {}, TypeError, f"params {KIND} ndarray."),
    "no_layers": (((),), {}, TypeError, f"params {KIND} tuple."),
    "layer_of_none": (((cell(), None),), {}, TypeError, f"1 {KIND} NoneType."),
    "layer_of_a_model": (
        (SequenceParams(None, head(3, 1), head(1)),), {}, TypeError, f"layers {KIND} NoneType."
    ),
    "set": (
        ((GRUParams(np.ones((2, 9)), {1}, spec=CHO_2014),),), {}, TypeError,
        "0.w_h must be an array, got set; convert it with jnp.asarray.",
    ),
    "dtypes": (
        (dataclasses.replace(cell(), b_x=np.ones(9, np.float16)),), {}, TypeError,
        "params.b_x must have the dtype of the parameters, float32, got float16; cast one of them.",
    ),
    "shapes": (
        (dataclasses.replace(cell(), w_h=np.ones((7, 1), np.float32)),), {}, ValueError,
        "params.w_x must have shape (2, 21) (H=7, the rows of params.w_h), got (2, 9).",
    ),
    "integers_of_a_head": (
        (SequenceParams((cell(),), np.ones((3, 1), int), head(1)),), {}, TypeError,
        "w must be an array of float64, float32, bfloat16, float16, got dtype int64.",
    ),
    "head_without_an_array": (
        (SequenceParams((cell(),), None, head(1)),), {}, TypeError,
        "w must be an array of float64, float32, bfloat16, float16, got dtype object.",
    ),
    "rows_of_a_head": (
        (SequenceParams((cell(),), head(9, 1), head(1)),), {}, ValueError,
        "params.w must have 3 rows (the outputs of the top layer, merge='concat'), got 9; pass the "
        "merge that it was made with.",
    ),
    "axes_of_a_head": (
        (SequenceParams((cell(),), head(3, 1, 1), head(1)),), {}, ValueError,
        "params.w must have 3 rows (the outputs of the top layer, merge='concat'), got shape "
        "(3, 1, 1); pass the merge that it was made with.",
    ),
    "bias_of_a_head": (
        (SequenceParams((cell(),), head(3, 1), head(7)),), {}, ValueError,
        "params.b must have shape (1,) (the columns of params.w), got (7,).",
    ),
    "rows_of_an_embedding": (
        (TokenParams(head(4, 2), (cell(),), head(3, 5), head(5)),), {}, ValueError,
        "params.embedding must have shape (5, 2) (the columns of params.w, then the rows of the "
        "first layer's w_x), got (4, 2).",
    ),
    "stack_of_stacks": (
        (((cell(),), (cell(1, inputs=3),)),), {}, TypeError,
        "params[0] must be a GRUParams or a Bidirectional, got tuple.",
    ),
    "layers_that_do_not_fit": (
        ((cell(), cell()),), {}, ValueError,
        "params[1].w_x must have 3 rows (the outputs of params[0], merge='concat'), got 2.",
    ),
    "layer_above_sums_that_does_not_fit": (
        ((*SUMS, cell(inputs=7)),), {}, ValueError,
        "params[2].w_x must have 3 rows (the outputs of params[1], merge='sum'), got 7.",
    ),
    "rows_of_a_head_above_sums": (
        (SequenceParams(SUMS, head(5, 4), head(4)),), {}, ValueError,
        "params.w must have 3 rows (the outputs of the top layer, merge='sum'), got 5; pass the "
        "merge that it was made with.",
    ),
    "bias_of_a_head_above_sums": (
        (SequenceParams(SUMS, head(3, 4), head(5)),), {}, ValueError,
        "params.b must have shape (4,) (the columns of params.w), got (5,).",
    ),
    "model_without_a_stack": (
        (SequenceParams(cell(), head(3, 1), head(1)),), {}, TypeError,
        "params.layers must be a sequence of layers, GRUParams or Bidirectional, got GRUParams; "
        "put it into a tuple.",
    ),
    "metadata": (
        (cell(),), {"metadata": [1]}, TypeError, "metadata must be a dict or None, got [1].",
    ),
    "spec": (
        (with_spec(cell(), "cho"),), {}, TypeError,
        "params.spec must be a GRUSpec, such as jaxgru.PYTORCH, got 'cho'.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_is_refused_and_leaves_no_file(tmp_path, case):
    arguments, options, kind, message = BAD_CALLS[case]
    with pytest.raises(kind) as caught:
        save_weights(tmp_path / "w", *arguments, **options)
    assert str(caught.value) == f"save_weights: {message}"
    assert list(tmp_path.iterdir()) == []


def test_metadata_that_json_cannot_hold_is_refused_and_leaves_no_file(tmp_path):
    start = "must be the same after it is saved as JSON, got"
    cure = "use finite numbers, lists instead of tuples, and strings as keys."
    for metadata, kind, message in (
        ({"x": (1, 2)}, ValueError, f"['x'] {start} (1, 2); {cure}"),
        ({1: 2}, ValueError, f" {start} {{1: 2}}; {cure}"),
        ({"x": [float("nan")]}, ValueError, f"['x'] {start} [nan]; {cure}"),
        (
            {"a": {"x": np.float32(0.5)}},
            TypeError,
            "['a']['x'] must be a JSON value, got np.float32(0.5); convert it to a Python number, "
            "string, list or dict (Object of type float32 is not JSON serializable).",
        ),
    ):
        with pytest.raises(kind) as caught:
            save_weights(tmp_path / "w", cell(), metadata=metadata)
        assert str(caught.value) == f"save_weights: metadata{message}"
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "w")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_raise_a_warning(tmp_path):
    message = r"^save_weights: b_x holds 9 values that are not finite\.$"
    with pytest.warns(UserWarning, match=message):
        save_weights(
            tmp_path / "w", dataclasses.replace(cell(), b_x=np.full(9, np.nan, np.float32))
        )
