"""What any package may use: ranks, atomic files, JSONL, HTTP, command line."""
