"""Activations in ONNX's text form, as functions spell them: from VALUE to `act`."""

from __future__ import annotations

SILU = """opened = Sigmoid (VALUE)
 act = Mul (VALUE, opened)"""

GELU = """root = Constant <value_float = 0.7071067812> ()
 half = Constant <value_float = 0.5> ()
 unit = Constant <value_float = 1.0> ()
 turned = Mul (VALUE, root)
 bounded = Erf (turned)
 above = Add (bounded, unit)
 halved = Mul (VALUE, half)
 act = Mul (halved, above)"""

GELU_TANH = """cubic = Constant <value_float = 0.044715> ()
 root = Constant <value_float = 0.7978845608> ()
 half = Constant <value_float = 0.5> ()
 unit = Constant <value_float = 1.0> ()
 square = Mul (VALUE, VALUE)
 cube = Mul (square, VALUE)
 bent = Mul (cube, cubic)
 line = Add (VALUE, bent)
 turned = Mul (line, root)
 bounded = Tanh (turned)
 above = Add (bounded, unit)
 halved = Mul (VALUE, half)
 act = Mul (halved, above)"""
