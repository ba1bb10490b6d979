"""Timing and the engines of others, measured in the same run as ours."""
