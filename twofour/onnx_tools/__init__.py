"""ONNX files in, ONNX files out: load and check, calibrate, quantize, inspect."""
