"""This machine: its files, memory, terminal, network, and the points at which tests make things fail."""
