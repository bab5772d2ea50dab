"""`check_gradients` of this package's own derivative rules."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import jax

from jaxgru.checks.gradients import check_gradients
from jaxgru.checks.report import GradientReport, GradientRow
from jaxgru.core.gradient import BPTT, Autodiff, Gradient, Tangent, as_rule
from jaxgru.core.noise import Noise
from jaxgru.core.parameters import CHO_2014, CHUNG_2014, PYTORCH, GRUParams, GRUSpec
from jaxgru.core.recurrence import gru

_GRADIENTS = (
    *(BPTT(residuals=residuals) for residuals in ("gates", "states", "boundaries")),
    *(BPTT(residuals=residuals, chunk_size=2) for residuals in ("gates", "states", "boundaries")),
    Tangent(),
)


def check_gru(
    params: GRUParams,
    xs: jax.Array,
    h0: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
    resets: jax.Array | None = None,
    specs: Sequence[GRUSpec] = (CHO_2014, CHUNG_2014, PYTORCH),
    reverses: Sequence[bool] = (False, True),
    gradients: Sequence[Gradient] = _GRADIENTS,
    noise: Noise | None = None,
    deterministic: bool = False,
    key: jax.Array | None = None,
    dtypes: Sequence[str] = ("caller", "float64"),
    finite_differences: bool = True,
    num_cotangents: int = 3,
    num_coordinates: int = 8,
    tolerances: Mapping[str, float] | None = None,
) -> GradientReport:
    """Runs `check_gradients` on `gru` over a grid of its options; autodiff is the reference.

    The grid is specs x reverses x gradients. Differentiated are params, xs and h0.

    Args:
      params: of one layer.
      xs: [T, ..., I].
      h0: [..., H]; None for zeros.
      mask: [T, ...] bool or None.
      resets: [T, ...] bool or None.
      specs: the equations to check with these arrays, by default the three usual ones.
      reverses: the directions to check.
      gradients: what `gru` takes as `gradient`; by default every residuals of `BPTT`, whole and in
        chunks of two steps, and `Tangent`.
      noise: as in `gru`, for the function and its reference.
      deterministic: as in `gru`.
      key: a `jax.random.key` of the noise, the cotangents and the coordinates;
        `jax.random.key(0)` by default.
      dtypes: as in `check_gradients`, and so are the following.
      finite_differences: whether to compare with finite differences.
      num_cotangents: the number of random cotangents.
      num_coordinates: the most coordinates a leaf that finite differences examine.
      tolerances: by dtype.

    Returns:
      One `GradientReport`; `case` in its rows names the point of the grid.

    Raises:
      ValueError, TypeError: as `gru` and `check_gradients`; ValueError for an empty grid.

    Cost: that of `check_gradients` for each point of the grid, mostly compilation: some seconds a
    point, so minutes for the default grid of 42.

    >>> import jax.numpy as jnp
    >>> params = GRUParams(jnp.ones((1, 3)), jnp.ones((1, 3)), spec=CHO_2014)
    >>> grid = {"specs": [CHO_2014], "reverses": [False], "gradients": [BPTT("states")]}
    >>> bool(check_gru(params, jnp.ones((2, 1)), **grid))
    True
    """
    key = jax.random.key(0) if key is None else key
    options = {"mask": mask, "resets": resets, "noise": noise, "deterministic": deterministic}
    options["key"] = None if noise is None else key
    rows: list[GradientRow] = []
    for spec, reverse, gradient in itertools.product(specs, reverses, gradients):
        rule = as_rule("check_gru", gradient)
        run = functools.partial(gru, reverse=reverse, **options)
        report = check_gradients(
            functools.partial(run, gradient=rule),
            functools.partial(run, gradient=Autodiff(truncate=rule.truncate)),
            dataclasses.replace(params, spec=spec), xs, h0,
            dtypes=dtypes, finite_differences=finite_differences, num_cotangents=num_cotangents,
            num_coordinates=num_coordinates, tolerances=tolerances, key=key,
        )  # fmt: skip
        words = [spec.reset, spec.update, spec.activation, *(["reverse"] if reverse else [])]
        case = " ".join([*words, _describe(rule)])
        rows += [dataclasses.replace(row, case=case) for row in report.rows]
    if not rows:
        raise ValueError("check_gru: specs, reverses and gradients must not be empty.")
    return GradientReport(tuple(rows))


def _describe(rule):
    """The rule in words, with the options that are not the defaults."""
    fields = {f.name: (f.default, getattr(rule, f.name)) for f in dataclasses.fields(rule)}
    chosen = [f"{name}={value}" for name, (default, value) in fields.items() if value != default]
    return " ".join([type(rule).__name__, *chosen])
