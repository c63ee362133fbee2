"""Who computes: the native ops, Triton, or plain PyTorch. `select` is the one place that chooses."""
