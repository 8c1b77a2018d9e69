"""Adapters, merged models and GGUF files for other programs, checked before they are published."""
