"""Running engines: numpy, ctypes and llvmlite, and onnxruntime only where an engine has a fallback step."""
