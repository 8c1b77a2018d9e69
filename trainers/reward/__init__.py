"""Stage 2, the reward model; its diagnosis is in diagnosis/."""
