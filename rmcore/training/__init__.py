"""Everything of one run around the loop: assembly, saving, signals, heartbeats, metrics, evaluation, export, report."""
