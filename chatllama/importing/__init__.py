"""Meta's original checkpoints as Hugging Face folders; nothing else reads them."""
