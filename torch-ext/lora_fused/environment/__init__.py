"""What the package is loaded into: its own files, and the versions of peft, kernels and torch."""
