"""ONNX: the arrays of its GRU nodes, and files that are read and written."""
