"""Checks of arguments, in one form: function, argument, what it must be, what came, the cure.

They run when a function is traced, on static facts only: kinds, shapes and dtypes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

_DTYPES = ("float64", "float32", "bfloat16", "float16")


def require_choice(function: str, argument: str, value: Any, choices: tuple[str, ...]) -> None:
    """ValueError unless value is one of the choices."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{function}: {argument} must be one of {listed}, got {value!r}.")


def require_count(function: str, argument: str, value: Any) -> None:
    """TypeError unless value is an integer, ValueError unless it is at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{function}: {argument} must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"{function}: {argument} must be at least 1, got {value}.")


def require_float(function: str, argument: str, value: Any, dtype: Any = None) -> None:
    """TypeError unless value is a floating array, of the given dtype where one is given."""
    found = getattr(value, "dtype", None)
    if found is None or not hasattr(value, "shape"):
        raise TypeError(
            f"{function}: {argument} must be an array, got {type(value).__name__}; "
            "convert it with jnp.asarray."
        )
    if not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"{function}: {argument} must be a floating array, got dtype {found}.")
    require_dtype(function, found, argument)
    if dtype is not None and found != dtype:
        raise TypeError(
            f"{function}: {argument} must have the dtype of params.w_x, {jnp.dtype(dtype)}, "
            f"got {found}; cast one of them."
        )


def require_dtype(function: str, dtype: Any, argument: str = "") -> Any:
    """The dtype, or TypeError unless it is one that the package computes in and JAX has enabled."""
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


def is_traced(value: Any) -> bool:
    """True inside a transformation, where a value cannot be read and so not be checked."""
    return isinstance(value, Tracer)
