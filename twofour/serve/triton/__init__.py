"""An engine as a model of Triton Inference Server: its configuration, its folder, its Python."""
