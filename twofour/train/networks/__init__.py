"""Networks that benchmarks and tests are measured on, with weights drawn from a seed."""
