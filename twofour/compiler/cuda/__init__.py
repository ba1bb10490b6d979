"""Fused graph -> engine for an NVIDIA GPU.

The steps stand in `build.cuda_engine`, in order: what of the graph runs there (reader.py), where
its values lie (tensors.py, lower.py), what is asked of the kernels (products.py, small.py), what
offers to do it (tactics.py, libraries.py), which of these is fastest (compiling.py, timing.py,
choose.py), and the program (assemble.py).
"""
