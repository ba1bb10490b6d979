"""Engines for NVIDIA GPUs: from the fused graph to the programs of their steps."""
