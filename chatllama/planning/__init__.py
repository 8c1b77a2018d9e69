"""What a config needs before it runs: memory, disk, tokens, time; no model, no torch."""
