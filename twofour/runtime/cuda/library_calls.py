"""A `LibraryCall` of an engine, made ready for the GPU that it runs on."""

from __future__ import annotations

from twofour.core.cuda_products import CUBLASLT, CUSPARSELT
from twofour.core.errors import EngineError
from twofour.runtime.cuda import cublaslt, cusparselt
from twofour.runtime.cuda.cublaslt import CublasProduct
from twofour.runtime.cuda.cusparselt import SparseProduct

Prepared = CublasProduct | SparseProduct
"""What has `sizes`, `run` and `close`."""
_REBUILD = "build the engine again: twofour build MODEL.onnx -o E.engine --target cuda"


def prepare(library: str, settings: str, capability: int, device: int = 0) -> Prepared:
    """A library's call, ready to run on the current GPU.

    Args:
        library: "cublaslt" or "cusparselt".
        settings: of the call.
        capability: of the GPU, 90 for 9.0.
        device: its number.

    Raises:
        EngineError: the settings are malformed, or of another version of the library.
        UnsupportedError: the library is not here, or cannot compute it.
    """
    if library == CUBLASLT:
        return cublaslt.prepare(settings, capability, device)
    if library == CUSPARSELT:
        return cusparselt.prepare(settings, capability, device)
    reasons = [f"expected {CUBLASLT} or {CUSPARSELT}, got {library[:60]!r}"]
    raise EngineError("the engine calls a library that is not known", reasons, _REBUILD)
