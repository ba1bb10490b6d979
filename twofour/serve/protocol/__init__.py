"""The Open Inference Protocol (KServe v2): bytes to requests, and answers to bytes; no I/O."""
