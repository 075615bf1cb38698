"""A first description of a family that no plugin has: read from transformers' own model, written as a package."""

from .guess import Guess, guess
from .project import KitResult, NewFamily, new_family

__all__ = ["Guess", "KitResult", "NewFamily", "guess", "new_family"]
