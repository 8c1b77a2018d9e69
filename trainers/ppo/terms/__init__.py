"""Terms of the score that are no reward adapter of this backbone: models, servers."""
