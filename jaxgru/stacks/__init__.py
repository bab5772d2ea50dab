"""Layers around the recurrence: both directions, stacks, dropout between layers, and streams.

A layer is a `GRUParams`, or a `Bidirectional` of two; a stack is a tuple of layers. A state has the
form of the parameters it belongs to: [..., H] for a `GRUParams`, a `Bidirectional` of two for a
`Bidirectional`, a tuple with one entry a layer for a stack.
"""

from jaxgru.stacks.create import init_stack, init_state, init_taps
from jaxgru.stacks.dropout import Dropout
from jaxgru.stacks.forms import Bidirectional
from jaxgru.stacks.run import gru_bidirectional, gru_stack, gru_stack_cell

__all__ = ["Bidirectional", "Dropout", "gru_bidirectional", "gru_stack", "gru_stack_cell",
           "init_stack", "init_state", "init_taps"]  # fmt: skip
