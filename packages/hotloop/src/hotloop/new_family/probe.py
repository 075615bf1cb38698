"""Changes one key of a config at a time and looks whether a described model still computes the same as its own code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hotloop_core import Plugin, Registry
from hotloop_core.errors import HotloopError

from .tiny import OPTIONAL, SIZES, Tiny, build, multipliers, tokens
from .trace import CLOSE

if TYPE_CHECKING:
    from hotloop_core import FamilySpec
    from torch import Tensor
    from transformers import PreTrainedConfig

_NOT_LAYERS = (
    "token",
    "cache",
    "initializer",
    "pretraining",
    "return",
    "output_",
    "architectures",
    "dtype",
    "tie_",
)


def registry_of(family: FamilySpec) -> Registry:
    """A registry that holds one family."""
    plugin = Plugin(name=family.name, distribution="?", version="?", families=(family,))
    return Registry((plugin,))


def difference(family: FamilySpec, config: PreTrainedConfig, *, training: bool = False) -> float:
    """How far a model wired as `family` says is from itself, relative, in fp32: the larger of loss and logits."""
    from hotloop.wiring import wire

    model = build(config).train(training)
    ids = tokens(config)

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        torch.manual_seed(0)
        return loss, model(input_ids=ids, use_cache=False).logits + 0

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        own = run()
        wire(model, registry=registry_of(family))
        pairs = zip(run(), own, strict=True)
        return max(float((wired - plain).norm() / plain.norm()) for wired, plain in pairs)


def unread_keys(family: FamilySpec, small: Tiny) -> tuple[dict[str, str], tuple[str, ...]]:
    """Keys of the config that change the layers without the description's knowing.

    Returns switches and dropouts to refuse, with the reason, and notes on the others.
    """
    base = small.config()
    values = base.to_dict()
    known = {*SIZES, "head_dim", *multipliers(values), *type(base).__mro__[1]().to_dict()}
    refused: dict[str, str] = {}
    notes: list[str] = []
    for key, value in values.items():
        if key in known or any(word in key for word in _NOT_LAYERS):
            continue
        changed = _changed(key, value)
        if changed is None:
            continue
        found = _tried(family, small, {key: changed}, training="dropout" in key or "pdrop" in key)
        if found is None:
            continue
        if isinstance(value, bool | float) and not value:
            refused[key] = found
        else:
            notes.append(f"{key}={changed!r}: {found}")
    return refused, tuple(notes)


def _changed(key: str, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if value is None:
        return OPTIONAL.get(key)
    if isinstance(value, float):
        return 0.5 if value == 0 else value * 1.5
    return None


def _tried(
    family: FamilySpec, small: Tiny, changes: dict[str, Any], *, training: bool
) -> str | None:
    """What goes wrong with these changes; None if nothing does, or if it is refused with a reason already."""
    try:
        config = small.config(changes)
        found = difference(family, config, training=training)
    except HotloopError:
        return None
    except Exception as error:  # the model's own code does not take the value
        return f"the model's own code cannot run it ({type(error).__name__}: {error})"
    return (
        None if found <= CLOSE else "changes the layers in a way that this description does not say"
    )
