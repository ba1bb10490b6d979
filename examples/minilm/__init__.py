"""The parts of the sentence encoder example, in the order of the data."""
