"""Number formats and packing, defined once in numpy (DESIGN section 2). No torch, no ONNX."""
