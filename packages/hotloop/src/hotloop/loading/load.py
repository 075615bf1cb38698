"""`load`: from a name to a model whose every tensor was checked, and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hotloop_core import discover, facts_of
from hotloop_core.errors import (
    ConfigError,
    DeviceMemoryError,
    PlanError,
    SecurityError,
    UnsupportedError,
)

from . import checks
from .quantize import require_bits
from .source import Hub, Source, fetch, locate
from .tokenizer import read_tokenizer
from .weights import Wanted, read_weights

if TYPE_CHECKING:
    import os

    import torch
    from hotloop_core import ModelFacts, Plan
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from hotloop.planner.make import Placements

EXPECTED_RANK = 16
"""Of adapters on every projection, for which a plan leaves room: a frozen base is loaded to get some."""


def load(
    name_or_path: str | os.PathLike[str],
    *,
    bits: int = 4,
    dtype: torch.dtype | str | None = None,
    max_seq_len: int = 2048,
    vram: str | int | None = None,
    family: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn: str | None = None,
    wire: bool = True,
    device: str | torch.device | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
    full_finetuning: bool = False,
    placements: Placements | None = None,
    plan: Plan | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for training, checks it and wires it.

    Args:
        name_or_path: a folder, a `.gguf` file, a PEFT adapter's folder (its base is loaded, the
            adapter put on it, trainable), a hub id "owner/model", or a GGUF on the hub
            "owner/model/file.gguf".
        bits: 4: the decoder layers' projections in NF4 with double quantisation, the rest in
            `dtype`. 16: all in `dtype`.
        dtype: default bf16 where the card has it, else fp16; fp32 on a CPU, where 16-bit arithmetic
            is slow.
        max_seq_len: tokens of the longest sequence; the plan is made for one of them, with room for adapters.
        vram: budget for the plan, as `hotloop.plan` takes it. On a card torch's allocator then grows its segments
            (`expandable_segments`), for the whole process.
        family: which one, where several plugins claim the model.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model.
        attn: transformers' attention implementation for the paths that are not wired; its default
            otherwise.
        wire: wire the model (`hotloop.wiring.receipt_of(model)` has the receipt).
        device: default the card, else the CPU.
        token: for gated models on the hub.
        local_files_only: take from the hub's cache only.
        rope_scaling: rope parameters put over the config's, for sequences beyond its positions.
        full_finetuning: every weight trains (bits=16). Otherwise all are frozen, for `add_lora`.
        placements: fixed choices for the plan.
        plan: carried out as it is, instead of one made for `vram` and `placements`.

    Each tensor is read straight to the home that the plan gives it, or the whole model by transformers where it has to
    rename or convert what is stored; `hotloop.loading.load_report(model)` says which, and why. The model's
    `use_cache` is off, as training needs it; `generate` still uses its cache.

    Raises:
        NoFamilyError: no installed plugin handles it (told before any weight is read).
        SecurityError: pickled weights, or code that was not asked for.
        CheckpointError: missing, truncated, surplus or non-finite tensors.
        ConfigError: arguments, config, tokenizer and weights that do not go together.
        BudgetError: nothing fits `vram`; names the least that would do. Or the host cannot lock the memory that the
            plan wants of it.
        PlanError: a plan for another model.
        UnsupportedError: a device that is neither CUDA nor the CPU, or a torch whose allocator cannot keep a budget.

    """
    import torch

    if bits not in (4, 16):
        raise ConfigError(
            f"bits={bits}; expected 4 (NF4) or 16 (for fp32: bits=16, dtype=torch.float32)"
        )
    if full_finetuning and bits == 4:
        raise ConfigError("4-bit weights cannot train; pass bits=16 for full_finetuning")
    hub = Hub(revision=revision, token=token, local_files_only=local_files_only)
    source = locate(name_or_path, hub)
    spec = discover().match(source.config, family=family)
    _refuse_remote_code(source, trust_remote_code)
    stored_in_4bit = require_bits(source.config, bits)
    source = fetch(source, hub, remote_code=trust_remote_code)
    files = checks.weight_files(source.directory) if source.gguf is None else []
    config = _config(source, trust_remote_code, rope_scaling)
    facts = facts_of(spec, config.to_dict())
    checks.require_length(max_seq_len, facts, rope_scaling)
    where = _device(device)
    if vram is not None and where.type == "cuda":
        _stretch_allocator()
    dtype = _dtype(dtype, where)
    tokenizer = read_tokenizer(source, remote_code=trust_remote_code)
    checks.require_vocabulary(tokenizer, facts, source.name)
    if plan is not None and (vram is not None or placements is not None):
        raise ConfigError(
            "plan= is carried out as it is; pass it, or vram and placements to make one"
        )
    if plan is None and (wire or vram is not None or placements is not None):
        from hotloop.planner import plan as make_plan

        plan = make_plan(
            facts,
            tokens=max_seq_len,
            vram=vram,
            lora=_rank(source, full_finetuning),
            bits=bits,
            dtype=dtype,
            full_finetuning=full_finetuning,
            placements=placements,
        )
    if plan is not None:
        _require_plan(plan, facts, full_finetuning)
    wanted = Wanted(
        config=config,
        dtype=dtype,
        device=where,
        bits=bits,
        stored_in_4bit=stored_in_4bit,
        attn=attn,
        remote_code=trust_remote_code,
        trains=full_finetuning,
        plan=plan,
    )
    try:
        model = read_weights(source, files, spec, facts, wanted)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"out of device memory while loading {source.name}. {plan or ''}\nClose what else "
            f"uses the card, load with bits=4, or choose a smaller model. ({error})"
        ) from error
    model.config.name_or_path = model.name_or_path = source.name
    model.config.use_cache = False
    if source.adapter is not None:
        from peft import PeftModel

        adapted: Any = PeftModel.from_pretrained(model, str(source.adapter), is_trainable=True)
        model = adapted
    if wire:
        from hotloop.wiring import wire as wire_model

        wire_model(model, plan, family=family)
    return model, tokenizer


def _stretch_allocator() -> None:
    """Lets torch's allocator grow its segments, so that what it holds stays near what is used, as a budget supposes.

    For the whole process, and only for memory taken from now on. Torch has no public name for it at run time.

    Raises:
        UnsupportedError: this torch does not have the one that torch 2.10 to 2.15 have.
    """
    import torch

    name = "_accelerator_setAllocatorSettings"
    change = getattr(torch._C, name, None)
    if change is None:
        raise UnsupportedError(
            f"torch {torch.__version__} lacks torch._C.{name}, by which a budget has the allocator grow its segments: "
            "without it the process would hold more than the plan counts. Install a torch that has it (2.11 to 2.15 "
            "do), or load without vram=, which plans for all that is free."
        )
    change("expandable_segments:True")


def _rank(source: Source, full_finetuning: bool) -> int | None:
    """The rank, for the plan, of the adapter that comes with the base, or that a frozen base is loaded for."""
    if source.adapter is None:
        return None if full_finetuning else EXPECTED_RANK
    config = json.loads((source.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return config.get("r")


def _require_plan(plan: Plan, facts: ModelFacts, full_finetuning: bool) -> None:
    if len(plan.layers) != facts.layers:
        raise PlanError(
            f"the plan is for {len(plan.layers)} layers, the model has {facts.layers}; make one for it: "
            "hotloop.plan(name, tokens=...)"
        )
    if plan.has_weights_on_host and full_finetuning:
        raise PlanError(
            "the plan keeps weights on the host, where only frozen ones can live, but full_finetuning=True trains all. "
            "Plan with full_finetuning=True, or train adapters."
        )


def _refuse_remote_code(source: Source, trusted: bool) -> None:
    if trusted or not source.config.get("auto_map"):
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if source.config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise SecurityError(
            f"{source.name} runs Python code of its own "
            f"({', '.join(sorted(source.config['auto_map']))} in its config.json). Read that code, "
            "then pass trust_remote_code=True."
        )


def _config(
    source: Source, trust_remote_code: bool, rope_scaling: Mapping[str, Any] | None
) -> PreTrainedConfig:
    from transformers import AutoConfig

    if source.gguf is None:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=trust_remote_code)
    else:
        values = dict(source.config)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    if rope_scaling is not None:
        if any(isinstance(value, Mapping) for value in config.rope_parameters.values()):
            raise UnsupportedError(
                f"rope_scaling={dict(rope_scaling)}: this model keeps rope parameters for each "
                "kind of layer; set them in its config.json instead"
            )
        config.rope_parameters = {**config.rope_parameters, **rope_scaling}
        config.standardize_rope_params()
        config.validate_rope()
    return config


def _device(device: str | torch.device | None) -> torch.device:
    import torch

    present = torch.cuda.is_available()
    chosen = torch.device(device or ("cuda" if present else "cpu"))
    if chosen.type not in ("cuda", "cpu"):
        raise UnsupportedError(f"device {str(chosen)!r}: Hotloop runs on 'cuda' and on 'cpu'")
    if chosen.type == "cuda" and not present:
        raise UnsupportedError(
            f"device {str(chosen)!r} was asked for, but torch {torch.__version__} sees no CUDA "
            "device. Install a CUDA build of torch and check the driver (`hotloop doctor`), or "
            "pass device='cpu'."
        )
    return torch.device("cuda", torch.cuda.current_device()) if str(chosen) == "cuda" else chosen


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    import torch

    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None) or dtype
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(f"dtype={dtype!r}; expected bfloat16, float16, float32 or None")
    return dtype
