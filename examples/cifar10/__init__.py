"""The parts of the CIFAR-10 example, in the order of the data."""
