"""Files and hub data sets as checked records; no tokens."""
