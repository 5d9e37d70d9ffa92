"""Tangent (linearised) transformers."""
