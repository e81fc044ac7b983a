"""End-to-end distillation: what no code depends on is tuned against the original model's predictions."""
