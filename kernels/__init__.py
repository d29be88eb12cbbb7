"""Stripe pooling and reduction: the branch heads. `reference.py` is the definition of what is right."""
