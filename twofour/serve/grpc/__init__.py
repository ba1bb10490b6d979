"""The server's gRPC side: the inference service of the protocol, and gRPC's own health service."""
