"""What pruning and quantizing a model will gain on this machine, before either is paid for."""
