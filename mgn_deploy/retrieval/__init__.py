"""Distances, rank lists and ranking quality."""
