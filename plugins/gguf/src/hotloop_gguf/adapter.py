"""A LoRA adapter as a GGUF file of its own, which llama.cpp puts on a base model (`--lora`).

Source: `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` of llama.cpp: each adapted weight NAME has NAME.lora_a
[rank, columns] and NAME.lora_b [rows, rank], and counts alpha / rank times B A. An embedding's A is looked up by token,
so it is stored [tokens, rank].
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError, UnsupportedError
from hotloop_core.exporter import ExportReport
from hotloop_core.files import Outputs

from .mixes import BLOCKS
from .names import tensor_name
from .pipeline import Planned, plan_output, write_outputs
from .transforms import transform_named

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hotloop_core import ExportFacts, ExportRequest, TensorEntry
    from torch import Tensor

    from .writer import Value


_OF_BASE = ".base_layer.weight"
"""PEFT saves an embedding beside the adapter on it."""


@dataclass(frozen=True)
class Scaling:
    """What PEFT multiplies B A by, and what a reader of the file does. config: adapter_config.json."""

    config: Mapping[str, Any]

    @property
    def alpha(self) -> float:
        """The one alpha that the file says; a reader takes 0 for "no scaling", so that is not written."""
        return float(self.config["lora_alpha"]) or 1.0

    def correction(self, module: str, rank: int) -> float:
        """What B is multiplied by so that alpha / rank gives what PEFT computes."""
        alpha = float(self._of(module, "alpha_pattern", self.config["lora_alpha"]))
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return scale * rank / self.alpha

    def _of(self, module: str, pattern: str, otherwise: Any) -> Any:
        for key, value in (self.config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return otherwise


def export(request: ExportRequest, facts: ExportFacts) -> ExportReport:
    """Writes NAME-adapter.gguf, in float32.

    Raises:
        UnsupportedError: something in the adapter that the format cannot say, by name.
        ConfigError: an importance matrix.

    """
    if request.importance is not None:
        raise ConfigError("an adapter is not quantised; leave the importance matrix out")
    config: dict[str, Any] = json.loads(
        (request.source / "adapter_config.json").read_text(encoding="utf-8")
    )
    _refuse_inexpressible(config)
    scaling = Scaling(config)
    of_base = [e.name for e in request.tensors if e.name.endswith(_OF_BASE)]
    factors = [entry for entry in request.tensors if entry.name not in of_base]
    planned = [_planned(entry, facts, scaling, request) for entry in factors]
    output = plan_output(
        f"{request.name}-adapter",
        _metadata(request, facts, config, scaling),
        [tensor.info(0) for tensor in planned],
        None,  # llama.cpp reads an adapter from one file
    )
    with Outputs(request.directory, overwrite=request.overwrite) as outputs:
        outputs.check(output.files)
        outputs.require_space(output.bytes)
        write_outputs(outputs, [output], planned, request.progress)
    return ExportReport(
        format="gguf",
        quants=request.quants,
        files=tuple(outputs.files),
        tensors=len(planned),
        dropped=dict.fromkeys(of_base, "the base's own weight, which its file has"),
    )


def _refuse_inexpressible(config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    found = [key for key in ("use_dora", "lora_bias", "fan_in_fan_out") if config.get(key)]
    if kind != "LORA" or found:
        raise UnsupportedError(
            f"an adapter of the kind {kind}{' with ' + ', '.join(found) if found else ''} has no place in "
            "GGUF, which holds plain LoRA. Export the merged model."
        )


def _planned(
    entry: TensorEntry, facts: ExportFacts, scaling: Scaling, request: ExportRequest
) -> Planned:
    if entry.part not in ("lora_A", "lora_B") or entry.name.endswith(".bias"):
        raise UnsupportedError(
            f"{entry.name} is no factor of a LoRA, and an adapter in GGUF holds nothing else "
            "(no trained norms, heads, tokens or biases). Export the merged model."
        )
    if request.facts.tied and entry.role in ("embedding", "head"):
        raise UnsupportedError(
            f"{entry.name} adapts the {entry.role} of a model whose head is its embedding: in GGUF both are one "
            "tensor, and llama.cpp crashes where an adapter is put on it. Export the merged model."
        )
    name = tensor_name(replace(entry, part="weight"), facts)
    module = entry.name.removeprefix("base_model.model.").partition(".lora_")[0]
    embedding, first = entry.role == "embedding", entry.part == "lora_A"
    transform = facts.transforms.get(entry.role)

    def load() -> Tensor:
        factor = entry.load().float()
        if first:
            return factor.T.contiguous() if embedding else factor
        factor = factor * scaling.correction(module, factor.shape[1])
        return factor if transform is None else transform_named(transform)(factor, request.facts)

    def parts(_: int) -> Iterator[tuple[int, Tensor]]:
        yield 0, load()

    return Planned(
        name=f"{name}.{entry.part.lower()}",
        source=entry.name,
        shape=entry.shape[::-1] if embedding and first else entry.shape,
        blocks=(BLOCKS["F32"],),
        parts=parts,
    )


def _metadata(
    request: ExportRequest, facts: ExportFacts, config: Mapping[str, Any], scaling: Scaling
) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "general.architecture": facts.architecture,
        "general.type": "adapter",
        "general.name": request.name,
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": scaling.alpha,
    }
    base = config.get("base_model_name_or_path")
    if base:
        keys["general.base_model.count"] = 1
        keys["general.base_model.0.name"] = str(base).rstrip("/").rpartition("/")[2]
    return keys
