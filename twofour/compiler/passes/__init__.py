"""The graph passes: one file each, in the order of pipeline.py."""
