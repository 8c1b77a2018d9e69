"""Bounds of sampling's settings, the same in configs, in requests and on the command line.

Numbers only: the sections and options that use them say what they mean.
"""

LEAST_TEMPERATURE = 1e-4
"""Below it float32 logits overflow when they are divided; 0 takes the likeliest token instead."""
MOST_TEMPERATURE = 100.0
MOST_TOP_K = 1_000_000
"""Above any vocabulary."""
MOST_NEW_TOKENS = 10_000_000
"""Above any model's positions."""
MOST_SEED = 2**62
"""torch's generators take twice as much; stages add small numbers to it."""
