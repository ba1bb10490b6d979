"""Running engines, with numpy, ctypes and llvmlite; onnxruntime only for fallback steps."""
