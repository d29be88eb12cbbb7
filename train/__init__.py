"""The PyTorch reference: the model, its losses, its data and the loop that trains it."""
