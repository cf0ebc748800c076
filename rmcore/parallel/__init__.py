"""Parallelism, added from outside the model: the process group, the strategies (one file each) and the optimizer."""
