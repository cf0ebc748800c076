"""A trained model and held-out comparisons in, metrics out, the same at any world size."""
