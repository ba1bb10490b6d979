"""Engines by TensorRT: an ONNX model as TensorRT takes it, its builder, and what it says it built.

rules.py        what each version takes and how it is told: the one table
rewrite.py      Q/DQ as TensorRT reads it
half.py         a graph of float32 as one of float16 or bfloat16
builder.py      network, flags, profiles, caches, progress: model -> bytes
layers.py       what the builder or the inspector says of its layers -> layers of a plan
build.py        all of it in order
"""
