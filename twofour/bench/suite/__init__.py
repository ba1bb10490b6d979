"""Whole networks, every engine and every peer, in one table."""
