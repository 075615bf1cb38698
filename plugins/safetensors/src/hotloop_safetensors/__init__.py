"""Writes merged and adapter-only safetensors that transformers and PEFT load."""

from __future__ import annotations

from types import MappingProxyType

from hotloop_core import API, ExporterSpec, hookimpl

SAFETENSORS = ExporterSpec(
    api=API,
    name="safetensors",
    target="hotloop_safetensors.export:export",
    summary="Hugging Face checkpoint: transformers, vLLM, SGLang",
    quants=MappingProxyType(
        {
            "16bit": "merged, bfloat16 (float16 for a float16 model)",
            "32bit": "merged, float32",
            "4bit": "merged, bitsandbytes NF4 with double quantisation",
            "adapter": "the adapter alone, as PEFT writes it",
        }
    ),
    aliases=MappingProxyType(
        {
            "merged_16bit": "16bit",
            "merged_4bit": "4bit",
            "nf4": "4bit",
            "bf16": "16bit",
            "lora": "adapter",
            "f32": "32bit",
        }
    ),
    adapter_quants=frozenset({"adapter"}),
)


@hookimpl
def hotloop_exporters() -> list[ExporterSpec]:
    """The safetensors exporter."""
    return [SAFETENSORS]
