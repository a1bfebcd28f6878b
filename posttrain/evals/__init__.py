"""Evaluation: one file per kind of measurement."""
