"""The first minutes: what there is, shipped configs, runs and this machine; trains nothing."""
