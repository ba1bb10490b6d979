"""A load generator for any server that speaks KServe's v2 protocol, over HTTP and gRPC."""
