"""`check_gradients` of this package's own derivative rules."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxgru.checks.gradients import check_gradients
from jaxgru.checks.report import GradientReport, GradientRow
from jaxgru.core.parameters import CHO_2014, CHUNG_2014, PYTORCH, GRUParams, GRUSpec
from jaxgru.core.recurrence import gru


def check_gru(
    params: GRUParams,
    xs: jax.Array,
    h0: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
    resets: jax.Array | None = None,
    specs: Sequence[GRUSpec] = (CHO_2014, CHUNG_2014, PYTORCH),
    reverses: Sequence[bool] = (False, True),
    policies: Sequence[Mapping[str, Any]] | None = None,
    gru_options: Mapping[str, Any] | None = None,
    **check_options: Any,
) -> GradientReport:
    """Runs `check_gradients` on `gru` over a grid of its options; autodiff is the reference.

    The grid is specs x reverses x policies. Differentiated are params, xs and h0.

    Args:
      params: of one layer.
      xs: [T, ..., I].
      h0: [..., H]; None for zeros.
      mask: [T, ...] bool or None.
      resets: [T, ...] bool or None.
      specs: the equations to check with these arrays, by default the three usual ones.
      reverses: directions to check.
      policies: dicts of gradient, residuals, chunk_size and unroll, as `gru` takes them; unless
        told, every residuals of "bptt", whole and in chunks of two steps, and "tangent".
      gru_options: what `gru` and its reference are both given, such as truncate, or zoneout,
        recurrent_dropout and their key.
      **check_options: dtypes, tolerances, num_cotangents, ... of `check_gradients`.

    Returns:
      One `GradientReport`; `case` in its rows says which point of the grid a row is of.

    Raises:
      ValueError, TypeError: as `gru` and `check_gradients`; ValueError for an empty grid.

    Cost: that of `check_gradients` for each point of the grid, mostly compilation: some seconds a
    point, so minutes for the default grid of 42.

    >>> import jax.numpy as jnp
    >>> params = GRUParams(jnp.ones((1, 3)), jnp.ones((1, 3)), spec=CHO_2014)
    >>> grid = {"specs": [CHO_2014], "reverses": [False], "policies": [{"residuals": "states"}]}
    >>> bool(check_gru(params, jnp.ones((2, 1)), **grid))
    True
    """
    policies = _POLICIES if policies is None else policies
    rows: list[GradientRow] = []
    for spec, reverse, policy in itertools.product(specs, reverses, policies):
        choices = {"mask": mask, "resets": resets, "reverse": reverse}
        choices |= gru_options or {}
        report = check_gradients(
            functools.partial(gru, **choices, **policy),
            functools.partial(gru, **choices, gradient="autodiff"),
            dataclasses.replace(params, spec=spec),
            xs,
            h0,
            **check_options,
        )
        words = [spec.reset, spec.update, spec.activation, *(["reverse"] if reverse else [])]
        case = " ".join([*words, *(f"{name}={value}" for name, value in policy.items())])
        rows += [dataclasses.replace(row, case=case) for row in report.rows]
    if not rows:
        raise ValueError("check_gru: specs, reverses and policies must not be empty.")
    return GradientReport(tuple(rows))


_POLICIES = (
    *({"residuals": residuals} for residuals in ("gates", "states", "boundaries")),
    *({"residuals": r, "chunk_size": 2} for r in ("gates", "states", "boundaries")),
    {"gradient": "tangent"},
)
