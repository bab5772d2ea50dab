"""ONNX: the arrays of its GRU nodes, and reading and writing of files."""
