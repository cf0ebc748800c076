"""Everything of one run around the loop in rmcore/train.py."""
