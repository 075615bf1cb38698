"""The planner: the fastest plan that fits a memory budget, from a config alone or for a loaded
model.
"""

from .amounts import parse_bytes
from .cards import CARDS, Card, find_card
from .make import checkpointing_placements, plan, plan_again, plan_larger
from .oom import explain_oom, plan_after_oom
from .tables import Line, Outlook, outlook, summary
from .task import Request

__all__ = [
    "CARDS",
    "Card",
    "Line",
    "Outlook",
    "Request",
    "checkpointing_placements",
    "explain_oom",
    "find_card",
    "outlook",
    "parse_bytes",
    "plan",
    "plan_after_oom",
    "plan_again",
    "plan_larger",
    "summary",
]
