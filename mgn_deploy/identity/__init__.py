"""The same person or not, who is it, and how sure: probabilities, thresholds and enrolled people."""
