"""The calls that fine-tuning scripts in the field make: FastLanguageModel and what goes with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .model import FastLanguageModel, FastModel, is_bfloat16_supported
from .refusals import refuse_name

if TYPE_CHECKING:
    from .trainer import HotloopTrainer, HotloopTrainingArguments

__all__ = [
    "FastLanguageModel",
    "FastModel",
    "HotloopTrainer",
    "HotloopTrainingArguments",
    "is_bfloat16_supported",
]


def __getattr__(name: str) -> Any:
    """The trainer needs TRL at import, so it is imported when it is asked for."""
    if name in ("HotloopTrainer", "HotloopTrainingArguments"):
        return getattr(importlib.import_module(".trainer", __name__), name)
    refuse_name(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
