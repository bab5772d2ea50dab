"""The checks of arguments that all functions share: what they refuse, and in which words."""

import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgru
from jaxgru.core import checks
from jaxgru.core.checks import (
    require_axis,
    require_bool,
    require_choice,
    require_count,
    require_dtype,
    require_first_step,
    require_float,
    require_key,
    require_rate,
)
from jaxgru.core.noise import require_noise
from jaxgru.extras import require_extra


def traced(check):
    """A check of a value inside of jit, where it cannot be read."""
    return lambda function, value: jax.jit(lambda x: check(function, x))(value)


def of_nnx(name, *bases):
    """A class that looks like one of Flax nnx, which need not be installed."""
    return type(name, bases, {"__module__": "flax.nnx.somewhere"})


LAYER = jaxgru.init_gru(jax.random.key(0), 2, 3)
CALLS = {
    "gru": (LAYER, jnp.zeros((4, 2))),
    "gru_cell": (LAYER, jnp.zeros(2), jnp.zeros(3)),
    "gru_bidirectional": (jaxgru.Bidirectional(LAYER, LAYER), jnp.zeros((4, 2))),
    "gru_stack": ((LAYER,), jnp.zeros((4, 2))),
    "gru_stack_cell": ((LAYER,), jnp.zeros(2), (jnp.zeros(3),)),
    "init_gru": (jax.random.key(0), 2, 3),
    "init_stack": (jax.random.key(0), 2, 3),
    "length_mask": (jnp.array([2]), 3),
    "resets_from_dones": (jnp.zeros((4, 2), bool),),
}
SIZES = "the parameters, which init_gru and init_stack draw, already have it."


@pytest.mark.parametrize(
    ("name", "argument", "cure"),
    [
        ("gru", "batch_first", "arrays are time-major; pass axis=1 for [B, T, ...]."),
        ("length_mask", "batch_first", "arrays are time-major; pass axis=1 for [B, T, ...]."),
        ("gru_cell", "batch_first", "it takes params, x, h."),
        ("init_gru", "batch_first", "gru and gru_stack take axis=1 for [B, T, ...]."),
        ("init_stack", "batch_first", "gru and gru_stack take axis=1 for [B, T, ...]."),
        ("gru_stack", "seq_lengths", "pass mask=length_mask(lengths, T)."),
        ("gru", "num_layers", "init_stack draws such layers, and gru_stack runs them."),
        ("gru", "hidden_size", SIZES),
        ("gru", "use_bias", SIZES),
        ("init_gru", "use_bias", "pass bias."),
        ("init_stack", "units", "pass hidden_size."),
        ("gru", "spec", "the parameters hold their equation: init_gru(..., spec=PYTORCH), or "
         "dataclasses.replace(params, spec=...)."),
        ("init_gru", "reset_after", "pass spec, such as PYTORCH."),
        ("gru", "dropout", "gru_stack takes dropout between layers, and "
         "noise=Noise(recurrent_dropout=...) is the dropout of the state."),
        ("gru", "truncate", "gru and gru_stack take it in gradient=BPTT(...)."),
        ("gru_cell", "zoneout", "gru and gru_stack take both rates in noise=Noise(...)."),
        ("gru_stack", "rngs", "pass key=jax.random.key(...)."),
        ("gru", "training", "pass deterministic=True for evaluation."),
        ("gru", "initial_state", "pass h0."),
        ("gru_cell", "hx", "pass h."),
        ("gru", "return_sequences",
         "the last state and the outputs of all steps are always returned, (h_last, hs)."),
        ("gru_bidirectional", "inputs", "pass xs."),
        ("gru_stack_cell", "inputs", "pass x."),
        ("init_gru", "inputs", "did you mean input_size?"),
        ("gru", "go_backwards", "pass reverse=True."),
        ("gru_stack", "merge_mode", "pass merge."),
        ("gru", "stateful", "pass the h_last of one call as the h0 of the next."),
        ("gru", "masks", "did you mean mask?"),
        ("gru_stack", "determinstic", "did you mean deterministic?"),
        ("gru_bidirectional", "resest", "did you mean resets?"),
        ("gru_stack_cell", "h0", "did you mean h?"),
        ("gru_cell", "foo", "it takes params, x, h."),
        ("init_gru", "layernorm", "did you mean layer_norm?"),
    ],
)  # fmt: skip
def test_unknown_argument_is_told_what_to_pass_instead(name, argument, cure):
    with pytest.raises(TypeError) as refused:
        getattr(jaxgru, name)(*CALLS[name], **{argument: 1})
    assert str(refused.value) == f"{name}: got an unexpected argument {argument!r}; {cure}"


@pytest.mark.parametrize("name", CALLS)
def test_advice_on_an_argument_names_one_that_the_function_has(name):
    function = getattr(jaxgru, name)
    function(*CALLS[name])  # a good call
    known = inspect.signature(function).parameters
    for argument in {argument for arguments, *_ in checks.CURES for argument in arguments}:
        if argument in known:
            continue
        with pytest.raises(TypeError) as refused:
            function(*CALLS[name], **{argument: 1})
        for advised in re.findall(r"; pass (\w+)|did you mean (\w+)", str(refused.value)):
            assert "".join(advised) in {*known, "the"}, refused.value


F32, KEY = np.zeros(3, np.float32), jax.random.key(0)
CHECKS = [
    (ValueError, require_choice, ("x", "c", ("a", "b")), "x must be one of 'a', 'b', got 'c'."),
    (ValueError, require_count, ("x", 0), "x must be at least 1, got 0."),
    (ValueError, require_count, ("x", -1, 0), "x must be at least 0, got -1."),
    (TypeError, require_count, ("x", 1.0), "x must be an integer, got 1.0."),
    (TypeError, require_count, ("x", True), "x must be an integer, got True."),
    (TypeError, traced(lambda function, x: require_count(function, "x", x)), (1,),
     "x must be an integer, got a traced value; inside jit, make it a static argument."),
    (TypeError, require_float, ("x", [1.0]),
     "x must be an array, got list; convert it with jnp.asarray."),
    (TypeError, require_float, ("x", np.dtype("float32")),
     "x must be an array, got Float32DType; convert it with jnp.asarray."),
    (TypeError, require_float, ("x", of_nnx("Param", of_nnx("Variable"))()),
     "x must be an array, got nnx.Param; unwrap it, or a whole tree of them, with nnx.as_pure."),
    (TypeError, require_float, ("x", type("Mine", (of_nnx("Variable"),), {})()),
     "x must be an array, got Mine; unwrap it, or a whole tree of them, with nnx.as_pure."),
    (TypeError, require_float, ("x", of_nnx("State")()),
     "x must be an array, got nnx.State; merge it with nnx.merge, and unwrap the parameters of the "
     "module with nnx.as_pure."),
    (TypeError, require_float, ("x", np.arange(3), None, "round it"),
     "x must be a floating array, got dtype int64; round it."),
    (TypeError, require_float, ("x", np.arange(3)),
     "x must be a floating array, got dtype int64; cast it first."),
    (TypeError, require_float, ("x", F32.astype(np.float64)),
     "the dtype of x must be enabled, got float64; set jax.config.update('jax_enable_x64', True) "
     "or cast to float32."),
    (TypeError, require_float, ("x", F32, jnp.bfloat16),
     "x must have the dtype of the parameters, bfloat16, got float32; cast one of them."),
    (TypeError, require_float, ("x", jnp.zeros(3, jnp.float8_e5m2)),
     "the dtype of x must be one of float64, float32, bfloat16, float16, got float8_e5m2."),
    (TypeError, require_dtype, (np.int32,),
     "dtype must be one of float64, float32, bfloat16, float16, got int32."),
    (TypeError, require_axis, (1.0, (2, 3)), "axis must be an integer, got 1.0."),
    (TypeError, require_axis, (True, (2, 3)), "axis must be an integer, got True."),
    (TypeError, traced(lambda function, x: require_axis(function, x, (2, 3))), (1,),
     "axis must be an integer, got a traced value; inside jit, make it a static argument."),
    (ValueError, require_axis, (1, (2, 3)),
     "axis must name an axis of xs other than its last, got 1 for shape (2, 3)."),
    (ValueError, require_axis, (-1, (2, 3)),
     "axis must name an axis of xs other than its last, got -1 for shape (2, 3)."),
    (ValueError, require_axis, (-3, (2, 3)),
     "axis must name an axis of xs other than its last, got -3 for shape (2, 3)."),
    (TypeError, require_rate, ("r", "a"),
     "r must be a Python float or a floating scalar array, got 'a'."),
    (TypeError, require_rate, ("r", False),
     "r must be a Python float or a floating scalar array, got False."),
    (TypeError, traced(lambda function, x: require_rate(function, "r", x)), (1,),
     "r must be a Python float or a floating scalar array, got shape () and dtype int32."),
    (TypeError, require_rate, ("r", jnp.zeros(2)),
     "r must be a Python float or a floating scalar array, got shape (2,) and dtype float32."),
    (ValueError, require_rate, ("r", jnp.float32(1.0)), "r must be in [0, 1), got 1.0."),
    (ValueError, require_rate, ("r", np.float32(-1.0)), "r must be in [0, 1), got -1.0."),
    (ValueError, require_rate, ("r", 1.0), "r must be in [0, 1), got 1.0."),
    (ValueError, require_rate, ("r", -0.1), "r must be in [0, 1), got -0.1."),
    (TypeError, require_bool, ("x", 0), "x must be a bool, got 0."),
    (TypeError, traced(lambda function, x: require_bool(function, "x", x)), (True,),
     "x must be a bool, got a traced value; inside jit, make it a static argument."),
    (TypeError, require_noise, (None, KEY, 1, {"r": 0.1}), "deterministic must be a bool, got 1."),
    (ValueError, require_noise, (None, None, False, {"r": 0.1, "s": 0, "t": 0.5}),
     "key must be a jax.random.key for r=0.1, t=0.5, got None; pass deterministic=True for "
     "evaluation."),
    (ValueError, traced(lambda function, x: require_noise(function, None, None, False, {"r": x})),
     (0.5,),
     "key must be a jax.random.key for r (traced), got None; pass deterministic=True for "
     "evaluation."),
    (TypeError, require_key, (3,), "key must be a jax.random.key, got 3; pass jax.random.key(3)."),
    (TypeError, require_key, ("3",), "key must be a jax.random.key, got '3'."),
    (ValueError, require_key, (jax.random.split(KEY),),
     "key must be one jax.random.key, got shape (2,)."),
    (ValueError, require_noise, (None, np.zeros((2, 2), np.uint32), False),
     "key must be one jax.random.key, got shape (2, 2)."),
    (ValueError, require_first_step, (-1,), "first_step must be from 0 to 2**31 - 1, got -1."),
    (ValueError, require_first_step, (np.int64(2**31),),
     "first_step must be from 0 to 2**31 - 1, got 2147483648."),
    (TypeError, require_first_step, (1.0,), "first_step must be an integer, got 1.0."),
    (TypeError, require_first_step, (True,), "first_step must be an integer, got True."),
    (TypeError, require_first_step, (np.float32(1),),
     "first_step must be an integer, got np.float32(1.0)."),
    (TypeError, require_first_step, (np.array([1]),),
     "first_step must be an integer, got array([1])."),
    (ImportError, require_extra, ("missing_one",),
     "needs missing_one; install jaxgru[missing_one]."),
    (ImportError, require_extra, ("json", "json.missing"), "needs json; install jaxgru[json]."),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "check", "arguments", "message"), CHECKS)
def test_check_says_what_an_argument_must_be_and_what_came(kind, check, arguments, message):
    with pytest.raises(kind) as refused:
        check("f", *arguments)
    assert str(refused.value) == f"f: {message}"


def test_checks_let_good_arguments_pass():
    require_choice("f", "x", "b", ("a", "b"))
    require_count("f", "x", np.int32(1))
    require_count("f", "x", 0, least=0)
    require_float("f", "x", F32, np.float32)
    for name in ("float32", "bfloat16", "float16"):
        assert require_dtype("f", name) == jnp.dtype(name)
    assert [require_axis("f", axis, (2, 3, 4)) for axis in (0, 1, -3, -2)] == [0, 1, 0, 1]
    assert require_axis("f", 0, (2, 3)) == 0
    require_bool("f", "x", False)
    require_rate("f", "r", 0)
    require_rate("f", "r", 0.999)
    require_noise("f", None, KEY, False, {"r": 0.5})
    require_noise("f", None, None, True, {"r": 0.5})
    require_noise("f", None, None, False, {"r": 0, "s": 0.0, "t": jnp.float32(0)})
    require_noise("f", None, jax.random.PRNGKey(0), False, {"r": 0.5})
    for value in (0, 3, np.int32(2), jnp.int32(0)):
        require_first_step("f", value)
    traced(require_first_step)("f", -1)
    assert require_extra("f", "json", "json.decoder") is json
