"""What computes the products of experts."""
