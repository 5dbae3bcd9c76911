"""Files, caches, messages and processes: what every room may use, and what knows nothing of merging."""
