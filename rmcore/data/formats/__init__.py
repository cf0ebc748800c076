"""Turns rows of any known layout into `Comparison`s: a prompt, its answers, and which of them are preferred."""
