"""What the tests of kernels for bfloat16 need: the target, and whether this machine has it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twofour.core.target import host_target, why_no_bf16

TARGET = replace(host_target(), bf16=not why_no_bf16(host_target()))
needs_bf16 = pytest.mark.skipif(not TARGET.bf16, reason=why_no_bf16(host_target()))
