"""Weights of other libraries: golden files of their results, round trips, refused calls."""

import dataclasses
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, make_problem, with_spec
from peer_layers import PEERS, VARIANTS

from jaxgru import (
    CHO_2014,
    CHUNG_2014,
    PYTORCH,
    Bidirectional,
    GRUParams,
    GRUSpec,
    gru_stack,
    interop,
    models,
)
from jaxgru.interop.common import negate_update

GOLDEN = pathlib.Path(__file__).parent / "golden"
EXACT = 1e-12  # float64 on both sides
WRITERS = {name: getattr(interop, f"to_{name}") for name in PEERS}


def load_golden(name, variant):
    """The arrays of a file; weights and gradients are also in separate dicts."""
    with np.load(GOLDEN / f"{name}_{variant}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    parts = {
        part: {k.removeprefix(f"{part}:"): v for k, v in arrays.items() if k.startswith(part)}
        for part in ("weights", "grads")
    }
    return parts, arrays


def as_stack(params):
    """The layers as a stack of JAX arrays; a single layer is a stack of one."""
    single = isinstance(params, GRUParams | Bidirectional)
    return jax.tree.map(jnp.asarray, (params,) if single else params)


def outputs_and_gradients(params, xs, cotangents):
    """hs, and the gradients of sum(hs * cotangents) in the parameters and inputs."""

    def loss(params, xs):
        hs = gru_stack(params, xs)[1]
        return jnp.sum(hs * cotangents), hs

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, dxs), hs = grad(params, jnp.asarray(xs))
    return hs, grads, dxs


def without_merged(grads, notes):
    """The gradients; those of b_h are zero for r and z if the source has one bias for them."""
    if not any("one bias in the source" in note for note in notes):
        return grads

    def visit(cell):
        keep = jnp.arange(cell.b_h.size) >= 2 * (cell.b_h.size // 3)
        return dataclasses.replace(cell, b_h=jnp.where(keep, cell.b_h, jnp.zeros_like(cell.b_h)))

    return jax.tree.map(visit, grads, is_leaf=lambda v: isinstance(v, GRUParams))


@pytest.mark.usefixtures("x64", "uncompiled")
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_golden_values_and_gradients_are_the_peers(name, variant):
    """The converted parameters have the equation as their spec; `gru_stack` gets no option."""
    parts, arrays = load_golden(name, variant)
    imported = PEERS[name].read(parts["weights"], variant)
    stack = as_stack(imported.params)
    hs, grads, dxs = outputs_and_gradients(stack, arrays["xs"], arrays["cotangents"])
    wanted = as_stack(PEERS[name].read(parts["grads"], variant).params)
    assert_close(hs, arrays["hs"], EXACT, "hs")
    assert_close(dxs, arrays["dxs"], EXACT, "dxs")
    assert_close(without_merged(grads, imported.notes), wanted, EXACT, "grads")


def flatten(name, weights):
    """The weights of a `to_*` under the names of tests/interop/golden."""
    if name != "keras":
        flat = jax.tree_util.tree_leaves_with_path(weights)
        return {"/".join(str(key.key) for key in path): v for path, v in flat}
    arrays = weights if hasattr(weights[0], "shape") else [v for layer in weights for v in layer]
    return dict(enumerate(arrays))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_round_trip_is_exact_to_the_bit(name, variant):
    weights = load_golden(name, variant)[0]["weights"]
    imported = PEERS[name].read(weights, variant)
    exported = WRITERS[name](imported.params)
    got = flatten(name, exported.weights)
    wanted = dict(enumerate(weights.values())) if name == "keras" else weights
    assert set(got) == set(wanted)
    for key, value in wanted.items():
        np.testing.assert_array_equal(got[key], value)
        assert got[key].dtype == value.dtype


@pytest.mark.usefixtures("x64", "uncompiled")
@pytest.mark.parametrize("reset", ["before", "after"])
def test_negated_update_gate_is_the_other_convention(reset):
    problem = make_problem(0)
    cell = with_spec(problem.params, GRUSpec(reset, "write"))
    flipped = negate_update(jax.tree.map(np.asarray, cell))
    assert flipped.spec == GRUSpec(reset, "keep")
    writes, keeps = (
        outputs_and_gradients(as_stack(params), problem.xs, problem.cotangents[1])
        for params in (cell, flipped)
    )
    assert_close(keeps[0], writes[0], EXACT)
    assert_close(keeps[2], writes[2], EXACT)


NEGATED = "the update gate's weights and biases are negated: "
NOTES = {  # the peer, the meaning of its z, and the note on biases that it has once
    "torch": ("torch.nn.GRU", "z keeps", ""),
    "keras": ("keras.layers.GRU", "z keeps", "Keras has one bias where reset_after is False"),
    "linen": ("flax.linen.GRUCell", "z keeps", "r and z have one bias in linen"),
    "nnx": ("flax.nnx.GRUCell", "z keeps", "r and z have one bias in nnx"),
    "equinox": ("equinox.nn.GRUCell", "z keeps", "r and z have one bias in Equinox"),
    "haiku": ("haiku.GRU", "z writes", "Haiku has one bias"),
    "onnx": ("ONNX's GRU", "z keeps", ""),
}


@pytest.mark.usefixtures("x64", "uncompiled")
@pytest.mark.parametrize("update", ["keep", "write"])
@pytest.mark.parametrize("name", PEERS)
def test_export_and_import_of_every_supported_equation_is_the_same_function(name, update):
    """Summed biases and a negated update gate change the arrays, not the outputs."""
    for reset in ("before", "after"):
        problem = make_problem(1)
        params = with_spec(jax.tree.map(np.array, problem.params), GRUSpec(reset, update))
        if name == "nnx":
            params.b_h[6:] = 0
        try:
            exported = WRITERS[name](params)
        except ValueError as error:
            assert f"got {reset!r}" in str(error)
            continue
        if name == "onnx":
            lbr = exported.options["linear_before_reset"]
            weights = exported.weights
            imported = interop.from_onnx(*(weights[k] for k in "WRB"), linear_before_reset=lbr)
        else:
            imported = getattr(interop, f"from_{name}")(exported.weights)
        assert imported.params.spec == GRUSpec(reset, "write" if name == "haiku" else "keep")
        got, hs = (
            outputs_and_gradients(as_stack(v), problem.xs, problem.cotangents[1])[0]
            for v in (imported.params, params)
        )
        assert_close(got, hs, EXACT)
        peer, sense, one_bias = NOTES[name]
        merges = one_bias and (name != "keras" or reset == "before")
        assert exported.notes == (
            *([NEGATED + f"{sense} in {peer}"] * ((update == "keep") != (sense == "z keeps"))),
            *([f"b_x and b_h are summed: {one_bias}"] * bool(merges)),
        )


def test_arrays_are_copies():
    weights = {"weight_ih": np.ones((9, 2)), "weight_hh": np.ones((9, 3))}
    params = interop.from_torch(weights).params
    weights["weight_ih"][:] = 7
    assert params.w_x.max() == 1
    exported = interop.to_nnx(GRUParams(np.ones((2, 9)), np.ones((3, 9)), spec=PYTORCH))
    params.w_h[:] = 5
    assert exported.weights["dense_h"]["kernel"].max() == 1


def test_part_of_a_larger_model_is_chosen_by_its_prefix():
    rnn = {f"rnn.{k}": v for k, v in load_golden("torch", "one_layer")[0]["weights"].items()}
    model = {"head.weight": np.ones((2, 3)), **rnn}
    (layer,), notes = interop.from_torch(model, prefix="rnn.")
    assert layer.w_x.shape == (4, 9)
    assert (layer.spec, notes) == (PYTORCH, ())


def test_cell_of_equinox_without_bias_is_a_module_or_a_mapping_with_none():
    """Equinox has None in the place of an absent bias."""
    arrays = {"weight_ih": np.ones((9, 2)), "weight_hh": np.ones((9, 3))}
    fields = arrays | {"bias": None, "bias_n": None}
    for read in (
        interop.from_equinox(types.SimpleNamespace(**fields)),
        interop.from_equinox({"rnn": fields, "scale": None}, prefix="rnn/"),
    ):
        assert (read.params.b_x, read.params.b_h, read.notes) == (None, None, ())
        np.testing.assert_array_equal(read.params.w_h, arrays["weight_hh"].T)


def test_lists_are_stacks_and_pairs_are_layers_of_two_directions():
    cell = load_golden("linen", "tanh")[0]["weights"]
    deep = {k: v[:3] if k.startswith("i") and "kernel" in k else v for k, v in cell.items()}
    params = interop.from_linen([cell, Bidirectional(deep, deep)]).params
    assert isinstance(params, tuple)
    assert isinstance(params[1], Bidirectional)
    assert params[1].backward.w_x.shape == (3, 9)
    weights = interop.to_linen(params).weights
    assert isinstance(weights[1], Bidirectional)
    np.testing.assert_array_equal(weights[1].forward["hn"]["kernel"], cell["hn/kernel"])


def test_weights_that_are_not_finite_raise_a_warning():
    cell = {"weight_ih": np.ones((9, 2)), "weight_hh": np.ones((9, 3))}
    cell["weight_hh"][0, :2] = np.nan, np.inf
    message = r"^from_torch: state_dict\['weight_hh'\] holds 2 values that are not finite\.$"
    with pytest.warns(UserWarning, match=message):
        interop.from_torch(cell)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtype_is_unchanged(dtype):
    dtype = jnp.dtype(dtype)
    cell = {"weight_ih": np.ones((9, 2), dtype), "weight_hh": np.ones((9, 3), dtype)}
    params = interop.from_torch(cell).params
    assert params.w_x.dtype == dtype
    assert interop.to_equinox(params).weights["weight_ih"].dtype == dtype


def test_arrays_in_another_byte_order_become_native():
    """JAX refuses the other order, and a file of weights would not match its own sha256."""
    cell = {k: np.arange(1, v.size + 1.0).reshape(v.shape) for k, v in torch_cell().items()}
    params = interop.from_torch({k: v.astype(">f4") for k, v in cell.items()}).params
    assert params.w_x.dtype == np.float32 and params.w_x.dtype.isnative
    np.testing.assert_array_equal(params.w_x, cell["weight_ih"].T)


def torch_cell(**changes):
    cell = {"weight_ih": np.ones((9, 2)), "weight_hh": np.ones((9, 3))} | changes
    return {k: v for k, v in cell.items() if v is not None}


class Unreadable:
    """Fails like a tensor that is not on the CPU."""

    def __array__(self, *args, **kwargs):
        raise RuntimeError("on a device")


def keras_cell(*bias):
    return [np.ones((2, 9)), np.ones((3, 9)), *bias]


def cell_of(hidden=3, inputs=2, spec=PYTORCH, **changes):
    """A cell of ones."""
    arrays = {"w_x": (inputs, 3 * hidden), "w_h": (hidden, 3 * hidden)}
    arrays |= {"b_x": (3 * hidden,), "b_h": (3 * hidden,)}
    return GRUParams(**({k: np.ones(v) for k, v in arrays.items()} | changes), spec=spec)


def spec_of(name):
    """An equation that the peer computes."""
    return CHUNG_2014 if name == "haiku" else PYTORCH


ACTIVATIONS = "'tanh', 'relu', 'sigmoid', 'softplus', 'identity'"
BOTH_SPECS = Bidirectional(cell_of(spec=CHO_2014), cell_of())
HAIKU_CELL = {"w_i": np.ones((2, 9)), "w_h": np.ones((3, 9)), "b": np.ones(9)}


BAD_CALLS = {
    "no_mapping": (
        lambda: interop.from_torch([1, 2]),
        TypeError,
        "from_torch: state_dict must be a mapping of names to arrays, got list.",
    ),
    "all_mismatches_together": (
        lambda: interop.from_torch(
            torch_cell(weight_hh=np.ones((3, 9)), bias_ih=np.ones(9), extra=np.ones(1))
        ),
        ValueError,
        "from_torch: state_dict must hold weight_hh, weight_ih, bias_ih, bias_hh, got "
        "missing keys: bias_hh [3H]; unexpected keys: extra; size mismatch: weight_hh (3, 9) for "
        "[3H H], weight_ih (9, 2) for [3H I], bias_ih (9,) for [3H] (with H=9, I=2).",
    ),
    "missing_layer": (
        lambda: interop.from_torch(
            {"weight_hh_l1": np.ones((9, 3)), "weight_ih_l1": np.ones((9, 3))}
        ),
        ValueError,
        "from_torch: state_dict must hold weight_hh_l0, weight_ih_l0, got missing keys: "
        "weight_hh_l0 [3H H], weight_ih_l0 [3H I]; unexpected keys: weight_hh_l1, weight_ih_l1.",
    ),
    "wrong_prefix": (
        lambda: interop.from_torch(torch_cell(), prefix="rnn."),
        ValueError,
        "from_torch: prefix must be the start of a name in state_dict, got 'rnn.'; the names are "
        "weight_ih, weight_hh.",
    ),
    "wrong_prefix_of_many_names": (
        lambda: interop.from_torch({f"w{i}": np.ones(2) for i in range(21)}, prefix="x"),
        ValueError,
        "from_torch: prefix must be the start of a name in state_dict, got 'x'; the names are "
        f"{', '.join(f'w{i}' for i in range(20))}, ... and 1 more.",
    ),
    "none_for_an_array_of_haiku": (
        lambda: interop.from_haiku(HAIKU_CELL | {"scale": None}),
        TypeError,
        "from_haiku: cell['scale'] must be an array of float64, float32, bfloat16, float16, got "
        "dtype object.",
    ),
    "none_for_an_array_of_linen": (
        lambda: interop.from_linen(interop.to_linen(cell_of()).weights | {"hr/bias": None}),
        TypeError,
        "from_linen: cell['hr/bias'] must be an array of float64, float32, bfloat16, float16, got "
        "dtype object.",
    ),
    "none_for_a_kernel_of_equinox": (
        lambda: interop.from_equinox({"weight_hh": None, "weight_ih": np.ones((9, 2))}),
        TypeError,
        "from_equinox: cell['weight_hh'] must be an array of float64, float32, bfloat16, float16, "
        "got dtype object.",
    ),
    "attributes_for_a_mapping": (
        lambda: interop.from_haiku(types.SimpleNamespace(**HAIKU_CELL)),
        TypeError,
        "from_haiku: cell must be a mapping of names to arrays, got SimpleNamespace.",
    ),
    "no_names": (
        lambda: interop.from_torch({}),
        ValueError,
        "from_torch: prefix must be the start of a name in state_dict, got ''; the names are none.",
    ),
    "no_array": (
        lambda: interop.from_haiku({"w_h": Unreadable()}),
        TypeError,
        "from_haiku: cell['w_h'] must be an array that NumPy can hold, got Unreadable (on a "
        "device); move it to the CPU, detach it, and cast PyTorch's bfloat16 with .float().",
    ),
    "keras_size_mismatch": (
        lambda: interop.from_keras(
            {"recurrent_kernel": np.ones((3, 9)), "kernel": np.ones((2, 8))}, reset_after=True
        ),
        ValueError,
        "from_keras: weights must hold recurrent_kernel, kernel, got size mismatch: kernel (2, 8) "
        "for [I 3H] (with H=3, I=2).",
    ),
    "optimizer_state": (
        lambda: interop.from_torch({"state": {}, "param_groups": []}),
        ValueError,
        "from_torch: state_dict must be of a module, got that of an optimizer, which is not "
        "converted; initialize an optax optimizer.",
    ),
    "module_for_a_state_dict": (
        lambda: interop.from_torch(types.SimpleNamespace(state_dict=dict)),
        TypeError,
        "from_torch: state_dict must be a mapping of names to arrays, got SimpleNamespace; pass "
        "its state_dict().",
    ),
    "integers": (
        lambda: interop.from_torch(torch_cell(weight_hh=np.ones((9, 3), int))),
        TypeError,
        "from_torch: state_dict['weight_hh'] must be an array of float64, float32, bfloat16, "
        "float16, got dtype int64.",
    ),
    "two_dtypes": (
        lambda: interop.from_torch(torch_cell(weight_hh=np.ones((9, 3), np.float32))),
        TypeError,
        "from_torch: state_dict must have one dtype, got float32, float64; cast to one.",
    ),
    "keras_without_bias": (
        lambda: interop.from_keras(keras_cell()),
        ValueError,
        "from_keras: reset_after must be True or False for weights, which has no bias whose shape "
        "shows it, got None.",
    ),
    "keras_reset_contradicts_bias": (
        lambda: interop.from_keras(keras_cell(np.ones(9)), reset_after=True),
        ValueError,
        "from_keras: reset_after must be False for a bias of shape (9,), got True.",
    ),
    "keras_kind": (
        lambda: interop.from_keras(keras_cell(np.ones(9)), reset_after=1),
        TypeError,
        "from_keras: reset_after must be a bool or None, got 1.",
    ),
    "keras_count": (
        lambda: interop.from_keras([np.ones((2, 9))]),
        ValueError,
        "from_keras: weights must hold 2 or 3 arrays, or 4 or 6 of a Bidirectional, got 1; for "
        "several layers give a list, [v.get_weights() for v in layers].",
    ),
    "keras_layers_in_one_list": (
        lambda: interop.from_keras(
            [*keras_cell(np.ones((2, 9))), np.ones((3, 12)), np.ones((4, 12)), np.ones((2, 12))]
        ),
        ValueError,
        "from_keras: weights must have the same I and H in both directions, got (2, 3) and (3, 4); "
        "give consecutive layers as a list.",
    ),
    "keras_no_weights": (
        lambda: interop.from_keras(None),
        TypeError,
        "from_keras: weights must be a layer's get_weights(), a mapping, or a list of those, got "
        "NoneType.",
    ),
    "flax_prefix": (
        lambda: interop.from_linen({"params": {"cell": {"hr": {"kernel": np.ones((3, 3))}}}}),
        ValueError,
        "from_linen: prefix must be one of 'params/cell/', where cell holds a GRU, got ''.",
    ),
    "torch_prefix_beside_integers": (
        lambda: interop.from_torch(
            {"bn.num": np.ones(1, int), "rnn.weight_hh_l0": np.ones((9, 3))}
        ),
        ValueError,
        "from_torch: prefix must be one of 'rnn.', where state_dict holds a GRU, got ''.",
    ),
    "prefix_kind": (
        lambda: interop.from_haiku({}, prefix=None),
        TypeError,
        "from_haiku: prefix must be a string, got None.",
    ),
    "duplicate_name": (
        lambda: interop.from_haiku({"a": {"b": 1.0}, "a/b": 2.0}),
        ValueError,
        "from_haiku: two arrays have the name 'a/b'.",
    ),
    "onnx_attribute": (
        lambda: interop.from_onnx(np.ones((1, 9, 2)), np.ones((1, 9, 3)), linear_before_reset="0"),
        ValueError,
        "from_onnx: linear_before_reset must be 0 or 1, got '0'.",
    ),
    "no_cell_of_equinox": (
        lambda: interop.from_equinox(3.0),
        TypeError,
        "from_equinox: cell must be a mapping of names to arrays, got float.",
    ),
    "list_in_a_list": (
        lambda: interop.to_linen(((cell_of(),),)),
        TypeError,
        "to_linen: params[0] must be one layer, got a list inside a list.",
    ),
    "model_for_its_layers": (
        lambda: interop.to_torch(models.SequenceParams((cell_of(),), 0, 0)),
        TypeError,
        "to_torch: params must be a GRUParams, a Bidirectional or a stack of them, got "
        "SequenceParams; pass params.layers.",
    ),
    "directions_of_two_sizes": (
        lambda: interop.to_onnx(Bidirectional(cell_of(), cell_of(4))),
        ValueError,
        "to_onnx: params must have the same I and H in both directions, got (2, 3) and (2, 4); "
        "give consecutive layers as a list.",
    ),
    "layers_that_do_not_fit": (
        lambda: interop.to_keras((cell_of(), cell_of(inputs=7))),
        ValueError,
        "to_keras: params[1] must take the 3 outputs of the layer below it, got I=7.",
    ),
    "dtypes_of_directions": (
        lambda: interop.to_onnx(Bidirectional(cell_of(), jax.tree.map(np.float16, cell_of()))),
        TypeError,
        "to_onnx: params must have one dtype, got float16, float64; cast to one.",
    ),
    "bad_second_layer": (
        lambda: interop.to_torch((cell_of(), cell_of(inputs=3, b_x=np.ones(2)))),
        ValueError,
        "to_torch: params[1].b_x must have shape (9,) (H=3, the rows of params[1].w_h), got (2,).",
    ),
    "no_layers": (
        lambda: interop.from_haiku([]),
        ValueError,
        "from_haiku: cell must hold at least one layer, got none.",
    ),
    "keras_layer_of_none": (
        lambda: interop.from_keras([keras_cell(np.ones(9)), None]),
        TypeError,
        "from_keras: weights[1] must be a layer's get_weights(), a mapping, or a list of those, "
        "got NoneType.",
    ),
    "onnx_directions": (
        lambda: interop.from_onnx(np.ones((3, 9, 2)), np.ones((3, 9, 3))),
        ValueError,
        "from_onnx: R must have one or two directions (axis 0), got 3.",
    ),
    "nnx_has_no_bias_inside": (
        lambda: interop.to_nnx((cell_of(),)),
        ValueError,
        "to_nnx: params[0].b_h must be zero in its n block, as flax.nnx.GRUCell has no bias that "
        "the reset gate multiplies, got up to 1; flax.linen.GRUCell has one (to_linen).",
    ),
    "params_kind": (
        lambda: interop.to_linen({"w_x": 1}),
        TypeError,
        "to_linen: params must be a GRUParams, a Bidirectional or a stack of them, got dict.",
    ),
    "layer_kind": (
        lambda: interop.to_torch((cell_of(), 1)),
        TypeError,
        "to_torch: params[1] must be a GRUParams or a Bidirectional, got int.",
    ),
    "direction_kind": (
        lambda: interop.to_keras(Bidirectional(cell_of(), None)),
        TypeError,
        "to_keras: params.backward must be a GRUParams, got NoneType.",
    ),
    "spec_kind": (
        lambda: interop.to_onnx(cell_of(spec="pytorch")),
        TypeError,
        "to_onnx: params.spec must be a GRUSpec, such as jaxgru.PYTORCH, got 'pytorch'.",
    ),
    "spec_of_a_second_layer": (
        lambda: interop.to_torch((cell_of(), cell_of(inputs=3, spec=CHO_2014))),
        ValueError,
        "to_torch: params[1].spec.reset must be 'after', which is all that torch.nn.GRU computes, "
        "got 'before'; no weights make the two equations equal, so train a model with "
        "reset='after'.",
    ),
    "specs_of_directions_keras": (
        lambda: interop.to_keras(BOTH_SPECS),
        ValueError,
        "to_keras: layer 0 of params must have one spec in both directions, as keras.layers.GRU "
        f"has, got {CHO_2014} and {PYTORCH}.",
    ),
    "specs_of_directions_onnx": (
        lambda: interop.to_onnx((cell_of(hidden=2), BOTH_SPECS)),
        ValueError,
        "to_onnx: layer 1 of params must have one spec in both directions, as ONNX's GRU has, got "
        f"{CHO_2014} and {PYTORCH}.",
    ),
    "torch_one_kind_of_layer": (
        lambda: interop.to_torch((cell_of(), Bidirectional(cell_of(inputs=3), cell_of(inputs=3)))),
        ValueError,
        "to_torch: params[1] must be a GRUParams with (I, H) = (3, 3), as all layers of a "
        "torch.nn.GRU are alike and take all outputs of the layer below, got a Bidirectional with "
        "(3, 3).",
    ),
    "torch_one_size": (
        lambda: interop.to_torch((cell_of(), cell_of(4, 3))),
        ValueError,
        "to_torch: params[1] must be a GRUParams with (I, H) = (3, 3), as all layers of a "
        "torch.nn.GRU are alike and take all outputs of the layer below, got a GRUParams with "
        "(3, 4).",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_is_refused_with_its_reason(case):
    call, kind, message = BAD_CALLS[case]
    with pytest.raises(kind, match="^" + re.escape(message) + "$"):
        call()


@pytest.mark.parametrize("name", ["keras", "linen", "nnx", "onnx"])
def test_unknown_activation_is_refused(name):
    arrays = (np.ones((1, 9, 2)), np.ones((1, 9, 3)))
    source = {"keras": [keras_cell(np.ones(9))], "onnx": arrays}.get(name, [{}])
    message = f"from_{name}: activation must be one of {ACTIVATIONS}, got 'elu'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(interop, f"from_{name}")(*source, activation="elu")


def mapping_of(name):
    """The weights of a cell by the peer's names."""
    cell = cell_of(spec=spec_of(name), b_h=np.r_[np.ones(6), np.zeros(3)])
    weights = flatten(name, WRITERS[name](cell).weights)
    if name == "keras":
        weights = dict(zip(("kernel", "recurrent_kernel", "bias"), weights.values()))
    return weights


AXES = {  # for each peer the argument in its error, and its arrays in order with their axes
    "torch": ("state_dict", "weight_hh [3H H], weight_ih [3H I], bias_ih [3H], bias_hh [3H]"),
    "keras": ("weights", "recurrent_kernel [H 3H], kernel [I 3H], bias [2 3H]"),
    "linen": (
        "cell",
        "hr/kernel [H H], hz/kernel [H H], hn/kernel [H H], ir/kernel [I H], iz/kernel [I H], "
        "in/kernel [I H], ir/bias [H], iz/bias [H], in/bias [H], hn/bias [H]",
    ),
    "nnx": ("cell", "dense_h/kernel [H 3H], dense_i/kernel [I 3H], dense_i/bias [3H]"),
    "equinox": ("cell", "weight_hh [3H H], weight_ih [3H I], bias [3H], bias_n [H]"),
    "haiku": ("cell", "w_h [H 3H], w_i [I 3H], b [3H]"),
}


@pytest.mark.parametrize("name", AXES)
def test_every_array_of_a_peer_has_its_axes_and_a_floating_dtype(name):
    read, (source, listed) = getattr(interop, f"from_{name}"), AXES[name]
    weights = mapping_of(name)
    axes = dict(re.findall(r"(\S+) \[([^]]+)\]", listed))
    assert set(axes) == set(weights)
    for key, wanted in axes.items():
        odd = np.ones((7, 5, 3))
        with pytest.raises(ValueError) as caught:
            read(weights | {key: odd})
        found = str(caught.value)
        start = f"from_{name}: {source} must hold {', '.join(axes)}, got size mismatch: "
        if name != "keras" or key != "bias":
            assert found.startswith(start) and f"{key} (7, 5, 3) for [{wanted}]" in found
        with pytest.raises(TypeError) as caught:
            read(weights | {key: np.ones(odd.shape, int)})
        assert str(caught.value) == (
            f"from_{name}: {source}[{key!r}] must be an array of float64, float32, bfloat16, "
            "float16, got dtype int64."
        )
    with pytest.raises(ValueError) as caught:
        read(weights | {"more": np.ones(3)})
    assert str(caught.value) == (
        f"from_{name}: {source} must hold {', '.join(axes)}, got unexpected keys: more."
    )


@pytest.mark.parametrize("name", ["torch", "linen", "nnx", "equinox", "haiku"])
def test_prefix_that_is_missing_is_named(name):
    read, (source, _) = getattr(interop, f"from_{name}"), AXES[name]
    separator = "." if name == "torch" else "/"
    weights = {f"rnn{separator}{key}": v for key, v in mapping_of(name).items()}
    with pytest.raises(ValueError) as caught:
        read(weights)
    assert str(caught.value) == (
        f"from_{name}: prefix must be one of 'rnn{separator}', where {source} holds a GRU, got ''."
    )
    found = read(weights, prefix=f"rnn{separator}").params
    jax.tree.map(np.testing.assert_array_equal, found, read(mapping_of(name)).params)


@pytest.mark.parametrize("name", NOTES)
def test_equation_that_a_peer_does_not_compute_is_refused(name):
    peer, spec = NOTES[name][0], spec_of(name)
    with pytest.raises(ValueError) as caught:
        WRITERS[name](cell_of(spec=spec, g_x=np.ones(9)))
    assert str(caught.value) == (
        f"to_{name}: params must have no layer-norm scale, because {peer} has no layer "
        "normalization of the gates' products, got g_x or g_h."
    )
    if name in ("torch", "equinox", "haiku"):
        with pytest.raises(ValueError) as caught:
            WRITERS[name](cell_of(spec=GRUSpec(spec.reset, activation="relu")))
        assert str(caught.value) == (
            f"to_{name}: params.spec.activation must be 'tanh', which is all that {peer} computes, "
            "got 'relu'; no weights make the two equations equal, so train a model with "
            "activation='tanh'."
        )
    if name not in ("keras", "onnx"):
        other = "after" if name == "haiku" else "before"
        with pytest.raises(ValueError) as caught:
            WRITERS[name](cell_of(spec=GRUSpec(other)))
        assert str(caught.value) == (
            f"to_{name}: params.spec.reset must be {spec.reset!r}, which is all that {peer} "
            f"computes, got {other!r}; no weights make the two equations equal, so train a model "
            f"with reset={spec.reset!r}."
        )


ABSENT = {"b_x": cell_of(b_x=None), "b_h": cell_of(b_h=None), "both": cell_of(b_x=None, b_h=None)}
# The absent biases that each target writes as zeros; it has no array for the others.
FILLS = {
    "torch": {"b_x", "b_h"},
    "keras": {"b_x", "b_h"},
    "onnx": {"b_x", "b_h"},
    "equinox": {"b_x", "b_h"},
    "linen": {"b_x", "b_h", "both"},
    "nnx": {"both"},
    "haiku": {"both"},
}


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("name", FILLS)
def test_absent_biases_that_are_written_as_zeros_are_noted(name, absent):
    cell = with_spec(ABSENT[absent], spec_of(name))
    if name == "nnx" and cell.b_h is not None:
        cell = dataclasses.replace(cell, b_h=cell.b_h * (np.arange(9) < 6))
    exported = WRITERS[name](cell)
    noted = "absent biases are written as zeros" in exported.notes
    assert noted == (absent in FILLS[name])
    assert exported.options.get("bias", exported.options.get("use_bias", True)) == (
        absent != "both" or name not in ("torch", "keras", "equinox")
    )


def test_layer_without_bias_beside_one_with_bias_is_noted():
    bare, full = ABSENT["both"], cell_of()
    for name in ("keras", "onnx"):
        exported = WRITERS[name](Bidirectional(full, bare))
        assert exported.notes == ("absent biases are written as zeros",)
        upper = dataclasses.replace(full, w_x=np.ones((3, 9)))
        assert WRITERS[name]((bare, upper)).notes == ()


OPTIONS = {
    "torch": {"input_size": 2, "hidden_size": 3, "bias": True},
    "keras": {"units": 3, "activation": "tanh", "reset_after": True, "use_bias": True},
    "linen": {"features": 3, "activation_fn": "tanh"},
    "nnx": {"in_features": 2, "hidden_features": 3, "activation_fn": "tanh"},
    "equinox": {"input_size": 2, "hidden_size": 3, "use_bias": True},
    "haiku": {"hidden_size": 3},
    "onnx": {
        "hidden_size": 3,
        "direction": "forward",
        "linear_before_reset": 1,
        "activations": ["Sigmoid", "Tanh"],
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_cell_build_the_target(name):
    cell = cell_of(spec=spec_of(name), b_h=np.r_[np.ones(6), np.zeros(3)])
    assert WRITERS[name](cell).options == OPTIONS[name]


def test_one_bias_of_the_source_for_two_is_noted():
    cells = load_golden("linen", "tanh")[0]["weights"], interop.to_equinox(cell_of()).weights
    for read, cell in zip((interop.from_linen, interop.from_equinox), cells):
        assert read(cell).notes == (
            "r and z have one bias in the source: b_h starts at zero for them and is trained "
            "beside b_x",
        )


def test_reset_of_onnx_is_before_by_default():
    imported = interop.from_onnx(np.ones((1, 9, 2)), np.ones((1, 9, 3)))
    assert imported.params.spec == GRUSpec("before", "keep")


def test_layers_with_different_equations_are_exported():
    """Targets that have an equation per layer get the one of each layer."""
    specs = (GRUSpec("after", activation="relu"), GRUSpec("before", "write", "softplus"))
    stack = tuple(cell_of(inputs=n, spec=spec) for n, spec in zip((2, 3), specs))
    keras = interop.to_keras(stack)
    found = [(v["reset_after"], v["activation"]) for v in keras.options]
    assert found == [(True, "relu"), (False, "softplus")]
    assert keras.notes == (
        NEGATED + "z keeps in keras.layers.GRU",
        "b_x and b_h are summed: Keras has one bias where reset_after is False",
    )
    again = interop.from_keras(keras.weights, activation="relu").params
    assert [v.spec for v in again] == [GRUSpec(v.reset, "keep", "relu") for v in specs]
    np.testing.assert_array_equal(again[1].w_x, negate_update(stack[1]).w_x)
    nodes = interop.to_onnx(stack).options
    assert [(v["linear_before_reset"], v["activations"][1]) for v in nodes] == [
        (1, "Relu"), (0, "Softplus")
    ]  # fmt: skip
    after = (stack[0], with_spec(stack[1], PYTORCH))
    found = [v["activation_fn"] for v in interop.to_linen(after).options]
    assert found == ["relu", "tanh"]


def test_directions_that_differ_only_in_their_update_are_exported():
    """Negating the update gate of one direction makes their equations equal."""
    writes = cell_of(spec=GRUSpec("after", "write"))
    exported = interop.to_torch(Bidirectional(cell_of(), writes))
    forward, backward = interop.from_torch(exported.weights).params[0]
    np.testing.assert_array_equal(forward.w_h, writes.w_h)
    np.testing.assert_array_equal(backward.w_h, negate_update(writes).w_h)
    assert forward.spec == backward.spec == PYTORCH


def test_options_build_the_target():
    stack = (
        Bidirectional(cell_of(), cell_of()),
        Bidirectional(cell_of(inputs=6), cell_of(inputs=6)),
    )
    assert interop.to_torch(stack).options == {
        "input_size": 2,
        "hidden_size": 3,
        "num_layers": 2,
        "bias": True,
        "bidirectional": True,
    }
    onnx = interop.to_onnx(with_spec(stack[0], GRUSpec("before", activation="identity"))).options
    assert onnx == {
        "hidden_size": 3,
        "direction": "bidirectional",
        "linear_before_reset": 0,
        "activations": ["Sigmoid", "Affine"] * 2,
        "activation_alpha": [1.0, 1.0],
        "activation_beta": [0.0, 0.0],
    }
    options = interop.to_keras(cell_of(spec=GRUSpec(activation="identity"))).options
    assert options == {
        "units": 3,
        "activation": "linear",
        "reset_after": False,
        "use_bias": True,
    }
