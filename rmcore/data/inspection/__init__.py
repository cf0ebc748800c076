"""What the prepared data look like: counts, lengths, the first example, a picture."""
