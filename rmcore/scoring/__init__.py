"""Texts in, rewards out: a trained model and the forward pass of training."""
