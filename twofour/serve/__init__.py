"""Engines in a repository, served over HTTP and gRPC."""
