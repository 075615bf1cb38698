"""The model of a recipe: loaded, its adapter added, its memory planned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from hotloop_core.plan import Plan
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .recipe import Recipe


def load_base(
    recipe: Recipe, *, wire: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's model without an adapter; with `wire`, ready for training."""
    from hotloop.loading import load

    section = recipe.model
    return load(
        section.name,
        bits=section.bits,
        dtype=section.dtype,
        max_seq_len=section.max_seq_len,
        vram=section.vram,
        family=section.family,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        full_finetuning=recipe.lora is None,
        wire=wire,
    )


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer alone, for looking at rows without waiting for weights."""
    from hotloop.loading import load_tokenizer

    section = recipe.model
    return load_tokenizer(
        section.name, revision=section.revision, trust_remote_code=section.trust_remote_code
    )


def build(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's model, ready to train: with a new adapter, or with every weight trainable."""
    from hotloop.lora import add_lora

    model, tokenizer = load_base(recipe)
    if recipe.lora is None:
        return model, tokenizer
    lora = recipe.lora
    adapted: Any = add_lora(
        model,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        seed=lora.seed,
        rslora=lora.rslora,
        modules_to_save=lora.modules_to_save,
    )
    return adapted, tokenizer


def load_trained(recipe: Recipe, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's model with the adapter in `folder` (or, after full fine-tuning, the model there), for inference."""
    if recipe.lora is None:
        section = recipe.model.model_copy(update={"name": str(folder)})
        model, tokenizer = load_base(recipe.model_copy(update={"model": section}), wire=False)
        return model.eval(), tokenizer
    from peft import PeftModel
    from transformers import AutoTokenizer
    from transformers.trainer_utils import align_special_tokens

    base, _ = load_base(recipe, wire=False)
    model: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    # The run's own, with its chat template; a token that ends answers there ends them here, as Trainer has it.
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    align_special_tokens(model, tokenizer)
    return model.eval(), tokenizer


def lora_rank(recipe: Recipe) -> int:
    """The adapter's rank; 0 for full fine-tuning."""
    return 0 if recipe.lora is None else recipe.lora.r


def plan_batch(model: PreTrainedModel, recipe: Recipe, *, longest: int) -> Plan | None:
    """Plans memory for this recipe's batches and hands the plan to the wired model; None for one that is not wired."""
    from hotloop.planner import plan
    from hotloop.wiring import receipt_of

    receipt = receipt_of(model)
    if receipt is None:
        return None
    tokens = recipe.schedule.batch_size * recipe.model.max_seq_len
    planned = plan(
        model,
        tokens=tokens,
        longest=longest,
        vram=recipe.model.vram,
        bits=recipe.model.bits,
        full_finetuning=recipe.lora is None,
        optimizer=recipe.schedule.optimizer,
        homes=receipt.plan,
    )
    receipt.replan(planned)
    return planned
