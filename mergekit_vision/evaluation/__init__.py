"""Accuracy of an encoder, exact over any number of processes."""
