"""Does the network still do its job: accuracy, and the gate."""
