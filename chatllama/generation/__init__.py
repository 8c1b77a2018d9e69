"""Sampling from a model: KV caches, decoding batches, the sampler; no text."""
