"""Fast implementations of expensive operations, each with a readable reference."""

from regolite.ops.weighted_sums import weighted_sums

__all__ = ["weighted_sums"]
