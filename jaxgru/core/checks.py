"""Checks of arguments, with messages "function: argument must be X, got Y; what to do instead".

They run at trace time, on types, shapes and dtypes, and on values that are not traced.
"""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxgru.core.matmul import state_dtype

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_P = ParamSpec("_P")
_R = TypeVar("_R")

# What to do instead of passing arguments of PyTorch, Keras, Flax, or other functions of jaxgru: the
# arguments, a parameter that the called function must have for the advice to hold, and the advice.
CURES = [
    (("batch_first", "time_major"), "axis", "arrays are time-major; pass axis=1 for [B, T, ...]"),
    (("batch_first", "time_major"), "input_size", "gru and gru_stack take axis=1 for [B, T, ...]"),
    (("lengths", "seq_lengths", "sequence_lengths"), "mask", "pass mask=length_mask(lengths, T)"),
    (("num_layers", "bidirectional"), None,
     "init_stack draws such layers, and gru_stack runs them"),
    (("use_bias",), "bias", "pass bias"),
    (("units", "features"), "hidden_size", "pass hidden_size"),
    (("input_size", "hidden_size", "features", "units", "bias", "use_bias", "layer_norm"), "params",
     "the parameters, which init_gru and init_stack draw, already have it"),
    (("spec", "activation", "reset_after"), "params",
     "the parameters hold their equation: init_gru(..., spec=PYTORCH), or "
     "dataclasses.replace(params, spec=...)"),
    (("activation", "reset_after"), "spec", "pass spec, such as PYTORCH"),
    (("dropout",), None, "gru_stack takes dropout between layers, and "
     "noise=Noise(recurrent_dropout=...) is the dropout of the state"),
    (("truncate", "unroll", "residuals", "chunk_size", "kernel"), None,
     "gru and gru_stack take it in gradient=BPTT(...)"),
    (("recurrent_dropout", "zoneout"), None,
     "gru and gru_stack take both rates in noise=Noise(...)"),
    (("rngs", "rng", "seed"), "key", "pass key=jax.random.key(...)"),
    (("training", "train"), "deterministic", "pass deterministic=True for evaluation"),
    (("initial_state", "initial_carry", "hx"), "h0", "pass h0"),
    (("initial_state", "initial_carry", "hx"), "h", "pass h"),
    (("return_sequences", "return_state", "return_carry"), "xs",
     "the last state and the outputs of all steps are always returned, (h_last, hs)"),
    (("input", "inputs"), "xs", "pass xs"),
    (("input", "inputs"), "x", "pass x"),
    (("go_backwards",), "reverse", "pass reverse=True"),
    (("merge_mode",), "merge", "pass merge"),
    (("stateful",), "h0", "pass the h_last of one call as the h0 of the next"),
]  # fmt: skip


def explain_unknown_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function; an unknown argument raises a TypeError that says what to pass instead."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name in known:
                continue
            close = difflib.get_close_matches(name, known, 1)
            guess = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}."
            cures = (
                f"{cure}."
                for names, parameter, cure in CURES
                if name in names and (parameter is None or parameter in known)
            )
            raise TypeError(
                f"{function.__name__}: got an unexpected argument {name!r}; {next(cures, guess)}"
            )
        return function(*args, **kwargs)

    return checked


def require_flags(
    function: str, flags: dict[str, Any], shape: tuple[int, ...] | None = None,
    meaning: str = "xs without its last axis",
) -> None:  # fmt: skip
    """TypeError unless each is None or a bool array, ValueError unless it has that shape."""
    for name, value in flags.items():
        if value is None:
            continue
        if getattr(value, "dtype", None) != jnp.bool_:
            found = getattr(value, "dtype", type(value).__name__)
            cure = "length_mask makes one from lengths" if name == "mask" else "cast it to bool"
            raise TypeError(f"{function}: {name} must be a bool array, got {found}; {cure}.")
        if shape is not None:
            swapped = value.ndim > 1 and (value.shape[1], value.shape[0], *value.shape[2:]) == shape
            cure = "; time and batch are swapped" if swapped else ""
            require_shape(function, name, value, shape, meaning, cure)


def require_shape(
    function: str, argument: str, value: Any, shape: tuple[int, ...], meaning: str, cure: str = ""
) -> None:
    """ValueError unless the array has that shape; meaning and cure go into the message."""
    if value.shape != shape:
        raise ValueError(
            f"{function}: {argument} must have shape {shape} ({meaning}), got {value.shape}{cure}."
        )


def require_choice(
    function: str, argument: str, value: Any, choices: tuple[str, ...], cure: str = ""
) -> None:
    """ValueError unless value is one of the choices."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{function}: {argument} must be one of {listed}, got {value!r}{cure}.")


def require_count(function: str, argument: str, value: Any, least: int = 1) -> None:
    """TypeError unless value is an integer, ValueError unless it is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{function}: {argument} must be an integer, got {_static(value)}.")
    if value < least:
        raise ValueError(f"{function}: {argument} must be at least {least}, got {value}.")


def require_float(
    function: str, argument: str, value: Any, dtype: Any = None, cure: str = "cast it first", *,
    wide: bool = False,
) -> None:  # fmt: skip
    """TypeError unless value is a floating array, of the given dtype where one is given.

    wide: the dtype may also be the state dtype, which is float32 for half types.
    """
    if not isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        found = found_kind(value, "; convert it with jnp.asarray")
        raise TypeError(f"{function}: {argument} must be an array, got {found}.")
    found = value.dtype
    if not jnp.issubdtype(found, jnp.floating):
        raise TypeError(
            f"{function}: {argument} must be a floating array, got dtype {found}; {cure}."
        )
    require_dtype(function, found, argument)
    if dtype is None or found == dtype or (wide and found == state_dtype(dtype)):
        return
    other = " or float32," if wide and state_dtype(dtype) != dtype else ""
    raise TypeError(
        f"{function}: {argument} must have the dtype of the parameters, {jnp.dtype(dtype)},{other} "
        f"got {found}; cast one of them."
    )


def require_dtype(function: str, dtype: Any, argument: str = "") -> Any:
    """The dtype; TypeError unless jaxgru supports it and JAX has it enabled."""
    subject = f"the dtype of {argument}" if argument else "dtype"
    found = jnp.dtype(dtype)
    if found.name not in _DTYPES:
        raise TypeError(f"{function}: {subject} must be one of {', '.join(_DTYPES)}, got {found}.")
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise TypeError(
            f"{function}: {subject} must be enabled, got {found}; "
            "set jax.config.update('jax_enable_x64', True) or cast to float32."
        )
    return found


def require_axis(function: str, axis: Any, shape: tuple[int, ...]) -> int:
    """The axis of time as a non-negative integer; raises if it is the last axis or out of range."""
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise TypeError(f"{function}: axis must be an integer, got {_static(axis)}.")
    if not -len(shape) <= axis < len(shape) - 1 or axis == -1:
        raise ValueError(
            f"{function}: axis must name an axis of xs other than its last, got {axis} for shape "
            f"{shape}."
        )
    return int(axis) % len(shape)


def require_bool(function: str, argument: str, value: Any) -> None:
    """TypeError unless value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {argument} must be a bool, got {_static(value)}.")


def require_rate(function: str, argument: str, rate: Any) -> Any:
    """The rate, as a Python number or a scalar JAX array.

    TypeError unless it is one of these or NumPy's, ValueError unless it is in [0, 1) or traced.
    """
    if isinstance(rate, np.generic | np.ndarray) and rate.shape == ():
        rate = rate.item()
    if isinstance(rate, jax.Array):
        is_rate = rate.shape == () and jnp.issubdtype(rate.dtype, jnp.floating)
        found = f"shape {rate.shape} and dtype {rate.dtype}"
    else:
        is_rate = isinstance(rate, int | float) and not isinstance(rate, bool)
        found = repr(rate)
    if not is_rate:
        raise TypeError(
            f"{function}: {argument} must be a Python float or a floating scalar array, got "
            f"{found}."
        )
    if not is_traced(rate) and not 0 <= float(rate) < 1:
        raise ValueError(f"{function}: {argument} must be in [0, 1), got {rate}.")
    return rate


def show_rate(argument: str, rate: Any) -> str:
    """The text argument=rate for messages; without the value if that is traced."""
    return f"{argument} (traced)" if is_traced(rate) else f"{argument}={rate}"


def require_key(function: str, key: Any) -> None:
    """TypeError or ValueError unless key is a single `jax.random.key`."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and dtype != jnp.uint32:
        cure = f"; pass jax.random.key({key})" if isinstance(key, int) else ""
        raise TypeError(f"{function}: key must be a jax.random.key, got {key!r}{cure}.")
    if key.ndim != (0 if typed else 1):
        raise ValueError(f"{function}: key must be one jax.random.key, got shape {key.shape}.")


def require_first_step(function: str, value: Any) -> None:
    """TypeError unless value is an integer or a scalar integer array, ValueError if negative."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    whole = isinstance(value, int) if dtype is None else jnp.issubdtype(dtype, jnp.integer)
    if isinstance(value, bool) or not whole or shape != ():
        raise TypeError(f"{function}: first_step must be an integer, got {value!r}.")
    if not is_traced(value) and not 0 <= int(value) < 2**31:
        raise ValueError(f"{function}: first_step must be from 0 to 2**31 - 1, got {value}.")


def found_kind(value: Any, cure: str = "") -> str:
    """The type of value and the advice; finds Flax nnx types by name, without importing Flax."""
    kind = type(value)
    wrappers = {base.__name__ for base in kind.__mro__ if base.__module__.startswith("flax.nnx")}
    if "Variable" in wrappers:
        cure = "; unwrap it, or a whole tree of them, with nnx.as_pure"
    elif "State" in wrappers:
        cure = "; merge it with nnx.merge, and unwrap the parameters of the module with nnx.as_pure"
    prefix = "nnx." if kind.__module__.startswith("flax.nnx") else ""
    return f"{prefix}{kind.__name__}{cure}"


def is_traced(value: Any) -> bool:
    """True if the value is a tracer, whose value cannot be read or checked."""
    return isinstance(value, Tracer)


def _static(value):
    """The text for a value that must be static; says what to do if it is traced."""
    traced = "a traced value; inside jit, make it a static argument"
    return traced if is_traced(value) else repr(value)
