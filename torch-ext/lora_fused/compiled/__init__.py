"""What torch.compile sees of the layers."""
