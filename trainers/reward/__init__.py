"""Stage 2, the reward model; its diagnosis lies in diagnosis/."""
