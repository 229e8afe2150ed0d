"""Measurements: what the README's numbers come from. See benchmarks/README.md."""
