"""Writes GGUF files that llama.cpp loads, without llama.cpp."""

from __future__ import annotations

from types import MappingProxyType

from hotloop_core import API, ExporterSpec, hookimpl

from .imatrix import FILES
from .mixes import ALIASES, MIXES

_ADAPTER = {"adapter": "the LoRA adapter alone, for llama.cpp's --lora"}

GGUF = ExporterSpec(
    api=API,
    name="gguf",
    target="hotloop_gguf.export:export",
    summary="one file for llama.cpp, Ollama, LM Studio",
    quants=MappingProxyType({name: mix.summary for name, mix in MIXES.items()} | _ADAPTER | FILES),
    aliases=MappingProxyType(ALIASES | {"lora": "adapter"}),
    adapter_quants=frozenset(_ADAPTER),
)


@hookimpl
def hotloop_exporters() -> list[ExporterSpec]:
    """The GGUF exporter."""
    return [GGUF]
