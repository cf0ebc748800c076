"""Rows of any known layout in, `Comparison`s out: a prompt, its answers, and which of them are preferred."""
