"""`add_lora`: low-rank adapters (arXiv:2106.09685) by PEFT, on the projections that a family
describes.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Literal

from hotloop_core import FamilySpec, discover
from hotloop_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotloop_core.family import Config
    from peft import PeftModel
    from transformers import PreTrainedModel

    from hotloop.planner.make import Placements


def add_lora(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 3407,
    rslora: bool = False,
    bias: Literal["none", "all", "lora_only"] = "none",
    modules_to_save: Sequence[str] | None = None,
    placements: Placements | None = None,
    family: str | None = None,
) -> PeftModel:
    """Puts LoRA adapters on a model: y = W x + s B A dropout(x), s = alpha / r (rslora: alpha /
    sqrt(r)).

    Only the adapters (and what `bias` and `modules_to_save` name) train. They are kept in fp32, as
    PEFT does, whatever the base is in. The same seed gives the same A, and the global random state
    is left alone.

    Args:
        model: wired or not; a wired one gets a plan for its larger need, within the budget that it was wired for. What
            does not fit with the weights as they are moves more of these to the host.
        r: rank.
        alpha: see the equation.
        dropout: on the adapters' input, in [0, 1).
        targets: "all-linear": every projection of every decoder layer. A list of roles (q, k, v, o,
            gate, up, down; qkv, gate_up where they are fused) or module names (q_proj, ...). Any
            other text is a regular expression over whole module paths.
        seed: of A's random values.
        rslora: see the equation (arXiv:2312.03732).
        bias: which biases train: "none", "all", or "lora_only" (of the adapted layers).
        modules_to_save: trained in full, saved with the adapter.
        placements: fixed choices for the plan; None: those that it was made with, else the fastest that fits.
        family: as for `load`.

    Returns:
        A PEFT model; save_pretrained, merging and disabling are PEFT's own.

    Raises:
        ConfigError: an argument that cannot be, or a target that is nowhere in the model.
        BudgetError: the adapters do not fit beside the rest; names what would. The model is as it
            was.

    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from hotloop.homes import homes_of
    from hotloop.planner import plan_again
    from hotloop.wiring import receipt_of

    if isinstance(model, PeftModel):
        raise ConfigError(
            f"the model has the adapters {', '.join(model.peft_config)} already, which train on as they are: leave "
            "this call out; or add another with model.add_adapter, or start from the base"
        )
    if r < 1 or alpha <= 0 or not 0.0 <= dropout < 1.0:
        raise ConfigError(
            f"r={r}, alpha={alpha}, dropout={dropout}; expected r >= 1, alpha > 0, 0 <= dropout < 1"
        )
    config = model.config.to_dict()
    spec = discover().match(config, family=family)
    names = _modules(model, spec, targets)
    _check_saved(model, modules_to_save or ())
    roles = _roles(spec, config, names, model)
    receipt = receipt_of(model)
    if receipt is not None:  # before the adapters take the room that weights may have to leave
        ranks = dict.fromkeys(roles, r)
        receipt.replan(plan_again(model, receipt.plan, lora=ranks, placements=placements))
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        torch.manual_seed(seed)
        adapted = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=r,
                lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - PEFT divides by r, whatever it is
                lora_dropout=dropout,
                target_modules=names,
                bias=bias,
                use_rslora=rslora,
                modules_to_save=None if modules_to_save is None else list(modules_to_save),
            ),
        )
    homes = homes_of(model)
    if homes is not None:
        homes.rest()  # PEFT looked at every weight
    return adapted


def projections(spec: FamilySpec, config: Config) -> dict[str, str]:
    """Role -> path within the layer, of the projections that the family describes."""
    return spec.layer_spec(config, 0).projections


def _modules(
    model: PreTrainedModel, spec: FamilySpec, targets: str | Sequence[str]
) -> list[str] | str:
    """PEFT's target_modules: module names, each of which is in the model, or a regular expression
    that matches some.
    """
    paths = [name for name, _ in model.named_modules() if name]
    leaves = {path.rpartition(".")[2] for path in paths}
    by_role = {
        role: path.rpartition(".")[2]
        for role, path in projections(spec, model.config.to_dict()).items()
    }
    if isinstance(targets, str) and targets != "all-linear":
        if not any(re.fullmatch(targets, path) for path in paths):
            raise ConfigError(
                f"targets={targets!r} matches no module path; expected 'all-linear', a list of "
                "names, or a regular expression for paths such as "
                f"{spec.layers}.0.{next(iter(projections(spec, model.config.to_dict()).values()))}"
            )
        return targets
    wanted = list(by_role) if targets == "all-linear" else list(targets or ())
    if not wanted:
        raise ConfigError(f"targets={targets!r}; name at least one module, or 'all-linear'")
    names = [by_role.get(name, name) for name in wanted]
    for name in names:
        if name.rpartition(".")[2] not in leaves:
            near = difflib.get_close_matches(name, sorted(leaves | by_role.keys()), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"targets: no module is named {name!r}.{hint} The projections are "
                f"{', '.join(by_role.values())}."
            )
    return sorted(set(names))


def _check_saved(model: PreTrainedModel, names: Sequence[str]) -> None:
    """PEFT passes by a name that is nowhere."""
    if isinstance(names, str):
        raise ConfigError(f"modules_to_save={names!r}; expected a list of names, [{names!r}]")
    paths = [path for path, _ in model.named_modules() if path]
    for name in names:
        if not any(path.endswith(name) for path in paths):
            leaves = sorted({path.rpartition(".")[2] for path in paths})
            near = difflib.get_close_matches(name, leaves, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"modules_to_save: no module is named {name!r}, so nothing would train it.{hint} Embedding and head "
                "are embed_tokens and lm_head in most models."
            )


def _roles(
    spec: FamilySpec, config: dict, names: list[str] | str, model: PreTrainedModel
) -> list[str]:
    """The roles that get an adapter, for the plan."""
    roles: list[str] = []
    for role, path in projections(spec, config).items():
        if isinstance(names, str):
            hit = re.fullmatch(names, f"{spec.layers}.0.{path}") is not None
        else:
            hit = any(f".{path}".endswith(f".{name}") for name in names)
        if hit:
            roles.append(role)
    return roles
