"""Kernels for NVIDIA GPUs, one file a tactic; tested without a GPU in Triton's interpreter."""
