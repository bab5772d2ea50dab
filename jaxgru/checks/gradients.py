"""Checks of any handwritten derivative against autodiff and finite differences.

Every leaf is judged by its own size, so that a large gradient cannot hide an error in a small one,
and a non-finite number never counts as agreement.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru.checks import report
from jaxgru.checks.report import GradientReport, GradientRow, host, named_leaves, unravel

# float16 resolves 1e-3 and bfloat16 8e-3: 5e-3 and 2e-2 are both a few of those roundings.
_TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "float16": 5e-3, "bfloat16": 2e-2}
_TOLERANCES["finite-difference"] = 1e-6
_EPSILON = float(np.finfo(np.float64).eps)


def check_gradients(
    fn: Callable[..., Any], reference: Callable[..., Any], *args: Any,
    dtypes: str | Sequence[str] = ("caller", "float64"), finite_differences: bool = True,
    num_cotangents: int = 3, num_coordinates: int = 8,
    tolerances: Mapping[str, float] | None = None, key: jax.Array | None = None,
) -> GradientReport:  # fmt: skip
    """Compares the derivative rule of `fn` with autodiff and finite differences of `reference`.

    For each cotangent c and each floating leaf a of args, with v = max |dreference|:

        |dfn - dreference| <= tolerance * v,         df = (df / da)^T c
        |dfn[k] - <c, (4 q_k(s) - q_k(2s)) / 3>| <= tolerance * v + rounding,
        q_k(s) = (out(a + s e_k) - out(a - s e_k)) / 2s

    The second comparison is made in float64 only, at sampled coordinates k that include the largest
    entry; `rounding` bounds the quotient's error from rounding the outputs. A leaf with v = 0 is
    judged by its absolute error. Outputs are compared as well, those of a plain call and those of
    the forward rule; two runs of the rule must agree in every bit; and each gradient must have its
    argument's dtype, which `jax.custom_vjp` does not check. fn may return any pytree with floating
    leaves, because the cotangents have the form of its output.

    The cotangents are `random[i]`; `only[leaf]`, random in one output leaf and zero in the others;
    `one-hot[leaf][index]`, the first and the last entry of each output leaf; and `zero`, which must
    give gradients of exactly zero.

    Args:
      fn: function with the derivative rule under test.
      reference: plain function of the same signature and output, differentiated by JAX.
      *args: pytrees. Their floating leaves are differentiated; all others (integers, booleans,
        None, keys, static objects) are passed to both functions unchanged.
      dtypes: "caller" leaves the dtypes of args unchanged; the name of a floating dtype casts all
        floating leaves to it, "float64" in a local 64-bit mode. One name or several.
      num_cotangents: number of random cotangents, at least 1.
      finite_differences: whether to run the finite differences; they need "float64" in dtypes.
      num_coordinates: largest number of coordinates that they probe in a leaf, at least 1.
      tolerances: replaces defaults by name: that of a dtype, or "finite-difference". Arguments of
        several dtypes are judged by the largest of their tolerances.
      key: PRNG key of the random cotangents and coordinates, `jax.random.key(0)` by default.

    Returns:
      A `GradientReport` with rows for every dtype, cotangent and leaf; `print` shows the worst ones
      and explains them. An output of `fn` with another structure, shape or dtype than the
      reference's is a failure in it.

    Raises:
      TypeError: fn or reference is not callable, or args or the output have complex leaves or no
        floating ones.
      ValueError: an option has a value other than those above, or NaN or infinity in args makes the
        reference's output non-finite; where it reaches no output, as under a mask, it is legal.
      Exception: what `fn`, `reference` or JAX raises, as for gradients of a wrong shape.

    Cost: each function is compiled once for every dtype and runs once for every cotangent; finite
    differences run the reference 4 * num_coordinates times for every leaf.

    >>> import jax, jax.numpy as jnp
    >>> @jax.custom_vjp
    ... def sine(x):
    ...     return jnp.sin(x)
    >>> sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, dy: (dy * jnp.cos(x),))
    >>> bool(check_gradients(sine, jnp.sin, jnp.array([0.5, 1.0])))
    True
    """
    dtypes = report.as_sequence(dtypes)
    limits = _check_options(dtypes, finite_differences, num_cotangents, num_coordinates, tolerances)
    names, leaves, runs = _split(fn, reference, args)
    key = jax.random.key(0) if key is None else key
    seed = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
    own = "+".join(sorted({str(jnp.asarray(leaf).dtype) for leaf in leaves}))
    modes = {own if dtype == "caller" else jnp.dtype(dtype).name: dtype for dtype in dtypes}
    rows: list[GradientRow] = []
    for mode, dtype in modes.items():
        missing = [part for part in mode.split("+") if part not in limits]
        _require(not missing, f"tolerances must hold {missing}, got {list(limits)}")
        limit = max(limits[part] for part in mode.split("+"))
        with jax.enable_x64(True) if mode == "float64" else contextlib.nullcontext():
            with np.errstate(over="ignore"):  # `_check_finite` refuses infinity
                cast = [v if dtype == "caller" else np.asarray(v).astype(mode) for v in leaves]
            floats = list(map(jnp.asarray, cast))
            evaluate = jax.jit(runs[1])
            out = evaluate(floats)[1]
            cure = "return a floating array: nothing else has a derivative"
            _check_kinds("the reference's output", out, cure)
            _check_finite(mode, names, floats, out)
            template = GradientRow(mode, "primal", limit, "primal")
            found = report.compare(template, "out", jax.jit(runs[0])(floats)[1], out)
            rows += found
            if {"structure", "shape", "dtype"} & {row.reason for row in found}:
                continue  # no cotangent fits both
            pairs = list(_cotangents(out, num_cotangents, seed))
            found, gradients = _check_autodiff(runs, names, floats, template, out, pairs)
            rows += found
            if finite_differences and mode == "float64":
                limit = limits["finite-difference"]
                template = GradientRow(mode, "finite-difference", limit, "finite-difference")
                probe, sample = (evaluate, names, floats), (num_coordinates, seed)
                rows += _check_differences(*probe, template, pairs, gradients, *sample)
    return GradientReport(tuple(rows))


_is_floating = functools.partial(report.is_kind, kind=jnp.floating)


def _require(condition, message, error: type[Exception] = ValueError):
    if not condition:
        raise error(f"check_gradients: {message}.")


def _check_options(dtypes, finite_differences, num_cotangents, num_coordinates, tolerances):
    tolerances = dict(tolerances or {})
    _require(bool(dtypes), f"dtypes must name at least one dtype, got {dtypes!r}")
    named = {"dtypes": (dtypes, "caller"), "tolerances": (tolerances, "finite-difference")}
    for option, (names, other) in named.items():
        unknown = [name for name in names if name != other and not _is_floating_name(name)]
        need = f"{option} must be named by floating dtypes or {other!r}"
        _require(not unknown, f"{need}, got {unknown}")
    need = f"dtypes must hold 'float64' for finite differences, got {tuple(dtypes)}"
    found = not finite_differences or "float64" in dtypes
    _require(found, f"{need}; pass finite_differences=False to skip them")
    counts = {"num_cotangents": num_cotangents, "num_coordinates": num_coordinates}
    for name, count in counts.items():
        whole = isinstance(count, int) and count >= 1
        _require(whole, f"{name} must be an integer >= 1, got {count!r}")
    for name, value in tolerances.items():
        _require(0 < value < math.inf, f"tolerances[{name!r}] must be positive, got {value}")
    return {**_TOLERANCES, **tolerances}


def _is_floating_name(name):
    try:
        return isinstance(name, str) and bool(jnp.issubdtype(jnp.dtype(name), jnp.floating))
    except TypeError:
        return False


def _split(fn, reference, args):
    """Names and values of the floating leaves of args, and both functions of these values.

    The functions return the floating leaves of their output, and all of it.
    """
    for name, value in {"fn": fn, "reference": reference}.items():
        kind = type(value).__name__
        _require(callable(value), f"{name} must be callable, got {kind}", TypeError)
    cure = "cast integers to a floating dtype, or pass them beside a floating argument"
    _check_kinds("args", args, cure)
    try:
        named = inspect.signature(reference).bind(*args).arguments
    except (TypeError, ValueError):  # a built-in callable, or one that refuses these arguments
        named = {"args": args}
    pairs = [pair for name, arg in named.items() for pair in named_leaves(name, arg)]
    names, floats = zip(*((name, leaf) for name, leaf in pairs if _is_floating(leaf)))

    def run(function, floats):
        left = iter(floats)
        full = jax.tree.map(lambda leaf: next(left) if _is_floating(leaf) else leaf, args)
        out = function(*full)
        return list(filter(_is_floating, jax.tree.leaves(out))), out

    return names, floats, [functools.partial(run, each) for each in (fn, reference)]


def _check_kinds(subject, tree, cure):
    leaves = jax.tree.leaves(tree)
    found = any(map(_is_floating, leaves))
    if any(report.is_kind(leaf, jnp.complexfloating) for leaf in leaves):
        found, cure = False, "pass and return real and imaginary parts as two real arrays"
    kinds = [str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves]
    need = f"{subject} must hold real leaves, some of them floating, got {kinds}"
    _require(found, f"{need}; {cure}", TypeError)


def _check_finite(dtype, names, floats, out):
    """Refuses a non-finite argument if the output is non-finite as well."""
    # Compared with itself, a leaf disagrees where it is not finite.
    template = GradientRow(dtype, "primal", 0.0, "value")
    found = [
        f"{name}{list(row.index or ()) or ''} = {row.actual}"
        for name, leaf in zip(names, floats, strict=True)
        for row in report.compare_leaf(template, name, leaf, leaf)
        if not row.ok
    ]
    legal = not found or all(row.ok for row in report.compare(template, "out", out, out))
    need = "args must be finite where they reach the reference's output"
    cure = "replace them by finite numbers, or mask them inside both functions"
    _require(legal, f"{need}, got {', '.join(found)} in {dtype}; {cure}")


def _cotangents(out, count, seed) -> Iterator[tuple[str, list[np.ndarray]]]:
    named = [(name, leaf) for name, leaf in named_leaves("out", out) if _is_floating(leaf)]
    rng = np.random.default_rng(seed)
    zeros = [np.zeros(leaf.shape) for _, leaf in named]
    for number in range(count):
        yield f"random[{number}]", [rng.standard_normal(leaf.shape) for _, leaf in named]
    for i, (name, leaf) in enumerate(named):
        if len(named) > 1:
            yield f"only[{name}]", [*zeros[:i], rng.standard_normal(leaf.shape), *zeros[i + 1 :]]
        for flat in sorted({0, leaf.size - 1}) if leaf.size else ():
            index = unravel(flat, leaf.shape)
            one_hot = np.zeros(leaf.shape)
            one_hot[index] = 1.0
            yield f"one-hot[{name}]{list(index)}", [*zeros[:i], one_hot, *zeros[i + 1 :]]
    yield "zero", zeros


def _check_autodiff(runs, names, floats, template, out, pairs):
    """Rows, and for each cotangent the pair (gradients of fn, gradients of the reference)."""

    def pull(run, floats, cotangents):
        _, vjp, forward = jax.vjp(run, floats, has_aux=True)
        return forward, vjp(cotangents)[0]

    pulls = [jax.jit(functools.partial(pull, run)) for run in runs]
    outs = list(filter(_is_floating, jax.tree.leaves(out)))
    rows, gradients = [], []
    for name, values in pairs:
        # Cast on the host: jnp would follow strict promotion and the 64-bit mode.
        cast = [jnp.asarray(v.astype(o.dtype)) for v, o in zip(values, outs, strict=True)]
        (forward, actual), (_, expected) = (pull(floats, cast) for pull in pulls)
        if not gradients:
            first = dataclasses.replace(template, reference="forward")
            rows += report.compare(first, "out", forward, out)
            first = dataclasses.replace(template, reference="rerun", tolerance=0.0)
            for leaf, a, b in zip(names, actual, pulls[0](floats, cast)[1], strict=True):
                reason = "" if host(a).tobytes() == host(b).tobytes() else "rerun"
                row = report.compare_leaf(first, leaf, b, a)[-1]
                rows.append(dataclasses.replace(row, reason=reason))
        zero = not any(map(np.any, values))
        tolerance = 0.0 if zero else template.tolerance
        expected = [np.zeros_like(v) for v in floats] if zero else expected
        each = dataclasses.replace(
            template, reference="autodiff", reason="value", cotangent=name, tolerance=tolerance
        )
        for leaf, value, a, b in zip(names, floats, actual, expected, strict=True):
            rows += report.compare_leaf(each, leaf, a, host(b).astype(value.dtype))
        gradients.append(([host(a) for a in actual], [host(b) for b in expected]))
    return rows, gradients


def _check_differences(evaluate, names, floats, template, pairs, gradients, limit, seed):
    """Rows for gradients of fn at sampled coordinates against <cotangent, difference quotient>."""
    rows: list[GradientRow] = []
    rng = np.random.default_rng(seed)
    for leaf, name in enumerate(names):
        gradient = gradients[0][1][leaf]
        flats = np.flatnonzero(np.isfinite(host(floats[leaf])))  # not NaN under a mask
        if not flats.size:
            continue
        if flats.size > limit:
            largest = flats[np.argmax(np.abs(gradient.ravel()[flats]))]
            flats = np.union1d(rng.choice(flats, limit - 1, replace=False), [largest])
        probes = [_quotient(evaluate, floats, leaf, flat) for flat in flats]
        for (cotangent_name, cotangent), (actual, expected) in zip(pairs, gradients, strict=True):
            size = float(np.max(np.abs(expected[leaf])))
            rounding = max(_dot(map(np.abs, cotangent), noise) for _, noise in probes)
            tolerance = template.tolerance + rounding / (size or 1.0)
            each = dataclasses.replace(template, cotangent=cotangent_name, tolerance=tolerance)
            entries = actual[leaf].astype(np.float64).ravel()[flats]
            quotients = np.array([_dot(cotangent, quotient) for quotient, _ in probes])
            row = report.compare_leaf(each, name, entries, quotients, size)[-1]
            index = unravel(flats[row.index[0]], gradient.shape) if row.index else None
            rows.append(dataclasses.replace(row, index=index))
    return rows


def _quotient(evaluate, floats, leaf, flat):
    """The fourth-order central difference (4 q(s) - q(2s)) / 3 and its rounding error.

    q(s) = (out(a + s e) - out(a - s e)) / 2s with s = eps^(1/3) max(1, |a|).
    """
    value, ends, outs = np.array(floats[leaf]), [], []
    center, step = value.flat[flat], _EPSILON ** (1 / 3) * max(1.0, abs(value.flat[flat]))
    for offset in (step, -step, 2 * step, -2 * step):
        ends.append(center + offset)
        value.flat[flat] = ends[-1]
        moved = [*floats[:leaf], jnp.array(value), *floats[leaf + 1 :]]
        outs.append([host(out).astype(np.float64) for out in evaluate(moved)[0]])
    near, far = ends[0] - ends[1], ends[2] - ends[3]
    with np.errstate(all="ignore"):
        quotient = [(4 * ((a - b) / near) - (c - d) / far) / 3 for a, b, c, d in zip(*outs)]
        outs = [[8 * _EPSILON * abs(leaf) for leaf in out] for out in outs]  # eight ulps each
        rounding = [(4 * (a + b) / near + (c + d) / far) / 3 for a, b, c, d in zip(*outs)]
    return quotient, rounding


def _dot(left, right):
    with np.errstate(all="ignore"):
        return float(sum(np.sum(a * b) for a, b in zip(left, right, strict=True)))
