"""Serves the rewards of a trained model over HTTP."""
