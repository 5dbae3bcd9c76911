"""Names of the splits that have a meaning here; a suite may have others."""

VAL = "val"
"""Coefficients are searched on it, and by default proxy images are drawn from it."""
TEST = "test"
"""Only ever evaluated."""
EVALUATED = {"validate": VAL, "test": TEST}
"""Lightning's function -> the split that it evaluates."""
