"""Weights of other libraries, in and out: NumPy arrays under their names and in their layouts.

Whatever is read becomes parameters that carry the equation of their library in `spec`, so `gru` and
`gru_stack` run them as they are. The libraries differ in where the numbers are:

===========  =========================  ======  ==================================  ======
library      kernels                    blocks  biases                              reset
===========  =========================  ======  ==================================  ======
PyTorch      [3H, I], [3H, H]           r z n   [3H] and [3H], or none              after
Keras 3      [I, 3H], [H, 3H]           z r n   after: [2, 3H]; before: [3H]        either
Flax linen   [I, H], [H, H] per gate    names   r, z: one; n: one each side of r    after
Flax nnx     [I, 3H], [H, 3H]           r z n   [3H], none that r multiplies        after
Equinox      [3H, I], [3H, H]           r z n   [3H], and [H] that r multiplies     after
Haiku        [I, 3H], [H, 3H]           z r n   [3H]; z writes                      before
ONNX         [D, 3H, I], [D, 3H, H]     z r n   [D, 6H], D directions               either
===========  =========================  ======  ==================================  ======

The update gate z keeps the old state in all but Haiku. Since sigmoid(-a) = 1 - sigmoid(a), negating
the update gate's weights and biases converts one into the other exactly. Two biases that only act
as a sum may be summed: the outputs and the gradients of everything else stay the same, but two
biases that both learn move their sum twice as fast as one. For that reason an optimizer's state
does not survive a conversion that returns a note; initialize the optimizer again.

Every `from_*` returns an `Imported`. Every `to_*` takes a `GRUParams`, a `Bidirectional` or a stack
and returns an `Exported`. Where a library has one set of arrays for each cell, a list of them is a
stack and a `Bidirectional` of them is a layer of two directions. None of these libraries is
imported; ONNX and safetensors files need the packages of those names.
"""

from jaxgru.interop.common import Exported, Imported
from jaxgru.interop.equinox import from_equinox, to_equinox
from jaxgru.interop.flax import from_linen, from_nnx, to_linen, to_nnx
from jaxgru.interop.haiku import from_haiku, to_haiku
from jaxgru.interop.keras import from_keras, to_keras
from jaxgru.interop.onnx.reading import OnnxGRU, read_onnx
from jaxgru.interop.onnx.weights import from_onnx, to_onnx
from jaxgru.interop.onnx.writing import write_onnx
from jaxgru.interop.safetensors import LoadedWeights, load_weights, read_safetensors, save_weights
from jaxgru.interop.torch import from_torch, to_torch

__all__ = [
    "Exported",
    "Imported",
    "LoadedWeights",
    "OnnxGRU",
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_linen",
    "from_nnx",
    "from_onnx",
    "from_torch",
    "load_weights",
    "read_onnx",
    "read_safetensors",
    "save_weights",
    "to_equinox",
    "to_haiku",
    "to_keras",
    "to_linen",
    "to_nnx",
    "to_onnx",
    "to_torch",
    "write_onnx",
]
