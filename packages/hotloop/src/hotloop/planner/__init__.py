"""The planner: the fastest plan that fits a memory budget, from a config alone or for a loaded
model.
"""

from .cards import CARDS, Card, find_card
from .make import parse_bytes, plan, plan_larger

__all__ = ["CARDS", "Card", "find_card", "parse_bytes", "plan", "plan_larger"]
