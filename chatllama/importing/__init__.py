"""Meta's checkpoints and llama.cpp's GGUF files as Hugging Face folders."""
