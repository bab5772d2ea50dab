"""Cross-checks of any hand-written derivative against autodiff and finite differences.

`check_gradients` judges a function with its own derivative rule by three witnesses: autodiff of a
plain reference, central differences of that reference, and a rerun of the rule itself. Every leaf
is judged by its own size, so a small gradient cannot hide behind a large one, and a non-finite
number never counts as agreement.

`check_gru` runs it over this package's own rules.
"""

import contextlib
import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru.checks.report import (
    GradientReport,
    GradientRow,
    compare,
    compare_leaf,
    host,
    is_kind,
    named_leaves,
    non_finite_entries,
    rerun_row,
    unravel,
)

# float16 resolves 1e-3 and bfloat16 8e-3: 5e-3 and 2e-2 are both a few of those roundings.
_TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "float16": 5e-3, "bfloat16": 2e-2}
_TOLERANCES["finite-difference"] = 1e-6
_EPSILON = float(np.finfo(np.float64).eps)


def check_gradients(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    *args: Any,
    dtypes: Sequence[str] = ("caller", "float64"),
    finite_differences: bool = True,
    num_cotangents: int = 3,
    num_coordinates: int = 8,
    cotangents: Mapping[str, Any] | None = None,
    tolerances: Mapping[str, float] | None = None,
    key: jax.Array | None = None,
) -> GradientReport:
    """Compares the derivative rule of `fn` with autodiff and finite differences of `reference`.

    For each cotangent c and each floating leaf a of args, with v = max |dreference|:

        |dfn - dreference| <= tolerance * v,         df = (df / da)^T c
        |dfn[k] - <c, (4 q_k(s) - q_k(2s)) / 3>| <= tolerance * v + rounding,
        q_k(s) = (out(a + s e_k) - out(a - s e_k)) / 2s

    The second runs in float64 only, on a sample of coordinates k which holds the largest one;
    rounding is what float64 outputs of that size leave undecided in the quotient. A leaf with v = 0
    is judged by its absolute error. Outputs are compared as well, both those of a plain call and
    those of the forward rule; the rule must give the same bits twice; and each gradient must have
    its argument's dtype, which `jax.custom_vjp` does not check. fn need not be a scalar loss: any
    pytree with floating leaves will do, since the cotangents below are of its output's form.

    The cotangents are `random[i]`; `only[leaf]`, random in one output leaf and zero in the others;
    `one-hot[leaf][index]`, the first and the last entry of each output leaf; `zero`, which must
    give gradients of exactly zero; and the caller's own.

    Args:
      fn: function with the derivative rule under test.
      reference: plain function of the same signature and output, differentiated by JAX.
      *args: pytrees; their floating leaves are differentiated, everything else (integers, booleans,
        None, keys, static objects) reaches both functions unchanged.
      dtypes: "caller" keeps the dtypes of args, any other floating dtype's name casts all floating
        leaves to it; "float64" does so under a local 64-bit mode and leaves the process's own be.
      finite_differences: whether to run the finite differences; they need "float64" in dtypes.
      num_cotangents: number of random cotangents, at least 1.
      num_coordinates: most coordinates per leaf that finite differences probe, at least 1.
      cotangents: further cotangents by name, each a pytree like the output; what stands at
        leaves that are not floating is ignored.
      tolerances: replaces defaults by name: a dtype's, or "finite-difference". Arguments of several
        dtypes are judged by the loosest of theirs.
      key: PRNG key of the random cotangents and coordinates, `jax.random.key(0)` by default.

    Returns:
      A `GradientReport`, which holds a row per dtype, cotangent and leaf. An output of `fn` with
      another structure, shape or dtype than the reference's is a failure in it.

    Raises:
      TypeError: fn or reference is not callable, or args or the output have complex
        leaves or no floating ones.
      ValueError: an option is outside of what is listed above, or NaN or infinity in args makes the
        reference's output non-finite; where it reaches no output, as under a mask, it is legal.
      Exception: whatever `fn`, `reference` or JAX raises while they are differentiated, such as
        JAX's refusal of a rule that returns gradients of a wrong shape.

    Cost: each function is compiled once per dtype and run once per cotangent (`fn` once more for
    the rerun); finite differences add 4 * num_coordinates runs of the reference per leaf.

    >>> import jax, jax.numpy as jnp
    >>> @jax.custom_vjp
    ... def sine(x):
    ...     return jnp.sin(x)
    >>> sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, dy: (dy * jnp.cos(x),))
    >>> bool(check_gradients(sine, jnp.sin, jnp.array([0.5, 1.0])))
    True
    """
    limits = _check_options(dtypes, finite_differences, num_cotangents, num_coordinates, tolerances)
    problem = _split(fn, reference, args)
    key = jax.random.key(0) if key is None else key
    seed = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
    modes = {_mode_name(problem.floats, dtype): dtype for dtype in dtypes}
    rows: list[GradientRow] = []
    for name, dtype in modes.items():
        missing = [part for part in name.split("+") if part not in limits]
        _require(not missing, ValueError, f"tolerances must hold {missing}, got {list(limits)}")
        limit = max(limits[part] for part in name.split("+"))
        with _enable_x64() if name == "float64" else contextlib.nullcontext():
            mode = problem._replace(floats=_cast(problem.floats, dtype))
            evaluate = jax.jit(_bind(mode, reference))
            out = evaluate(mode.floats)[1]
            _check_kinds("the reference's output", out)
            _check_finite(name, mode, out)
            template = GradientRow(name, "autodiff", limit, "value")
            primal = jax.jit(_bind(mode, fn))(mode.floats)[1]
            found = compare(GradientRow(name, "primal", limit, "primal"), "out", primal, out)
            rows += found
            if {"structure", "shape", "dtype"} & {row.reason for row in found}:
                continue  # there is no cotangent that fits both
            pairs = [*_cotangents(out, num_cotangents, seed), *_extra(out, cotangents or {})]
            found, gradients = _check_autodiff(mode, fn, reference, template, out, pairs)
            rows += found
            if finite_differences and name == "float64":
                limit = limits["finite-difference"]
                template = GradientRow(name, "finite-difference", limit, "finite-difference")
                sample = (num_coordinates, seed)
                rows += _check_differences(mode, evaluate, template, pairs, gradients, *sample)
    return GradientReport(tuple(rows))


class _Problem(NamedTuple):
    """Arguments taken apart: floating leaves with names, and what is around them."""

    floats: list[Any]
    names: list[str]
    rebuild: Callable[[list[Any]], Any]  # floats -> args


def _require(condition: bool, error: type[Exception], message: str) -> None:
    if not condition:
        raise error(f"check_gradients: {message}.")


def _check_options(dtypes, finite_differences, num_cotangents, num_coordinates, tolerances):
    tolerances = dict(tolerances or {})
    _require(bool(dtypes), ValueError, f"dtypes must name at least one dtype, got {dtypes!r}")
    for option, names, other in (
        ("dtypes", dtypes, "caller"),
        ("tolerances", tolerances, "finite-difference"),
    ):
        unknown = [name for name in names if name != other and not _is_floating_name(name)]
        need = f"{option} must be named by floating dtypes or {other!r}"
        _require(not unknown, ValueError, f"{need}, got {unknown}")
    need = "dtypes must hold 'float64' for finite differences"
    cure = "pass finite_differences=False to go without"
    found = not finite_differences or "float64" in dtypes
    _require(found, ValueError, f"{need}, got {tuple(dtypes)}; {cure}")
    counts = {"num_cotangents": num_cotangents, "num_coordinates": num_coordinates}
    for name, count in counts.items():
        valid = isinstance(count, int) and count >= 1
        _require(valid, ValueError, f"{name} must be an integer >= 1, got {count!r}")
    for name, value in tolerances.items():
        valid = 0.0 < value < math.inf
        _require(valid, ValueError, f"tolerances[{name!r}] must be positive, got {value}")
    return {**_TOLERANCES, **tolerances}


def _is_floating_name(name: Any) -> bool:
    try:
        return isinstance(name, str) and bool(jnp.issubdtype(jnp.dtype(name), jnp.floating))
    except TypeError:
        return False


def _enable_x64() -> contextlib.AbstractContextManager[Any]:
    # Older JAX has it in jax.experimental only; the newer object refuses bool(), hence hasattr.
    owner = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
    return vars(owner)["enable_x64"](True)


def _split(fn: Any, reference: Any, args: tuple[Any, ...]) -> _Problem:
    for name, value in {"fn": fn, "reference": reference}.items():
        kind = type(value).__name__
        _require(callable(value), TypeError, f"{name} must be callable, got {kind}")
    _check_kinds("args", args)
    arguments = _argument_names(reference, len(args))
    with_paths, structure = jax.tree_util.tree_flatten_with_path(args)
    names = [arguments[path[0].idx] + jax.tree_util.keystr(path[1:]) for path, _ in with_paths]
    leaves = [leaf for _, leaf in with_paths]
    where = [i for i, leaf in enumerate(leaves) if is_kind(leaf, jnp.floating)]

    def rebuild(floats: list[Any]) -> Any:
        replaced = dict(zip(where, floats, strict=True))
        merged = [replaced.get(i, leaf) for i, leaf in enumerate(leaves)]
        return jax.tree_util.tree_unflatten(structure, merged)

    return _Problem([leaves[i] for i in where], [names[i] for i in where], rebuild)


def _argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some built-in callables have no signature
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds][:count]
    return names + [f"args[{position}]" for position in range(len(names), count)]


def _cast(leaves: Iterable[Any], dtype: str) -> list[Any]:
    if dtype == "caller":
        return [jnp.asarray(leaf) for leaf in leaves]
    with np.errstate(over="ignore"):  # infinity is judged where the functions get it
        return [jnp.asarray(np.asarray(leaf).astype(jnp.dtype(dtype))) for leaf in leaves]


def _mode_name(floats: list[Any], dtype: str) -> str:
    if dtype != "caller":
        return jnp.dtype(dtype).name
    return "+".join(sorted({str(leaf.dtype) for leaf in _cast(floats, dtype)}))


def _bind(problem: _Problem, fn: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """floats -> (floating output leaves, whole output)."""

    def bound(floats: list[Any]) -> tuple[list[Any], Any]:
        out = fn(*problem.rebuild(floats))
        return [leaf for leaf in jax.tree.leaves(out) if is_kind(leaf, jnp.floating)], out

    return bound


def _pull(problem: _Problem, fn: Callable[..., Any]) -> Callable[..., Any]:
    """(floats, cotangents) -> (output of the forward rule, gradients), compiled."""

    def pull(floats: list[Any], cotangents: list[Any]) -> tuple[Any, list[Any]]:
        _, vjp, forward = jax.vjp(_bind(problem, fn), floats, has_aux=True)
        return forward, vjp(cotangents)[0]

    return jax.jit(pull)


_CURES = {
    "args": "cast integers to a floating dtype, or pass them beside a floating argument",
    "the reference's output": "return a floating array: nothing else has a derivative",
    "complex": "pass and return real and imaginary parts as two real arrays",
}


def _check_kinds(subject: str, tree: Any) -> None:
    leaves = jax.tree.leaves(tree)
    real = not any(is_kind(leaf, jnp.complexfloating) for leaf in leaves)
    floating = any(is_kind(leaf, jnp.floating) for leaf in leaves)
    kinds = [str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves]
    need = f"{subject} must hold real leaves, some of them floating"
    cure = _CURES[subject if real else "complex"]
    _require(real and floating, TypeError, f"{need}, got {kinds}; {cure}")


def _check_finite(dtype: str, mode: _Problem, out: Any) -> None:
    """A non-finite argument is refused where the output is non-finite as well."""
    entries = non_finite_entries(zip(mode.names, mode.floats, strict=True))
    reached = entries and non_finite_entries(named_leaves("out", out))
    need = "args must be finite where they reach the reference's output"
    cure = "replace them by finite numbers, or mask them inside both functions"
    _require(not reached, ValueError, f"{need}, got {', '.join(entries)} in {dtype}; {cure}")


def _cotangents(out, count, seed) -> Iterator[tuple[str, list[np.ndarray]]]:
    named = [(name, leaf) for name, leaf in named_leaves("out", out) if is_kind(leaf, jnp.floating)]
    rng = np.random.default_rng(seed)
    zeros = [np.zeros(leaf.shape) for _, leaf in named]
    for number in range(count):
        yield f"random[{number}]", [rng.standard_normal(leaf.shape) for _, leaf in named]
    for i, (name, leaf) in enumerate(named):
        if len(named) > 1:
            only = rng.standard_normal(leaf.shape)
            yield f"only[{name}]", [*zeros[:i], only, *zeros[i + 1 :]]
        for flat in sorted({0, leaf.size - 1}) if leaf.size else ():
            index = unravel(flat, leaf.shape)
            one_hot = np.zeros(leaf.shape)
            one_hot[index] = 1.0
            yield f"one-hot[{name}]{list(index)}", [*zeros[:i], one_hot, *zeros[i + 1 :]]
    yield "zero", zeros


def _extra(out, cotangents: Mapping[str, Any]) -> Iterator[tuple[str, list[np.ndarray]]]:
    for name, tree in cotangents.items():
        shapes = [jax.tree.map(np.shape, each) for each in (tree, out)]
        need = f"cotangents[{name!r}] must have the output's structure and shapes {shapes[1]}"
        _require(shapes[0] == shapes[1], ValueError, f"{need}, got {shapes[0]}")
        pairs = [(a, b) for _, a, b in named_leaves("", tree, out) if is_kind(b, jnp.floating)]
        yield name, [np.asarray(a).astype(np.float64) for a, _ in pairs]


def _check_autodiff(mode, fn, reference, template, out, pairs) -> tuple[list[GradientRow], list]:
    """Rows, and per cotangent the pair (gradients of fn, gradients of the reference)."""
    pulls = _pull(mode, fn), _pull(mode, reference)
    outs = [leaf for leaf in jax.tree.leaves(out) if is_kind(leaf, jnp.floating)]
    rows, gradients = [], []
    for name, values in pairs:
        # Cast on the host: jnp would take part in strict promotion and in the 64-bit mode.
        cast = [jnp.asarray(v.astype(o.dtype)) for v, o in zip(values, outs, strict=True)]
        (forward, actual), (_, expected) = (pull(mode.floats, cast) for pull in pulls)
        if not gradients:
            again = pulls[0](mode.floats, cast)[1]
            first = dataclasses.replace(template, witness="forward", reason="primal")
            rows += compare(first, "out", forward, out)
            rows += map(rerun_row, [template] * len(again), mode.names, actual, again)
        zero = not any(map(np.any, values))
        tolerance = 0.0 if zero else template.tolerance
        expected = [np.zeros_like(v) for v in mode.floats] if zero else expected
        each = dataclasses.replace(template, cotangent=name, tolerance=tolerance)
        for leaf, value, a, b in zip(mode.names, mode.floats, actual, expected, strict=True):
            rows += compare_leaf(each, leaf, a, host(b).astype(value.dtype))
        gradients.append(([host(a) for a in actual], [host(b) for b in expected]))
    return rows, gradients


def _check_differences(mode, evaluate, template, pairs, gradients, limit, seed):
    """Rows for gradients of fn at sampled coordinates against <cotangent, difference quotient>."""
    rows: list[GradientRow] = []
    rng = np.random.default_rng(seed)
    for leaf, name in enumerate(mode.names):
        gradient = gradients[0][1][leaf]
        flats = np.flatnonzero(np.isfinite(host(mode.floats[leaf])))  # NaN under a mask has none
        if flats.size > limit:
            largest = flats[np.argmax(np.abs(gradient.ravel()[flats]))]
            flats = np.union1d(rng.choice(flats, limit - 1, replace=False), [largest])
        probes = [_quotient(evaluate, mode.floats, leaf, flat) for flat in flats]
        for (cotangent_name, cotangent), (actual, expected) in zip(pairs, gradients, strict=True):
            if not probes:
                continue
            size = float(np.max(np.abs(expected[leaf])))
            rounding = max(_dot(map(np.abs, cotangent), noise) for _, noise in probes)
            tolerance = template.tolerance + rounding / (size or 1.0)
            each = dataclasses.replace(template, cotangent=cotangent_name, tolerance=tolerance)
            entries = actual[leaf].astype(np.float64).ravel()[flats]
            quotients = np.array([_dot(cotangent, quotient) for quotient, _ in probes])
            row = compare_leaf(each, name, entries, quotients, size)[-1]
            index = unravel(flats[row.index[0]], gradient.shape) if row.index else None
            rows.append(dataclasses.replace(row, index=index))
    return rows


def _quotient(evaluate, floats, leaf, flat) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The fourth-order central difference (4 q(s) - q(2s)) / 3 and its rounding error.

    q(s) = (out(a + s e) - out(a - s e)) / 2s with s = eps^(1/3) max(1, |a|).
    """
    value = np.array(floats[leaf])
    center, step = value.flat[flat], _EPSILON ** (1 / 3) * max(1.0, abs(value.flat[flat]))
    quotients, noises = [], []
    for size in (step, 2 * step):
        ends, outs = (center + size, center - size), []
        for end in ends:
            value.flat[flat] = end
            moved = [*floats[:leaf], jnp.array(value), *floats[leaf + 1 :]]
            outs.append([host(out).astype(np.float64) for out in evaluate(moved)[0]])
        width, both = ends[0] - ends[1], list(zip(*outs, strict=True))
        with np.errstate(all="ignore"):
            quotients.append([(above - below) / width for above, below in both])
            # Eight ulps of either output may well be lost in evaluating it.
            noises.append([8 * _EPSILON * (abs(x) + abs(y)) / width for x, y in both])
    with np.errstate(all="ignore"):
        quotient = [(4 * near - far) / 3 for near, far in zip(*quotients, strict=True)]
        noise = [(4 * near + far) / 3 for near, far in zip(*noises, strict=True)]
    return quotient, noise


def _dot(left: Iterable[np.ndarray], right: Iterable[np.ndarray]) -> float:
    with np.errstate(all="ignore"):
        return float(sum(np.sum(a * b) for a, b in zip(left, right, strict=True)))
