"""Layers of experts with their tensors and what comes out, for interpreter and GPU alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tests.kernels.cuda.interpret import TORCH
from twofour.core.experts import SWIGLU, Experts, masked, mixture
from twofour.kernels.cuda.experts_route import ExpertsProblem

BOUNDS = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2, "int8": 1e-2}
"""Relative to the largest result, by the type of the weights."""


@dataclass
class Layer:
    """One layer: x, who is chosen, and the weights."""

    problem: ExpertsProblem
    tensors: dict[str, torch.Tensor]
    constants: dict[str, np.ndarray]

    @staticmethod
    def of(problem: ExpertsProblem, *, seed: int = 0, only: int = -1) -> Layer:
        """Seeded operands; logits lie far enough apart that no rounding changes who is chosen.

        Args:
            problem: the layer.
            seed: of the operands.
            only: expert that all tokens like best, -1 for none.
        """
        p, random = problem, np.random.default_rng(seed)
        rows = p.inner * (1 + (p.activation == SWIGLU))
        sizes = {"w1": (rows, p.hidden), "b1": (rows,), "w2": (p.hidden, p.inner)}
        sizes |= {"b2": (p.hidden,)}
        constants = {}
        for name, size in sizes.items():
            values = random.standard_normal((p.experts, *size)) / np.sqrt(size[-1])
            if name[0] == "w" and p.weights == "int8":
                scale = np.abs(values).max(-1) / 127
                constants[f"{name}_scale"] = scale.astype(np.float32)
                values = np.rint(values / scale[..., None]).astype(np.int8)
            elif name[0] == "w":
                values = torch.from_numpy(values).to(TORCH[p.weights]).float().numpy()
            constants[name] = values if values.dtype == np.int8 else values.astype(np.float32)
        ranks = random.permuted(np.tile(np.arange(p.experts), (p.tokens, 1)), axis=1)
        logits = (4 / p.experts) * ranks.astype(np.float32)
        if only >= 0:
            logits[:, only] = 9
        x = torch.from_numpy(random.standard_normal((p.tokens, p.hidden))).to(TORCH[p.x])
        tensors = {"x": x, "y": torch.full_like(x, 7.0)}
        if p.routed:
            tensors["logits"] = torch.from_numpy(logits).to(TORCH[p.logits])
        else:
            tensors["mask"] = torch.from_numpy(logits[:, 0] * 0 + random.random(p.tokens) < 0.5)
        return Layer(p, tensors, constants)

    def expected(self) -> np.ndarray:
        """The definition."""
        c, p = self.constants, self.problem
        experts = Experts(
            c["w1"], c["b1"], c["w2"], c["b2"], p.activation, c.get("w1_scale"), c.get("w2_scale")
        )
        x = self.tensors["x"].float().cpu().numpy()
        if not p.routed:
            return masked(x, self.tensors["mask"].cpu().numpy(), experts)
        logits = self.tensors["logits"].float().cpu().numpy()
        return mixture(x, logits, experts, p.k, normalize=p.normalize)

    def wrong(self) -> str:
        """What differs from the definition by more than rounding explains; "" if nothing does."""
        got, wanted = self.tensors["y"].float().cpu().numpy(), self.expected()
        bound = BOUNDS[self.problem.weights] * max(float(np.abs(wanted).max()), 1e-3)
        bound += (
            np.abs(wanted) * {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[self.problem.x]
        )
        off = np.abs(got - wanted)
        if np.isfinite(got).all() and (off <= bound).all():
            return ""
        return f"off by {np.nanmax(off):.3g}, allowed {np.max(bound):.3g}, at {np.argmax(off)}"
