"""The paper's experiments at laptop scale, with several seeds and confidence intervals (notebook 14)."""
