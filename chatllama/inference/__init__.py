"""A trained run answers: loading, batches of prompts, terminal chat, translations; no HTTP."""
