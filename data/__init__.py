"""Records to token rows: reading, checking, mixing, tokenizing, more data; no models."""
