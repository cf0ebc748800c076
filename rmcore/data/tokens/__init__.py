"""Turns comparisons into token ids: renders, tokenises and limits them, and caches them as flat arrays on disk."""
