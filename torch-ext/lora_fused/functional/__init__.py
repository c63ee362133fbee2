"""Functions on tensors, one file a layer family. Every input error of the public ones is raised here."""
