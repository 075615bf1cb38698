"""Ollama's Modelfile beside a GGUF file: which weights, which template, where an answer ends.

Source: `docs/modelfile.md` of Ollama.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .chat import NotFoundError, find, left_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotloop_core import ExportRequest

    from .chat import Turns
    from .tokenizer import Tokenizer

_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Keys of generation_config.json that Ollama has, and its names for them."""


def modelfiles(
    request: ExportRequest, tokenizer: Tokenizer, models: Sequence[tuple[str, Sequence[str]]]
) -> tuple[dict[str, str | bytes], list[str]]:
    """STEM.Modelfile for each (stem, file names) of `models`, and what the user should know. None without a chat
    template: the model is then none to chat with.
    """
    if request.chat_template is None or request.render is None:
        return {}, []
    notes: list[str] = []
    files: dict[str, str | bytes] = {}
    template = system = ""
    try:
        turns = _turns(request, tokenizer)
        template, system = turns.go(), turns.system
    except NotFoundError as reason:
        notes.append(f"the Modelfile has no TEMPLATE; Ollama looks for one itself: {reason}")
    if '"""' in template + system:
        notes.append('the Modelfile has no TEMPLATE: it holds """, which a Modelfile cannot quote')
        template = system = ""
    absent = left_out(request.chat_template) if template else []
    if absent:
        notes.append(
            f"the Modelfile's TEMPLATE leaves out {' and '.join(absent)}, which the chat template takes; Ollama then "
            "offers none with this model. `llama-server --jinja` runs the chat template itself."
        )
    for stem, names in models:
        if len(names) > 1:
            notes.append(f"{stem} has no Modelfile: Ollama reads no split GGUF")
            continue
        lines = [f"FROM ./{names[0]}"]
        lines += [f'TEMPLATE """{template}"""'] if template else []
        lines += [f'SYSTEM """{system}"""'] if system else []
        lines += [
            f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in tokenizer.stops
        ]
        lines += [f"PARAMETER {name} {value}" for name, value in _sampling(tokenizer.generation)]
        files[f"{stem}.Modelfile"] = "\n".join(lines) + "\n"
    return files, notes


def _turns(request: ExportRequest, tokenizer: Tokenizer) -> Turns:
    assert request.chat_template is not None and request.render is not None
    turns = find(request.render, request.chat_template)
    return turns.without(tokenizer.bos) if tokenizer.adds_bos else turns


def _sampling(generation: dict[str, Any]) -> list[tuple[str, Any]]:
    """What the model's authors sample with; nothing where they decode greedily."""
    if not generation.get("do_sample"):
        return []
    found = [(name, generation.get(key)) for key, name in _PARAMETERS.items()]
    # Numbers alone: a text could bring lines of its own.
    return [(name, value) for name, value in found if isinstance(value, int | float)]
