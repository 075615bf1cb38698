"""Writes GGUF files that llama.cpp loads, without llama.cpp."""
