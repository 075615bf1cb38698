"""Writes merged and adapter-only safetensors that transformers and PEFT load."""
