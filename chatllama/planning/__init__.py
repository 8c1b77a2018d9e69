"""What a config will need before it runs: memory, disk, tokens and time; loads no model, no torch."""
