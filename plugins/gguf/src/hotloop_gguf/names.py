"""The tensor names that llama.cpp looks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_core.errors import UnsupportedError
from hotloop_core.gguf import gguf_name

if TYPE_CHECKING:
    from hotloop_core import ExportFacts, TensorEntry


def tensor_name(entry: TensorEntry, facts: ExportFacts) -> str:
    """The name of an entry's tensor, with its `.weight` or `.bias`.

    Raises:
        UnsupportedError: the tensor has no place in the format.

    """
    name = gguf_name(facts, entry.role, entry.layer)
    if name is None or entry.part not in ("weight", "bias"):
        raise UnsupportedError(
            f"{entry.name} (role {entry.role!r}) has no place in a GGUF file of architecture "
            f"{facts.architecture!r}: its family's ExportFacts name none. Export as safetensors, "
            "or add the role to the family's `exports`."
        )
    return f"{name}.{entry.part}"
