"""Merging methods, one a file; registered by entry points in ``setup.cfg``."""
