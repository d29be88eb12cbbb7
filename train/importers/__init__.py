"""Public MGN checkpoints -> weights folders. One file a source: what its tensors are called, and what no tensor tells."""
