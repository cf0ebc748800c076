"""Comparisons in, token ids out: rendered by a template, tokenised, limited in length, cached as flat arrays."""
