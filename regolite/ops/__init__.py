"""Fast forms of what detectors spend their time on, each beside a readable reference."""

from regolite.ops.weighted_sums import weighted_sums

__all__ = ["weighted_sums"]
