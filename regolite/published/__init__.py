"""Weights and models of others: what they are called there, and how they come here and go back."""
