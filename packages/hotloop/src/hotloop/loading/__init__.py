"""Loading: from a name to a checked, wired model and its tokenizer."""

from .load import load
from .report import LoadReport, load_report
from .tokenizer import load_tokenizer

__all__ = ["LoadReport", "load", "load_report", "load_tokenizer"]
