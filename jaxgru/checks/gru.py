"""`check_gradients` of this package's own derivative rules."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import jax

from jaxgru.checks.gradients import check_gradients
from jaxgru.checks.report import GradientReport, GradientRow, as_sequence
from jaxgru.core import parameters
from jaxgru.core.checks import require_bool
from jaxgru.core.gradient import BPTT, Autodiff, Gradient, Tangent, as_rule
from jaxgru.core.noise import Noise, require_noise
from jaxgru.core.parameters import CHO_2014, CHUNG_2014, PYTORCH, GRUParams, GRUSpec
from jaxgru.core.recurrence import gru, require_inputs, require_state

_GRADIENTS = (
    *(BPTT(residuals=residuals) for residuals in ("gates", "states", "boundaries")),
    *(BPTT(residuals=residuals, chunk_size=2) for residuals in ("gates", "states", "boundaries")),
    Tangent(),
)


def check_gru(
    params: GRUParams, xs: jax.Array, h0: jax.Array | None = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None,
    specs: GRUSpec | Sequence[GRUSpec] = (CHO_2014, CHUNG_2014, PYTORCH),
    reverses: bool | Sequence[bool] = (False, True),
    gradients: Gradient | Sequence[Gradient] = _GRADIENTS,
    noise: Noise | None = None, deterministic: bool = False, key: jax.Array | None = None,
    dtypes: str | Sequence[str] = ("caller", "float64"), finite_differences: bool = True,
    num_cotangents: int = 3, num_coordinates: int = 8,
    tolerances: Mapping[str, float] | None = None,
) -> GradientReport:  # fmt: skip
    """Runs `check_gradients` on `gru` for every element of specs x reverses x gradients.

    The reference is autodiff of the plain recurrence. params, xs and h0 are differentiated.

    Args:
      params, xs, h0, mask, resets, noise, deterministic: as in `gru`.
      specs: the equations to check with these arrays, by default the three named ones. Here and
        below a value by itself is a sequence of one.
      reverses: the directions to check.
      gradients: values of the option `gradient` of `gru`; by default `BPTT` with every choice of
        residuals, for the whole sequence and in chunks of two steps, and `Tangent`.
      key: a `jax.random.key` of the noise, the cotangents and the coordinates;
        `jax.random.key(0)` by default.
      dtypes, finite_differences, num_cotangents, num_coordinates, tolerances: as in
        `check_gradients`.

    Returns:
      One `GradientReport`; `case` in its rows names the equation, the direction and the gradient.

    Raises:
      ValueError, TypeError: as `gru` and `check_gradients`; ValueError also if there is no case.

    Cost: that of `check_gradients` for each case, mostly compilation: some seconds each, so minutes
    for the 42 cases checked by default.

    >>> import jax.numpy as jnp
    >>> params = GRUParams(jnp.ones((1, 3)), jnp.ones((1, 3)), spec=CHO_2014)
    >>> grid = {"specs": CHO_2014, "reverses": False, "gradients": BPTT("states")}
    >>> bool(check_gru(params, jnp.ones((2, 1)), **grid))
    True
    """
    specs, reverses, gradients = map(as_sequence, (specs, reverses, gradients))
    for n, spec in enumerate(specs):
        parameters.require_spec("check_gru", spec, f"specs[{n}]")
    for n, reverse in enumerate(reverses):
        require_bool("check_gru", f"reverses[{n}]", reverse)
    sizes = parameters.require_params("check_gru", params)
    require_inputs("check_gru", params, xs, sizes[0], mask, resets, 0)
    require_state("check_gru", "h0", h0, (*xs.shape[1:-1], sizes[1]), params)
    key = jax.random.key(0) if key is None else key
    require_noise("check_gru", noise, key, deterministic)
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
        values = [(field, getattr(rule, field.name)) for field in dataclasses.fields(rule)]
        changed = [f"{field.name}={value}" for field, value in values if value != field.default]
        words = [spec.reset, spec.update, spec.activation, *(["reverse"] if reverse else [])]
        case = " ".join([*words, type(rule).__name__, *changed])
        rows += [dataclasses.replace(row, case=case) for row in report.rows]
    if not rows:
        raise ValueError("check_gru: specs, reverses and gradients must not be empty.")
    return GradientReport(tuple(rows))
