"""`data generate`: more data from a model's API."""
