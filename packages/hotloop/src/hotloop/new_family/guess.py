"""Makes a family's description of what a small model of it shows, and says what it could not find out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hotloop_core import API, Attention, ConfigKeys, FamilySpec, Glu, LayerSpec, Norms
from hotloop_core.errors import UnsupportedError
from torch import nn

from .absent import fill_absent
from .attention import read_attention
from .kinds import own_code, without_warnings
from .mlp import read_mlp
from .norms import read_norms
from .probe import Difference, difference, drop_ignored, unread_keys
from .reading import Reading, halves, read_keys
from .root import read_logits
from .tiny import Tiny, build, tiny
from .trace import CLOSE, Call, trace


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A description, the small config that it was read from, and what a human has to look at."""

    family: FamilySpec
    tiny: Tiny
    notes: tuple[str, ...]


@without_warnings()
def guess(model_type: str) -> Guess:
    """A family's description, read from a small model that transformers builds.

    Everything is found by what the model computes: which norm stands where, which projection (or which rows of one) is
    q, k, v, gate or up, how heads turn, the activation, multipliers, which switch of the config brings a bias.

    Raises:
        UnsupportedError: transformers does not have it, it is no dense decoder of text, or its layers have what no
            description says; everything that is missing is listed.
    """
    small = tiny(model_type)
    with own_code(f"model_type={model_type!r}: a small model of it cannot be built"):
        model = build(small.config())
    reading = Reading(model, trace(model), model.config.to_dict())
    both = [halves(model, layer) for layer in reading.seen.layers]
    attention, mlp = both[0]
    read_keys(reading)
    read_norms(reading, attention, mlp)
    read_attention(reading, [each for each, _ in both])
    read_mlp(reading, mlp)
    _read_strays(reading)
    read_logits(reading)
    if reading.missing:
        raise _unsaid(model_type, reading.missing)
    family = _family(model_type, reading, attention, mlp, _biases(small, reading))
    with own_code(f"model_type={model_type!r}: a model that was wired as guessed does not run"):
        found = difference(family, small.config())
    if not found.none:
        raise _unsaid(model_type, [_unexplained(found)])
    family, absent = fill_absent(drop_ignored(family, small), small)
    refused, unread = unread_keys(family, small)
    family = replace(family, keys=replace(family.keys, refused=refused))
    notes = (
        *reading.notes,
        "exports: none said; an exporter may need facts of its own, as GGUF does",
        *absent,
        *unread,
    )
    return Guess(family=family, tiny=small, notes=notes)


def _unexplained(found: Difference) -> str:
    if found.near <= CLOSE:
        return "attention that changes with a token's position, beside its rotation"
    return f"something that the experiments missed: wired, its results differ by {found.near:.1e}"


def _unsaid(model_type: str, missing: list[str]) -> UnsupportedError:
    lines = "\n".join(f"- {what}" for what in missing)
    return UnsupportedError(
        f"model_type={model_type!r} has what no description says:\n{lines}\n"
        "Train it without wiring it, or bring the block that is missing: docs/write-a-block.md"
    )


def _read_strays(reading: Reading) -> None:
    """Parameters that belong to no projection and no norm."""
    norms = [call.module for call in reading.first.norms()]
    strays = [
        f"{path}.{name}".lstrip(".")
        for path, module in reading.first.whole.module.named_modules()
        if not isinstance(module, nn.Linear) and module not in norms
        for name, _ in module.named_parameters(recurse=False)
    ]
    if strays:
        reading.missing.append(f"parameters of no projection and no norm: {', '.join(strays)}")


def _biases(small: Tiny, reading: Reading) -> dict[str, bool | str]:
    """Which projections have a bias: yes, no, or the switch that says so."""
    groups = {
        "qkv_bias": ("q", "k", "v", "qkv"),
        "o_bias": ("o",),
        "bias": ("gate", "up", "gate_up", "down"),
    }

    def biased(model: Any) -> dict[str, bool]:
        layer = model.get_submodule(reading.seen.path)[0]
        found: dict[str, bool] = {}
        for name, roles in groups.items():
            paths = [reading.paths[role] for role in roles if role in reading.paths]
            have = {layer.get_submodule(path).bias is not None for path in paths}
            found[name] = True in have
            if len(have) > 1:
                reading.notes.append(f"biases: not all of {', '.join(paths)} have one")
        return found

    now = biased(reading.model)
    result: dict[str, bool | str] = dict(now)
    switches = [k for k, v in reading.config.items() if "bias" in k and isinstance(v, bool)]
    for flipped in [*([switch] for switch in switches), switches]:
        try:
            model = build(small.config({each: not reading.config[each] for each in flipped}))
        except (
            Exception
        ):  # the config takes some switches only together; the last turn flips them all
            continue
        for name, value in biased(model).items():
            if value != now[name] and not isinstance(result[name], str):
                own = (each for each in flipped if ("mlp" in each) == (name == "bias"))
                result[name] = next(own, flipped[0])
    return result


def _family(
    model_type: str, reading: Reading, attention: Call, mlp: Call, biases: dict[str, bool | str]
) -> FamilySpec:
    model, paths = reading.model, reading.paths
    assert reading.seen.final_norm is not None
    names = {module: name for name, module in model.named_modules()}
    norms = {"before_attention": None, "before_mlp": None, **reading.norms}

    def of(*roles: str) -> dict[str, Any]:
        return {role: paths[role] for role in roles if role in paths}

    spec = LayerSpec(
        norms=Norms(**norms),
        attention=Attention(
            **of("q", "k", "v", "qkv", "o", "q_norm", "k_norm"),
            **reading.heads,
            module=attention.path,
            qkv_bias=biases["qkv_bias"],
            o_bias=biases["o_bias"],
        ),
        mlp=Glu(**of("gate", "up", "gate_up", "down"), module=mlp.path, bias=biases["bias"]),
    )
    return FamilySpec(
        api=API,
        name=model_type,
        model_types=frozenset({model_type}),
        layer=spec,
        keys=ConfigKeys(**reading.keys),
        decoder=reading.decoder,
        layers=reading.seen.path,
        embedding=names[model.get_input_embeddings()],
        final_norm=reading.seen.final_norm.path,
        head=names[model.get_output_embeddings()],
    )
