"""Importers of public MGN checkpoints: each module knows one code that writes them, by the names of its tensors."""
