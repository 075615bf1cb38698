"""Changes one key of a config at a time and looks whether a described model still computes the same as its own code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core import Attention, Glu, Plugin, Registry, discover
from hotloop_core.errors import HotloopError

from .tiny import OPTIONAL, SIZES, SOFTCAP, Tiny, build, tokens
from .trace import CLOSE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hotloop_core import FamilySpec
    from torch import Tensor
    from transformers import PreTrainedConfig

FAR = 2**20
"""A position behind every length at which a model changes its attention."""
UNSAID = "changes the layers in a way that this description does not say"
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
    """A registry that holds one family, and every op that is installed: the family's layers may name one."""
    ops = discover().ops
    plugin = Plugin(name=family.name, distribution="?", version="?", families=(family,), ops=ops)
    return Registry((plugin,))


@dataclass(frozen=True)
class Difference:
    """How far a wired model is from itself, relative, in fp32; the larger of loss and logits.

    near: from position 0. far: behind every length at which a model changes its attention.
    """

    near: float
    far: float

    @property
    def none(self) -> bool:
        """Whether both are rounding."""
        return max(self.near, self.far) <= CLOSE


def difference(
    family: FamilySpec, config: PreTrainedConfig, *, training: bool = False
) -> Difference:
    """Runs a model of a config, wires it as `family` says, and runs it again.

    Raises:
        OwnCodeError: the model cannot be built or run as it is.
    """
    from hotloop.wiring import wire

    try:
        model = build(config).train(training)
        own = _results(model)
    except Exception as error:  # the model's own code does not take the value
        raise OwnCodeError(_said(error)) from error
    wire(model, registry=registry_of(family))
    loss, logits, far = (
        float((wired - plain).norm() / plain.norm())
        for wired, plain in zip(_results(model), own, strict=True)
    )
    return Difference(max(loss, logits), far)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class OwnCodeError(Exception):
    """A model that does not run before anything was done to it."""


def _results(model: Any) -> tuple[Tensor, ...]:
    """Loss, logits, and logits of the same tokens far from the start, where some models scale differently."""
    ids = tokens(model.config)
    far = FAR + torch.arange(ids.shape[1]).expand_as(ids)
    found: list[Tensor] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for options in ({"labels": ids}, {}, {"position_ids": far}):
            torch.manual_seed(0)
            outputs = model(input_ids=ids, use_cache=False, **options)
            found.append(outputs.loss if "labels" in options else outputs.logits + 0)
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Unread:
    """Changes of a config, and what goes wrong with them.

    untried: why the model's own code does not take them; None where it does, and the described model then computes
    something else.
    """

    changes: dict[str, Any]
    untried: str | None = None

    def __str__(self) -> str:
        what = ", ".join(f"{key}={value!r}" for key, value in self.changes.items())
        return (
            f"{what}: {UNSAID}"
            if self.untried is None
            else f"{what} could not be tried: {self.untried}"
        )


def unread_changes(family: FamilySpec, small: Tiny) -> Iterator[Unread]:
    """Changes key by key; yields those that the description neither follows nor refuses."""
    base = small.config()
    values = base.to_dict()
    known = {*SIZES, "head_dim", *type(base).__mro__[1]().to_dict()}
    together = {key: not values[key] for key in bias_switches(family, values)}
    trials = [_trial(key, values) for key in values if key not in known]
    for changes in [*trials, *([together] if len(together) > 1 else [])]:
        key, changed = next(iter(changes.items()))
        if changed is None or any(word in key for word in _NOT_LAYERS):
            continue
        try:
            if _goes_wrong(family, small, changes, training="drop" in key):
                yield Unread(changes=changes)
        except OwnCodeError as error:
            if key not in together:  # those are also tried together
                yield Unread(changes=changes, untried=str(error))


def unread_keys(family: FamilySpec, small: Tiny) -> tuple[dict[str, str], tuple[str, ...]]:
    """Keys of the config that change the layers without the description's knowing.

    Returns switches and dropouts to refuse, with the reason, and notes on the others.
    """
    values = small.config().to_dict()
    switches = bias_switches(family, values)
    refused: dict[str, str] = {}
    notes: list[str] = []
    for found in unread_changes(family, small):
        key = next(iter(found.changes))
        if found.untried is None and not values[key] and key not in switches:
            refused[key] = UNSAID
        else:
            notes.append(str(found))
    return refused, tuple(notes)


def drop_ignored(family: FamilySpec, small: Tiny) -> FamilySpec:
    """The description without keys that have no value by default and that the model's own code then passes by.

    Gemma 3's config has the cap of Gemma 2's attention, its attention has not.
    """
    values = small.config().to_dict()
    for name in ("attention_softcap", "logit_softcap", "window"):
        key = getattr(family.keys, name)
        if key is None or values[key] is not None:
            continue
        without = replace(family, keys=replace(family.keys, **{name: None}))
        changes = _trial(key, values)
        try:
            wrong = [
                _goes_wrong(each, small, changes, training=False) for each in (family, without)
            ]
        except OwnCodeError:  # the value does not go with the others
            continue
        if wrong == [True, False]:
            family = without
    return family


def bias_switches(family: FamilySpec, config: Mapping[str, Any]) -> list[str]:
    """The keys of the config that bring a bias, as the description says."""
    layer = family.layer_spec(config, 0)
    said: list[bool | str] = []
    if isinstance(layer.attention, Attention):
        said += [layer.attention.qkv_bias, layer.attention.o_bias]
    if isinstance(layer.mlp, Glu):
        said.append(layer.mlp.bias)
    return sorted({each for each in said if isinstance(each, str)})


def _trial(key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The key with another value, first, and what makes that value count."""
    value, changed = values[key], None
    if isinstance(value, bool):
        changed = not value
    elif value is None:
        guess = True if key.startswith("use_") else SOFTCAP if "softcap" in key else None
        changed = OPTIONAL.get(key, guess)
    elif isinstance(value, float):
        changed = 0.5 if value == 0 else value * 1.5
    window = {"sliding_window": OPTIONAL["sliding_window"]}
    counts = changed is True and "window" in key and window.keys() <= values.keys()
    return {key: changed, **(window if counts else {})}


def _goes_wrong(
    family: FamilySpec, small: Tiny, changes: dict[str, Any], *, training: bool
) -> bool:
    """Whether these changes make a difference that the description neither follows nor refuses.

    Raises:
        OwnCodeError: the model's own code does not take them.
    """
    try:
        config = small.config(changes)
    except Exception as error:  # the config checks itself
        raise OwnCodeError(_said(error)) from error
    try:
        return not difference(family, config, training=training).none
    except HotloopError:
        return False
