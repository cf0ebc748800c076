"""Computes the rewards of texts with a trained model."""
