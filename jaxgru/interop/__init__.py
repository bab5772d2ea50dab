"""Weights of other libraries as `GRUParams` and back, and files of weights.

Every `from_*` returns an `Imported`, whose `params` have the equation of their library as their
spec, so `gru` and `gru_stack` run them without further options. Every `to_*` returns an `Exported`.
Both hold NumPy arrays and notes on what changed. `from_linen` describes the arguments of every
`from_*`, and `to_torch` those of every `to_*`. None of the libraries is imported. README.md in this
folder compares their layouts.
"""

from jaxgru.interop.cells import (
    from_equinox,
    from_haiku,
    from_linen,
    from_nnx,
    to_equinox,
    to_haiku,
    to_linen,
    to_nnx,
)
from jaxgru.interop.common import Exported, Imported
from jaxgru.interop.keras import from_keras, to_keras
from jaxgru.interop.onnx.reading import OnnxGRU, read_onnx
from jaxgru.interop.onnx.weights import from_onnx, to_onnx
from jaxgru.interop.onnx.writing import write_onnx
from jaxgru.interop.safetensors import LoadedWeights, load_weights, read_safetensors, save_weights
from jaxgru.interop.torch import from_torch, to_torch

__all__ = [
    "Exported", "Imported", "LoadedWeights", "OnnxGRU", "from_equinox", "from_haiku", "from_keras",
    "from_linen", "from_nnx", "from_onnx", "from_torch", "load_weights", "read_onnx",
    "read_safetensors", "save_weights", "to_equinox", "to_haiku", "to_keras", "to_linen", "to_nnx",
    "to_onnx", "to_torch", "write_onnx",
]  # fmt: skip
