"""Weights in safetensors: the same bytes back, and nothing but them."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgru import (
    CHO_2014,
    PYTORCH,
    GRUParams,
    GRUSpec,
    init_gru,
    init_sequence_model,
    init_stack,
    init_token_model,
    load_weights,
    read_safetensors,
    save_weights,
    weight_files,
)

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is an extra")
KEY = jax.random.key(0)
KINDS = {
    "cell": lambda: init_gru(KEY, 2, 3, scheme="pytorch"),
    "gains": lambda: init_gru(KEY, 2, 3, layer_norm=True),
    "both_ways": lambda: init_stack(KEY, 2, 3, bidirectional=True)[0],
    "stack": lambda: init_stack(KEY, 2, (3, 4), bias=False, bidirectional=True),
    "model": lambda: init_sequence_model(KEY, 2, 3, 1),
    "tokens": lambda: init_token_model(KEY, 5, 3, num_layers=2, embedding_size=2),
    "one_hot": lambda: init_token_model(KEY, 5, 3, embedding_size=None),
    "bfloat16": lambda: init_gru(KEY, 2, 3, dtype=jnp.bfloat16),
    "float64": lambda: jax.tree.map(np.float64, init_gru(KEY, 2, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_comes_back_to_the_bit(tmp_path, kind):
    params, spec = KINDS[kind](), GRUSpec("after", "write", "relu")
    save_weights(tmp_path / "w", params, spec=spec, metadata={"epoch": 3})
    loaded = load_weights(tmp_path / "w")
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    assert (loaded.spec, loaded.metadata) == (spec, {"epoch": 3})
    for got, wanted in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params)):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, np.asarray(wanted))


def test_other_programs_read_the_arrays_by_name(tmp_path):
    params = init_token_model(KEY, 5, 3, num_layers=2, embedding_size=2)
    save_weights(tmp_path / "w", params, spec=PYTORCH)
    arrays = safetensors.load_file(tmp_path / "w")
    np.testing.assert_array_equal(arrays["layers.1.w_h"], params.layers[1].w_h)
    np.testing.assert_array_equal(arrays["embedding"], params.embedding)


def saved(tmp_path):
    path = tmp_path / "w"
    save_weights(path, init_gru(KEY, 2, 3), spec=PYTORCH)
    return path


def test_every_flipped_bit_of_the_file_is_noticed(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises((ValueError, TypeError)):
            load_weights(path)


def test_every_truncation_is_noticed(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^load_weights: .* must be a whole safetensors file"):
            load_weights(path)


def header_of(path, **changes):
    """Rewrites the metadata of a file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize("field", ["spec", "structure", "sizes", "metadata"])
def test_description_is_part_of_the_sha256(tmp_path, field):
    path = saved(tmp_path)
    other = {"spec": json.dumps({"reset": "before", "update": "keep", "activation": "tanh"})}
    header_of(path, **{field: other.get(field, '{"x": 1}')})
    told = r"^load_weights: .* must hold what was saved, got another sha256: it is damaged\.$"
    with pytest.raises(ValueError, match=told):
        load_weights(path)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("structure", '{"kind": "Foo", "fields": {}}'),
        ("structure", '{"kind": "GRUParams", "fields": {"w_x": "x"}}'),
        ("structure", '{"kind": "GRUParams", "fields": {"w": "w_x"}}'),
        ("structure", "[1]"),
        ("structure", "null"),
        ("structure", "[" * 3000 + "]" * 3000),
        ("spec", "[1]"),
        ("spec", '{"x": 1}'),
        ("sizes", '{"w": [99]}'),
        ("metadata", "[1]"),
    ],
)
def test_description_that_describes_no_parameters_is_refused(tmp_path, monkeypatch, field, text):
    """Whoever writes a file writes its sha256, too: what it says is checked by itself."""
    monkeypatch.setattr(weight_files, "_digest", lambda description, arrays: "same")
    path = saved(tmp_path)
    header_of(path, **{field: text})
    told = r"^load_weights: .* must describe parameters of this package, got"
    with pytest.raises(ValueError, match=told):
        load_weights(path)


def test_array_that_no_parameter_uses_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "_digest", lambda description, arrays: "same")
    path = saved(tmp_path)
    fields = {"w_x": "w_x", "w_h": "w_h", "b_x": None, "b_h": None, "g_x": None, "g_h": None}
    header_of(path, structure=json.dumps({"kind": "GRUParams", "fields": fields}))
    with pytest.raises(ValueError, match="its structure does not use all of its arrays"):
        load_weights(path)


def test_pickles_are_refused_with_the_safe_way(tmp_path):
    path = tmp_path / "w.pt"
    for data in (pickle.dumps({"w": 1}), b"PK\x03\x04archive"):
        path.write_bytes(data)
        told = r"got a pickle or a zip of one, which can run code; .*safetensors\.torch\.save_file"
        with pytest.raises(ValueError, match=told):
            load_weights(path)


def test_header_whose_length_looks_like_a_pickles_beginning_is_read(tmp_path):
    """Lengths of 0x280 and 0x480 begin with the bytes of pickle's protocols 2 and 4."""
    seen = set()
    for length in range(700):
        safetensors.save_file({"w": np.ones(2)}, tmp_path / "w", {"x": "y" * length})
        start = (tmp_path / "w").read_bytes()[:2]
        if start[0] == 0x80:
            seen.add(start)
            np.testing.assert_array_equal(read_safetensors(tmp_path / "w")["w"], np.ones(2))
    assert b"\x80\x02" in seen


def test_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "w"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}" * 100)
    with pytest.raises(ValueError, match=r"a header of at most 8388608 bytes, got 208 bytes of wh"):
        load_weights(path)


def test_other_programs_files_are_pointed_to_the_converters(tmp_path):
    safetensors.save_file({"weight_ih_l0": np.ones((9, 2))}, tmp_path / "w")
    with pytest.raises(ValueError, match=r"got format None; .* go through jaxgru\.from_torch"):
        load_weights(tmp_path / "w")


def test_bad_calls_are_refused_and_leave_no_file(tmp_path):
    path = tmp_path / "w"
    with pytest.raises(TypeError, match=r"^save_weights: params must be a GRUParams, .* got dict"):
        save_weights(path, {"w": np.ones(3)})
    cell = init_gru(KEY, 2, 3)
    for params, told in (
        ((GRUParams(np.ones((2, 9)), {1}, None, None),), r"0\.w_h must be an array, got set"),
        (None, "params must be a GRUParams, .* got NoneType"),
        (np.ones(3), "params must be a GRUParams, .* got ndarray"),
        ((), "params must be a GRUParams, .* got tuple"),
        ((cell, None), "1 must be a GRUParams, .* got NoneType"),
        (cell._replace(b_x=cell.b_x.astype(jnp.bfloat16)), r"params\.b_x must have the dtype of"),
    ):
        with pytest.raises(TypeError, match=f"^save_weights: {told}"):
            save_weights(path, params)
    with pytest.raises(ValueError, match=r"^save_weights: params\.w_x must have shape"):
        save_weights(path, cell._replace(w_h=jnp.ones((7, 1))))
    with pytest.raises(TypeError, match=r"^save_weights: metadata must be a dict or None, got \[1"):
        save_weights(path, cell, metadata=[1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_weights(path, cell, metadata={"x": float("nan")})
    with pytest.raises(TypeError, match=r"^save_weights: spec must be a GRUSpec"):
        save_weights(path, init_gru(KEY, 2, 3), spec="cho")
    with pytest.raises(TypeError, match="JSON serializable"):
        save_weights(path, init_gru(KEY, 2, 3), spec=CHO_2014, metadata={"x": object()})
    with pytest.raises(FileNotFoundError):
        load_weights(path)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_told(tmp_path):
    params = init_gru(KEY, 2, 3)
    with pytest.warns(UserWarning, match=r"^save_weights: b_x holds 9 values that are not finite"):
        save_weights(tmp_path / "w", params._replace(b_x=jnp.full(9, jnp.nan)))
