"""The W4A8 kernels of sm_90a: weight layout, reference, and the binding of libzqfp."""
