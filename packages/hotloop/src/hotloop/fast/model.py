"""FastLanguageModel: `load`, `add_lora` and `export` under the names that such scripts use."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

from hotloop_core.errors import ConfigError, UnsupportedError

from .refusals import FROM_PRETRAINED, GET_PEFT_MODEL, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hotloop.planner.make import Placements

Checkpointing = Literal["auto", "offload", "unsloth"] | bool

_ENDS = ("embed_tokens", "lm_head")

_VRAM = "hotloop_vram"
"""The attribute in which a model keeps the budget that it was loaded for."""


def is_bfloat16_supported() -> bool:
    """Whether this machine trains in bf16: a card that has it in hardware, or a CPU, where autocast
    has it.
    """
    import torch

    if not torch.cuda.is_available():
        return True
    return torch.cuda.is_bf16_supported(including_emulation=False)


class FastLanguageModel:
    """Loads a model and puts adapters on it. All methods are static; the model is transformers' and
    PEFT's own.
    """

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        *,
        vram: str | int | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        attn_implementation: str | None = None,
        use_gradient_checkpointing: Checkpointing = "auto",
        family: str | None = None,
        **others: Any,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """`hotloop.load` under the field's names: returns (model, tokenizer).

        load_in_16bit and full_finetuning each mean that the base is not quantised, whatever
        load_in_4bit says by default. device_map: one device, as "cuda:1" or {"": 1}, or a word that
        leaves the choice. `others` is only there to be refused by name.

        Raises:
            UnsupportedError, UnknownArgumentError: an argument that Hotloop does not have. Else as
            `hotloop.load`.

        """
        refuse(
            "from_pretrained", others, _names(FastLanguageModel.from_pretrained), FROM_PRETRAINED
        )
        from hotloop.loading import load

        model, tokenizer = load(
            model_name,
            bits=4 if load_in_4bit and not (load_in_16bit or full_finetuning) else 16,
            dtype=dtype,
            max_seq_len=max_seq_length,
            vram=vram,
            family=family,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn=attn_implementation,
            device=_one_device(device, device_map),
            token=token,
            local_files_only=local_files_only,
            rope_scaling=rope_scaling,
            full_finetuning=full_finetuning,
            placements=_placements(use_gradient_checkpointing, vram),
        )
        model.__dict__["max_seq_length"] = max_seq_length
        model.__dict__[_VRAM] = vram
        _add_saving(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        r: int = 16,
        target_modules: str | Sequence[str] = "all-linear",
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: Literal["none", "all", "lora_only"] = "none",
        use_gradient_checkpointing: Checkpointing = "auto",
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        max_seq_length: int | None = None,
        **others: Any,
    ) -> PeftModel:
        """`hotloop.add_lora` under the field's names.

        use_gradient_checkpointing: "auto": the fastest plan that fits the memory. "offload": every layer's input waits
        on the host and all else is recomputed; under a budget (`vram` of from_pretrained) the fastest plan that fits.
        "unsloth" is what scripts for others say; it means "offload". True: recompute every layer. False: keep
        everything. embed_tokens and lm_head among target_modules train whole, as if they stood in modules_to_save.
        `others` is only there to be refused by name.

        Raises:
            UnsupportedError, UnknownArgumentError: an argument that Hotloop does not have. Else as
            `hotloop.add_lora`.

        """
        refuse("get_peft_model", others, _names(FastLanguageModel.get_peft_model), GET_PEFT_MODEL)
        from peft import PeftModel

        adapted_already = isinstance(model, PeftModel)
        if not adapted_already and any(p.requires_grad for p in model.parameters()):
            raise ConfigError(
                "get_peft_model: the model's weights train already (full_finetuning=True); leave "
                "this call out, or load without full_finetuning"
            )
        loaded = getattr(model, "max_seq_length", None)
        if max_seq_length not in (None, loaded):
            raise ConfigError(
                f"get_peft_model(max_seq_length={max_seq_length}): the model was loaded for "
                f"{loaded}; pass it to from_pretrained"
            )
        from hotloop.lora import add_lora

        targets, saved = _whole_ends(target_modules, modules_to_save)
        adapted = add_lora(
            model,
            r=r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            targets=targets,
            seed=random_state,
            rslora=use_rslora,
            bias=bias,
            modules_to_save=saved,
            placements=_placements(use_gradient_checkpointing, getattr(model, _VRAM, None)),
        )
        _add_saving(adapted)
        return adapted

    @staticmethod
    def for_training(
        model: PreTrainedModel, use_gradient_checkpointing: Checkpointing | None = None
    ) -> PreTrainedModel:
        """Training mode, without a key/value cache. use_gradient_checkpointing: plan again for it;
        None: as planned.
        """
        if use_gradient_checkpointing is not None:
            vram = getattr(model, _VRAM, None)
            _replan(model, _placements(use_gradient_checkpointing, vram))
        model.config.use_cache = False
        return model.train()

    @staticmethod
    def for_inference(model: PreTrainedModel) -> PreTrainedModel:
        """Evaluation mode, with a key/value cache."""
        model.config.use_cache = True
        return model.eval()


class FastModel(FastLanguageModel):
    """The same for any installed family; FastLanguageModel is not limited to some either."""


def _names(function: Any) -> list[str]:
    return [n for n in inspect.signature(function).parameters if n not in ("others", "model")]


def _whole_ends(
    targets: str | Sequence[str], saved: Sequence[str] | None
) -> tuple[str | Sequence[str], Sequence[str] | None]:
    """Embedding and head from the modules with adapters to those that train whole, which is what scripts mean."""
    ends = [] if isinstance(targets, str) else [n for n in targets if n in _ENDS]
    if not ends:
        return targets, saved
    return [n for n in targets if n not in ends], sorted({*ends, *(saved or ())})


def _one_device(
    device: str | torch.device | None, device_map: str | Mapping[str, Any] | None
) -> str | torch.device | None:
    """The device that both name, None where neither does.

    Raises:
        UnsupportedError: a map over several devices.
    """
    if device_map is None or device_map in ("auto", "sequential", "balanced"):
        return device
    named = device_map if isinstance(device_map, str) else device_map.get("")
    named = f"cuda:{named}" if isinstance(named, int) else named
    alone = isinstance(device_map, str) or len(device_map) == 1
    another = device is not None and str(device) != str(named)
    if named is None or not alone or another or named in ("disk", "balanced_low_0"):
        raise UnsupportedError(
            f"from_pretrained: device_map={device_map!r} with device={device!r}; a model lives on one device here: "
            "pass device='cuda:1', or vram= for weights that wait on the host"
        )
    return named


def _placements(checkpointing: Checkpointing, vram: str | int | None) -> Placements | None:
    from hotloop.planner import checkpointing_placements

    if checkpointing in ("offload", "unsloth"):
        return None if vram is not None else "offload"
    return checkpointing_placements(checkpointing)


def _replan(model: PreTrainedModel, placements: Placements | None) -> None:
    from hotloop.planner import plan
    from hotloop.wiring import receipt_of

    receipt = receipt_of(model)
    if receipt is None or receipt.plan is None:
        return
    now = receipt.plan
    new = plan(
        model,
        tokens=now.tokens,
        longest=now.longest,
        vram=now.budget,
        placements=placements,
        homes=now,
        nf4_kv=any(layer.nf4_kv for layer in now.layers),
        dequantised=bool(now.dequantised),
    )
    receipt.replan(new)


def _add_saving(model: PreTrainedModel | PeftModel) -> None:
    from .saving import add_saving

    add_saving(model)
