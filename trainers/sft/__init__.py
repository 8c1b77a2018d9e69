"""Stage 1, supervised instruction tuning, and training a backbone from text."""
