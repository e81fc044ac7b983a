"""Runtimes: ONNX Runtime, TensorRT and TensorRT-RTX, each imported only when used."""
