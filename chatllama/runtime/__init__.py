"""What any package may use: ranks, durable files, JSONL, HTTP, command line."""
