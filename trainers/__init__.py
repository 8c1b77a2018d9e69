"""The three stages, the engine they run on and the self-test; inference is in chatllama."""
