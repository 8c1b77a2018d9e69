"""Metrics, progress, summaries, plots and the report page of a run; it computes no training."""
