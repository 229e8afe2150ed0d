"""Experiments: the paper's questions at laptop scale, with seeds and intervals (notebook 14)."""
