"""Loading: from a name to a checked, wired model and its tokenizer."""

from .load import load

__all__ = ["load"]
