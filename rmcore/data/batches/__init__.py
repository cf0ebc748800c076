"""Tokenised comparisons in, packed micro batches out: the step plan, the batch, the loader."""
