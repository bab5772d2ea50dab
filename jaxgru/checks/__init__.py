"""Checks of handwritten derivatives against autodiff and finite differences."""

from jaxgru.checks.gradients import check_gradients
from jaxgru.checks.gru import check_gru
from jaxgru.checks.mutation import MutantReport, MutantRow, check_mutants
from jaxgru.checks.report import GradientReport, GradientRow

__all__ = [
    "GradientReport", "GradientRow", "MutantReport", "MutantRow", "check_gradients", "check_gru",
    "check_mutants",
]  # fmt: skip
