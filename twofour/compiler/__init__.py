"""Graph to engine: import, passes, lowering, tuning."""
