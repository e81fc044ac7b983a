"""What the quantizer needs to know about activations: interfaces, samples, statistics."""
