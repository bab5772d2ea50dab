"""The GRU itself: parameters, one step, its derivatives, and the recurrence over a sequence.

It imports no other part of jaxgru.
"""

from jaxgru.core.cell import gru_cell
from jaxgru.core.gradient import BPTT, Autodiff, Kernel, Tangent
from jaxgru.core.masks import length_mask, resets_from_dones
from jaxgru.core.noise import Noise
from jaxgru.core.parameters import CHO_2014, CHUNG_2014, PYTORCH, GRUParams, GRUSpec, init_gru
from jaxgru.core.recurrence import Tap, gru

__all__ = [
    "BPTT",
    "CHO_2014",
    "CHUNG_2014",
    "PYTORCH",
    "Autodiff",
    "GRUParams",
    "GRUSpec",
    "Kernel",
    "Noise",
    "Tangent",
    "Tap",
    "gru",
    "gru_cell",
    "init_gru",
    "length_mask",
    "resets_from_dones",
]
