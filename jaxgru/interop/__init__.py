"""Converts the weights of other libraries to `GRUParams` and back, as NumPy arrays by name.

The `spec` of converted parameters is the equation of their library, so `gru` and `gru_stack` run
them without further options. The libraries store the numbers in different layouts:

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

The update gate z keeps the old state in all libraries but Haiku. Negating the update gate's weights
and biases converts one convention into the other exactly, because sigmoid(-a) = 1 - sigmoid(a). Two
biases that act only through their sum may be summed: the outputs and all other gradients stay the
same, but the sum of two trained biases moves twice as fast as one bias. For this reason the state
of an optimizer is not valid after a conversion that returns a note; initialize the optimizer again.

Every `from_*` copies the arrays once and returns an `Imported`. It raises a ValueError that lists
all missing keys, unexpected keys and size mismatches, or if no name has the prefix; and a TypeError
if the source is of another kind, an array is not floating, or dtypes differ. Shared arguments:

* `cell`: the arrays of one cell by name, nested or joined by "/". A list of cells is a stack, a
  `Bidirectional` of two cells is a layer of two directions; the result is nested in the same way.
* `prefix`: the start of the names of this GRU among those of a larger model.
* `activation`: the candidate's activation, which the arrays do not show.

Every `to_*` copies the arrays once and returns an `Exported`. Its argument `params` is a
`GRUParams`, a `Bidirectional` or a stack. If z has the opposite meaning in the target, the update
gate is negated. It raises a ValueError if the target cannot compute the equation of `params` (reset
gate, activation, layer-norm scales); and a TypeError if `params` is of another kind or dtypes
differ.

None of these libraries is imported. Functions that read or write files raise an ImportError if the
package onnx or safetensors is not installed, and an OSError if the file cannot be read or written.
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
    "Exported", "Imported", "LoadedWeights", "OnnxGRU", "from_equinox", "from_haiku", "from_keras",
    "from_linen", "from_nnx", "from_onnx", "from_torch", "load_weights", "read_onnx",
    "read_safetensors", "save_weights", "to_equinox", "to_haiku", "to_keras", "to_linen", "to_nnx",
    "to_onnx", "to_torch", "write_onnx",
]  # fmt: skip
