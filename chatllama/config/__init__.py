"""The YAML config: sections, defaults, loading, errors; no torch, nothing of the other packages."""
