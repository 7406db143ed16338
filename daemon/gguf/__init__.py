"""GGUF files as plain data: the container, and what its metadata means. Without torch and numpy, so
that the control plane reads vocabularies from it too."""
