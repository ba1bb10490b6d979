"""What each layer is pruned to and computes in, chosen by measured times and measured accuracy."""
