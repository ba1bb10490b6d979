"""One file a kind of stage: what it depends on, and the work."""
