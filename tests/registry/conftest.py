"""The S3 server of the tests of repositories, for those of the registry."""

from __future__ import annotations

from tests.serve.repository.conftest import endpoint

__all__ = ["endpoint"]
