"""Rollouts sampled by inference servers; the default samples in the training process."""
