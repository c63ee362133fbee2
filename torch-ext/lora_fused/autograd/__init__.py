"""Autograd Functions, one file per layer family."""
