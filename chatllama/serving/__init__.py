"""The OpenAI-compatible server and its page; it trains and reports nothing."""
