"""Engines on NVIDIA GPUs: by the driver, without torch."""
