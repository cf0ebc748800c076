"""Turns tokenised comparisons into packed micro batches: the step plan, the batch, the loader."""
