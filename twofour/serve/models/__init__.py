"""Models that run: versions with their queues, batches and instances."""
