"""What is to be planned for: a config read through its family, and a loaded model measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hotloop_core import Attention, CustomBlock, Glu, ModelFacts, discover, facts_of
from hotloop_core.errors import ConfigError, UnsupportedError

from .job import OPTIMIZER_BYTES, Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is read from a loaded model. ranks: role -> rank of the adapters that it has. outside_frozen:
    neither its embedding nor its head trains.
    """

    frozen_bytes: int
    trained_bytes: int
    adapted: bool
    ranks: Mapping[str, int]
    bits: int
    width: int
    full: bool
    outside_frozen: bool

    def refine(self, job: Job, planned_lora: bool) -> Job:
        """`job` with the model's own bytes and ranks; an adapter that is still to come keeps those that
        were worked out.
        """
        known = self.trained_bytes if self.adapted or not planned_lora else None
        return replace(
            job,
            bits=self.bits,
            width=self.width,
            full=self.full,
            ranks=self.ranks if self.adapted else job.ranks,
            weight_bytes=self.frozen_bytes,
            trained_bytes=known,
            outside_frozen=self.outside_frozen,
        )


def read(source: Any, family: str | None, optimizer: str) -> tuple[ModelFacts, Measured | None]:
    """The facts of a model, config, path or hub id; of a model what it weighs, too.

    Raises:
        NoFamilyError, ConfigError, CheckpointError: as reading its config says.
        UnsupportedError: layers that the planner cannot count.

    """
    if isinstance(source, ModelFacts):
        return source, None
    model = source if hasattr(source, "named_parameters") else None
    if model is not None:
        source = source.config
    if hasattr(source, "to_dict"):
        source = source.to_dict()
    if isinstance(source, str | PathLike):
        source = _config_at(source)
    if not isinstance(source, Mapping):
        raise ConfigError(
            f"found {type(source).__name__}; expected a model, its config, a mapping as in "
            "config.json, a path or a hub id"
        )
    spec = discover().match(source, family=family)
    config = {**spec.keys.defaults, **source}
    layer = spec.layer_spec(config, 0)
    for part in (layer.attention, layer.mlp):
        if not isinstance(part, Attention | Glu | CustomBlock):
            raise UnsupportedError(
                f"family {spec.name!r}: the planner counts Attention, Glu and a family's own block; "
                f"this one has {type(part).__name__}. Wire it without a plan."
            )
    facts = facts_of(spec, config)
    return facts, None if model is None else _measure(model, optimizer, layer.projections)


def _config_at(source: str | PathLike[str]) -> Mapping[str, Any]:
    """The config of a path or hub id; a path may name the config.json itself, since no weight is read."""
    from hotloop.loading.source import locate

    path = Path(source)
    if path.suffix != ".json" or not path.is_file():
        return locate(source).config
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); expected a model's config.json") from error
    if not isinstance(config, Mapping):
        raise ConfigError(f"{path} holds {type(config).__name__}, expected a model's config.json")
    return cast("Mapping[str, Any]", config)


def _measure(model: PreTrainedModel, optimizer: str, projections: Mapping[str, str]) -> Measured:
    frozen = trained = quantised = 0
    adapted = False
    ranks: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        module, adapter, _ = name.partition(".lora_A.")
        for role, path in projections.items():
            if adapter and module.endswith(f".{path}"):
                ranks[role] = max(ranks.get(role, 0), parameter.shape[0])
        if parameter.requires_grad:
            state = OPTIMIZER_BYTES[optimizer] * parameter.numel()
            adapter = ".lora_" in name or ".modules_to_save." in name
            adapted |= adapter
            frozen += 0 if adapter else size
            trained += int((2 if adapter else 1) * size + state)
            continue
        frozen += size
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            quantised += 1
            nested = getattr(state, "state2", None)
            tensors = [state.absmax] + ([] if nested is None else [nested.absmax])
            frozen += sum(t.numel() * t.element_size() for t in tensors)
    embedding: Any = model.get_input_embeddings()
    return Measured(
        frozen_bytes=frozen,
        trained_bytes=trained,
        adapted=adapted,
        ranks=ranks,
        bits=4 if quantised else 16,
        width=embedding.weight.element_size(),
        full=bool(trained) and not adapted,
        outside_frozen=not any(
            parameter.requires_grad
            for module in (embedding, model.get_output_embeddings())
            if module is not None
            for parameter in module.parameters()
        ),
    )


def ranks_of(lora: int | Mapping[str, int] | None, facts: ModelFacts) -> dict[str, int]:
    """Role -> LoRA rank; empty without LoRA.

    Raises:
        ConfigError: a role that is none, or a rank below 1.

    """
    roles = facts.linear_shapes()
    ranks = (
        {}
        if lora is None
        else dict(lora)
        if isinstance(lora, Mapping)
        else dict.fromkeys(roles, lora)
    )
    unknown = ranks.keys() - roles.keys()
    if unknown or not all(whole(rank) and rank >= 1 for rank in ranks.values()):
        raise ConfigError(
            f"lora={lora!r}: expected a rank of 1 or more, or of each of {', '.join(roles)}"
        )
    return ranks


def whole(number: object) -> bool:
    """Whether it is a whole number, and not a truth value."""
    return isinstance(number, Integral) and not isinstance(number, bool)
