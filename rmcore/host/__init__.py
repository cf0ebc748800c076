"""This machine: its files, memory, terminal and network, the end of a command, and fault points for tests."""
