"""Models around a stack: outputs of every step or of the last one, token models, and sampling.

    many to many:  o_t = y_t w + b                  many to one:  o = y_last w + b
    tokens:        x_t = embedding[token_t]  (or its one-hot row),  logits_t = y_t w + b

y are the outputs of `gru_stack`, and y_last those after the last valid step (of both directions).
"""

from jaxgru.models.generation import generate
from jaxgru.models.outputs import final_outputs, sequence_outputs, token_logits, token_loss
from jaxgru.models.parameters import (
    SequenceParams,
    TokenParams,
    init_sequence_model,
    init_token_model,
)

__all__ = ["SequenceParams", "TokenParams", "final_outputs", "generate", "init_sequence_model",
           "init_token_model", "sequence_outputs", "token_logits", "token_loss"]  # fmt: skip
