"""What is merged and how: running mergers, choosing the scaling coefficient, comparing experts."""
