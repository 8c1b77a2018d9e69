"""The run folder on disk: paths, lock, checkpoints, signals, copies to machines; no models."""
