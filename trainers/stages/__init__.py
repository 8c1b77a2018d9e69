"""What surrounds the training of a stage: arguments, lineage, pipeline, launcher; no training."""
