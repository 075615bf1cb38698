"""Makes a family's description of what a small model of it shows, and says what it could not find out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hotloop_core import API, Attention, ConfigKeys, FamilySpec, Glu, LayerSpec, Norms
from hotloop_core.errors import UnsupportedError

from .probe import difference, unread_keys
from .read import (
    Reading,
    decoder_path,
    final_norm,
    halves,
    read_attention,
    read_mlp,
    read_norms,
    read_root,
)
from .tiny import Tiny, build, tiny
from .trace import CLOSE, Call, trace


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A description, the small config that it was read from, and what a human has to look at."""

    family: FamilySpec
    tiny: Tiny
    notes: tuple[str, ...]


def guess(model_type: str) -> Guess:
    """A family's description, read from a small model that transformers builds.

    Roles of projections come from their names, everything else from what the model computes: which norm stands where,
    the activation, multipliers, which switch of the config brings a bias.

    Raises:
        UnsupportedError: transformers does not have it, it is no dense decoder of text, or its layers have what no
            description says; everything that is missing is listed.
    """
    small = tiny(model_type)
    model = build(small.config())
    reading = Reading(model, trace(model), model.config.to_dict())
    attention, mlp = halves(reading)
    read_norms(reading, attention, mlp)
    read_attention(reading, attention)
    read_mlp(reading, mlp)
    read_root(reading)
    if reading.missing:
        lines = "\n".join(f"- {what}" for what in reading.missing)
        raise UnsupportedError(
            f"model_type={model_type!r} has what no description says:\n{lines}\n"
            "Train it without wiring it, or bring a block of your own: docs/write-a-family.md"
        )
    family = _family(model_type, reading, attention, mlp, _biases(small, reading))
    family, distance = _with_rotation(family, small)
    notes = [
        *reading.notes,
        "exports: none said; an exporter may need facts of its own, as GGUF does",
    ]
    if distance > CLOSE:
        notes.append(
            f"the wired model's results differ from its own by {distance:.1e}: its layers are not as guessed. "
            "Layers of several kinds, a window or a rotation of its own are the usual reasons; read the model's code"
        )
        return Guess(family=family, tiny=small, notes=tuple(notes))
    refused, unread = unread_keys(family, small)
    family = replace(family, keys=replace(family.keys, refused=refused))
    return Guess(family=family, tiny=small, notes=(*notes, *unread))


def _biases(small: Tiny, reading: Reading) -> dict[str, bool | str]:
    """Which projections have a bias: yes, no, or the switch that says so."""
    groups = {"qkv_bias": ("q", "k", "v"), "o_bias": ("o",), "bias": ("gate", "up", "down")}

    def biased(model: Any) -> dict[str, bool]:
        layer = model.get_submodule(reading.seen.layers)[0]
        found: dict[str, bool] = {}
        for name, roles in groups.items():
            have = {layer.get_submodule(reading.paths[role]).bias is not None for role in roles}
            found[name] = True in have
            if len(have) > 1:
                reading.notes.append(f"biases: not all of {', '.join(roles)} have one")
        return found

    result: dict[str, bool | str] = dict(biased(reading.model))
    switches = [k for k, v in reading.config.items() if "bias" in k and isinstance(v, bool)]
    for switch in switches:
        now = biased(build(small.config({switch: not reading.config[switch]})))
        result |= {
            name: switch for name, value in now.items() if value != biased(reading.model)[name]
        }
    return result


def _family(
    model_type: str, reading: Reading, attention: Call, mlp: Call, biases: dict[str, bool | str]
) -> FamilySpec:
    model, paths = reading.model, reading.paths
    names = {module: name for name, module in model.named_modules()}
    norms = {"before_attention": None, "before_mlp": None, **reading.norms}
    heads: dict[str, Any] = {
        role: paths[role] for role in ("q", "k", "v", "o", "q_norm", "k_norm") if role in paths
    }
    spec = LayerSpec(
        norms=Norms(**norms),
        attention=Attention(
            **heads, module=attention.path, qkv_bias=biases["qkv_bias"], o_bias=biases["o_bias"]
        ),
        mlp=Glu(
            **{role: paths[role] for role in ("gate", "up", "down")},
            module=mlp.path,
            bias=biases["bias"],
        ),
    )
    return FamilySpec(
        api=API,
        name=model_type,
        model_types=frozenset({model_type}),
        layer=spec,
        keys=ConfigKeys(**reading.keys),
        decoder=decoder_path(reading),
        layers=reading.seen.layers,
        embedding=names[model.get_input_embeddings()],
        final_norm=names[final_norm(reading)],
        head=names[model.get_output_embeddings()],
    )


def _with_rotation(family: FamilySpec, small: Tiny) -> tuple[FamilySpec, float]:
    """The description with the pairs of the rotation that come nearest to the model's own results, and how near."""
    layer = family.layer
    assert isinstance(layer, LayerSpec) and isinstance(layer.attention, Attention)
    pairs = replace(layer, attention=replace(layer.attention, interleaved=True))
    found = [
        (each, difference(each, small.config())) for each in (family, replace(family, layer=pairs))
    ]
    return min(found, key=lambda pair: pair[1])
