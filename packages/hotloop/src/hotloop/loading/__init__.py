"""Loading: from a name to a checked, wired model and its tokenizer."""

from .load import load
from .tokenizer import load_tokenizer

__all__ = ["load", "load_tokenizer"]
