"""The detectors, one file each, and what they are made of: attention, backbones, glimpses, REGO."""
