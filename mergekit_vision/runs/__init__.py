"""Runs: Lightning's module and trainer, and the comparison of methods."""
