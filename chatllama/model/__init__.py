"""The LLaMA with its roles: adapters, heads, scoring, weight files; no training loop."""
