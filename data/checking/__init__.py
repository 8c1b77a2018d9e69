"""`data check` and `data show`: what is wrong with data, and how it is tokenized."""
