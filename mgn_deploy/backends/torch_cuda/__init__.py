"""PyTorch on a GPU, made for inference."""
