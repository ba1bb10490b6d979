"""Versions of models that are published once, never changed, and promoted to be served."""
