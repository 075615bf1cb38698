"""Context managers that change a model for a measurement and leave it exactly as it was found."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from hotloop.wiring import wire
from hotloop.wiring.classes import STATE, wired_class

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hotloop.wiring import Receipt

_ABSENT = object()


@contextmanager
def attributes(changes: Iterable[tuple[object, str, Any]]) -> Iterator[None]:
    """Inside, each (owner, name, value) holds; afterwards what was on the instance is there again."""
    found: list[tuple[object, str, Any]] = []
    try:
        for owner, name, value in changes:
            found.append((owner, name, vars(owner).get(name, _ABSENT)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(found):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextmanager
def training_without_dropout(model: nn.Module, device: torch.device) -> Iterator[bool]:
    """Training mode with nothing random in it; yields whether any dropout was turned off."""
    changes: list[tuple[object, str, Any]] = []
    drops = False
    for module in model.modules():
        dropout = isinstance(module, _DropoutNd)
        drops |= dropout and module.p > 0
        changes.append((module, "training", not dropout))
        if vars(module).get("attention_dropout"):
            drops = True
            changes.append((module, "attention_dropout", 0.0))
        if getattr(module, "gradient_checkpointing", False):
            changes.append((module, "gradient_checkpointing", False))
    devices = [device] if device.type == "cuda" else []
    with attributes(changes), torch.random.fork_rng(devices=devices), torch.enable_grad():
        yield drops


def checkpointed(model: nn.Module) -> Any:
    """Inside, the model's own layers are recomputed in backward, so that eager needs the memory of one layer.

    The same operations run twice on the same inputs, so no bit of the result depends on it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    run = partial(checkpoint, use_reentrant=False)
    return attributes(
        change
        for layer in layers
        for change in (
            (layer, "_gradient_checkpointing_func", run),
            (layer, "gradient_checkpointing", True),
        )
    )


@contextmanager
def wired(model: nn.Module, receipt: Receipt | None) -> Iterator[Receipt]:
    """The receipt of the model; one that was not wired is, for the time being."""
    if receipt is not None:
        yield receipt
        return
    temporary = wire(model)
    try:
        yield temporary
    finally:
        temporary.undo()


@contextmanager
def unwired(receipt: Receipt) -> Iterator[None]:
    """Inside, the model is as `receipt.undo()` leaves it; afterwards the same receipt holds again.

    Raises:
        UnwireError: something changed after wiring; nothing was undone.
    """
    states = [swap.module.__dict__[STATE] for swap in receipt.swaps]
    receipt.undo()
    try:
        yield
    finally:
        for swap, state in zip(receipt.swaps, states, strict=True):
            swap.module.__dict__[STATE] = state
            swap.module.__class__ = wired_class(swap.original, swap.role)
        receipt.model.config._attn_implementation = receipt.attention[1]  # type: ignore[union-attr]
        receipt.undone = False
