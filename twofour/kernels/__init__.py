"""Ways to run the fused operators, one file a tactic, packing beside the kernel that reads it."""
