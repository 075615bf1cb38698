"""Fine-tune Hugging Face models faster and in less memory, with gradients no worse than PyTorch's.

Importing this loads neither torch nor transformers: each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hotloop_core.errors import HotloopError

if TYPE_CHECKING:
    from .chat_templates import (
        get_chat_template,
        standardize_data_formats,
        standardize_sharegpt,
        train_on_responses_only,
    )
    from .exporting import export
    from .fast import FastLanguageModel, FastModel, is_bfloat16_supported
    from .loading import load
    from .lora import add_lora
    from .planner import plan
    from .training import Recipe, train
    from .verification import verify
    from .wiring import wire

__version__ = "0.1.0"

__all__ = [
    "FastLanguageModel",
    "FastModel",
    "HotloopError",
    "Recipe",
    "add_lora",
    "export",
    "get_chat_template",
    "is_bfloat16_supported",
    "load",
    "plan",
    "standardize_data_formats",
    "standardize_sharegpt",
    "train",
    "train_on_responses_only",
    "verify",
    "wire",
]

_HOMES = {
    "FastLanguageModel": "fast",
    "FastModel": "fast",
    "Recipe": "training",
    "add_lora": "lora",
    "export": "exporting",
    "get_chat_template": "chat_templates",
    "is_bfloat16_supported": "fast",
    "load": "loading",
    "plan": "planner",
    "standardize_data_formats": "chat_templates",
    "standardize_sharegpt": "chat_templates",
    "train": "training",
    "train_on_responses_only": "chat_templates",
    "verify": "verification",
    "wire": "wiring",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        from .fast.refusals import refuse_name

        refuse_name(name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    # Stored, so that the next use costs nothing, and so that a submodule of the same name does not shadow it.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
