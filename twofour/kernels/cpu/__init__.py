"""Kernels for CPUs: generated through LLVM for one layer and one instruction set at a time."""
