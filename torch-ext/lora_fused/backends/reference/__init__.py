"""Plain PyTorch."""
