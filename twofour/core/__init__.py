"""Definitions every other part builds on; numpy only."""
