"""Quantisation mathematics in torch (CPU or CUDA). No ONNX."""
