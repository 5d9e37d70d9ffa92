"""Differentially private fine-tuning of tangent vision transformers."""
