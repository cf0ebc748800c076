"""Computes metrics of a model on held-out comparisons, the same at any world size."""
