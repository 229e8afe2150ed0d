"""Utilities that depend on no other subpackage."""
