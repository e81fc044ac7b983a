"""Runs ONNX graphs in torch: on CUDA without onnxruntime-gpu, and with gradients."""

from zqfp_compile.torch_graph.executor import TorchGraph

__all__ = ["TorchGraph"]
