"""The model of a checkpoint, its weights in their homes: read by us where we can, else by transformers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import CheckpointError

from . import checks
from .assemble import Skeleton, fill
from .gguf_file import read_gguf
from .gguf_weights import gguf_tensors
from .quantize import nf4_config, settle_
from .report import LoadReport, attach
from .stored import safetensors_index

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from hotloop_core import FamilySpec, ModelFacts, Plan
    from transformers import PreTrainedConfig, PreTrainedModel

    from hotloop.homes import Homes

    from .source import Source
    from .stored import Stored


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a load is to make of a checkpoint.

    trains: every weight; else all are frozen. plan: where weights live; None: on the device. attn: transformers'
    attention implementation, None its default.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    device: torch.device
    bits: int
    stored_in_4bit: bool
    attn: str | None
    remote_code: bool
    trains: bool
    plan: Plan | None


def read_weights(
    source: Source, files: list[Path], spec: FamilySpec, facts: ModelFacts, wanted: Wanted
) -> PreTrainedModel:
    """The model, checked, with a LoadReport. `files`: safetensors; empty for a GGUF file.

    Raises:
        CheckpointError: missing, surplus, mis-shaped, non-finite or truncated tensors.
        BudgetError: the host cannot lock the memory that the plan wants of it.
    """
    stored = _stored(source, files, spec, facts, wanted.dtype)
    started = time.perf_counter()
    reason = "the model's code comes with the checkpoint"
    skeleton = None
    if not (wanted.remote_code and source.config.get("auto_map")):
        skeleton = Skeleton(
            wanted.config,
            wanted.dtype,
            attn=wanted.attn,
            device=wanted.device,
            quantise=wanted.bits == 4,
        )
        reason = skeleton.obstacle(stored)
    homes: Homes | None = None
    away = _away(wanted.plan)
    if skeleton is not None and reason is None:
        model = skeleton.model
        if away is not None:
            from hotloop.homes.settling import prepare

            homes = prepare(model, away, spec, wanted.device)
        fill(
            skeleton,
            stored,
            source.name,
            homes=homes,
            spec=spec,
            plan=wanted.plan,
            finite=not wanted.stored_in_4bit,
            directory=source.directory if source.gguf is None else None,
        )
        model.requires_grad_(wanted.trains)
    else:
        del skeleton
        model = _by_transformers(source, stored, wanted)
        model.requires_grad_(wanted.trains)
        if away is not None:
            from hotloop.homes import settle

            homes = settle(model, away, device=wanted.device, family=spec.name)
    if wanted.bits == 4:
        settle_(model, wanted.dtype)
    report = LoadReport(
        reader="hotloop" if reason is None else "transformers",
        reason=reason,
        seconds=time.perf_counter() - started,
        tensors=len(stored) if reason is None else None,
        on_host=None if homes is None else str(homes),
    )
    attach(model, report)
    return model


def _stored(
    source: Source, files: list[Path], spec: FamilySpec, facts: ModelFacts, dtype: torch.dtype
) -> dict[str, Stored]:
    if source.gguf is None:
        return safetensors_index(files)
    return gguf_tensors(read_gguf(source.directory / source.gguf), spec, facts, dtype)


def _away(plan: Plan | None) -> Plan | None:
    """The plan, where it keeps any weight on the host."""
    return plan if plan is not None and plan.has_weights_on_host else None


def _by_transformers(
    source: Source, stored: Mapping[str, Stored], wanted: Wanted
) -> PreTrainedModel:
    """The whole model on the device, by from_pretrained, with the same checks."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if not wanted.stored_in_4bit:
        _require_finite(stored, wanted.device, source.name)
    options: dict[str, Any] = {
        "config": wanted.config,
        "dtype": wanted.dtype,
        "trust_remote_code": wanted.remote_code,
    }
    kind: Any = AutoModelForCausalLM
    if source.gguf is None:
        options["pretrained_model_name_or_path"] = str(source.directory)
        # Tensors of another shape are then reported with the missing and surplus ones, by us.
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
    else:  # the automatic class wants a path, so these go to the class that it would choose
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(wanted.config)]
        options["pretrained_model_name_or_path"] = None
        options["state_dict"] = {name: tensor.load() for name, tensor in stored.items()}
    if wanted.attn is not None:
        options["attn_implementation"] = wanted.attn
    if wanted.bits == 4 and not wanted.stored_in_4bit:
        options["quantization_config"] = nf4_config(wanted.dtype)
    if wanted.device.type != "cpu":
        options["device_map"] = {"": wanted.device}
    try:
        model, info = kind.from_pretrained(**options, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"transformers cannot load {source.name}: {error}") from error
    shapes = [*info["mismatched_keys"], *checks.misshapen(model)]
    checks.require_complete({**info, "mismatched_keys": shapes}, source.name)
    return model


def _require_finite(stored: Mapping[str, Stored], device: torch.device, what: str) -> None:
    bad: list[str] = []
    for name, tensor in stored.items():
        verdict = checks.is_finite(tensor.load().to(device))
        if verdict is not None and not bool(verdict):
            bad.append(name)
    checks.refuse_non_finite(bad, what)
