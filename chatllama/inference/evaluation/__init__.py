"""Benchmarks by lm-eval for the roles of a run; it trains nothing and judges no single answer."""
