"""Writes GGUF files that llama.cpp loads, without llama.cpp."""

from __future__ import annotations

from types import MappingProxyType

from hotloop_core import API, ExporterSpec, hookimpl

from .mixes import ALIASES, MIXES

GGUF = ExporterSpec(
    api=API,
    name="gguf",
    target="hotloop_gguf.export:export",
    summary="one file for llama.cpp, Ollama, LM Studio",
    quants=MappingProxyType({name: mix.summary for name, mix in MIXES.items()}),
    aliases=MappingProxyType(ALIASES),
)


@hookimpl
def hotloop_exporters() -> list[ExporterSpec]:
    """The GGUF exporter."""
    return [GGUF]
