"""What wiring did to one model, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import PlanError, UnwireError
from hotloop_core.plan import RECOMPUTE_ALL

from hotloop.homes import carried_out, move_more

from . import masks, optimizer
from .classes import STATE, wired_class

if TYPE_CHECKING:
    from hotloop_core import FamilySpec, Plan
    from hotloop_engine.stores import HostActivationStore
    from torch import nn

    from .layer import Shared


@dataclass(frozen=True, eq=False)
class Swap:
    """One module whose class was replaced."""

    path: str
    module: nn.Module
    original: type[nn.Module]
    role: str

    @property
    def holds(self) -> bool:
        """Whether the module still is what wiring made it."""
        return type(self.module) is wired_class(self.original, self.role)


def check_plan(plan: Plan, layers: int) -> None:
    """Refuses a plan of another model, and one that names what no layer saves.

    Raises:
        PlanError: which.
    """
    if len(plan.layers) != layers:
        raise PlanError(
            f"the plan is for {len(plan.layers)} layers, the model has {layers}; make one for this model: "
            "hotloop.plan(model, tokens=...)"
        )
    known = {"x", *RECOMPUTE_ALL.placements}
    unknown = {name for layer in plan.layers for name in layer.placements} - known
    if unknown:
        raise PlanError(
            f"the plan places {', '.join(sorted(unknown))}; a layer saves {', '.join(sorted(known))}"
        )


def unwire(module: nn.Module, original: type[nn.Module]) -> None:
    """Makes one module what it was."""
    module.__class__ = original
    del module.__dict__[STATE]


@dataclass(eq=False)
class Receipt:
    """What was replaced, what was left alone and why. `undo()` restores every class and the attention name.

    left_alone: path -> reason. attention: (what config._attn_implementation was, what it is).
    """

    model: nn.Module
    family: FamilySpec
    shared: Shared
    swaps: list[Swap]
    attention: tuple[str, str]
    left_alone: dict[str, str] = field(default_factory=dict)
    undone: bool = False

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self.shared.plan

    @property
    def store(self) -> HostActivationStore | None:
        """Where offloaded tensors wait, for its statistics; None before the first pass that offloads."""
        return self.shared.waiting.last_store

    def replan(self, plan: Plan) -> None:
        """Puts another plan in force for the next forward. What it has on the host moves there; nothing comes back.

        Raises:
            PlanError: the plan is for another model, or leaves on the device some of what is on the host while it moves
                more. UnsupportedError, BudgetError: as `hotloop.homes.settle`. The plan in force stays then.
        """
        check_plan(plan, len(self.shared.plan.layers))
        if not carried_out(self.shared.homes, plan):
            self.shared.homes = move_more(self.model, plan, self.family)
        self.shared.plan = plan
        self.shared.recorder.clear()

    def undo(self) -> None:
        """Gives the model back as it was before wiring. Weights and adapters are not touched.

        Raises:
            UnwireError: something changed after wiring; nothing was undone.
        """
        if self.undone:
            raise UnwireError(
                "this wiring was undone before; wire the model again to get a new receipt"
            )
        changed = [s for s in self.swaps if not s.holds]
        if changed:
            first = changed[0]
            raise UnwireError(
                f"{first.path or 'the model'}: expected the wired {first.original.__name__}, found "
                f"{type(first.module).__module__}.{type(first.module).__name__}; undo the later change first "
                f"({len(changed)} of {len(self.swaps)} modules changed, nothing was undone)"
            )
        name = self.model.config._attn_implementation  # type: ignore[union-attr]
        if name != self.attention[1]:
            raise UnwireError(
                f"config._attn_implementation: expected {self.attention[1]!r}, found {name!r}; somebody called "
                "set_attn_implementation after wiring. Set it back, then undo."
            )
        for swap in self.swaps:
            unwire(swap.module, swap.original)
        for module in self.model.modules():  # copies that somebody made of a wired module since
            if STATE in module.__dict__:
                unwire(module, type(module).__bases__[0])
        self.model.config._attn_implementation = self.attention[0]  # type: ignore[union-attr]
        optimizer.release(self.model)
        self.shared.recorder.clear()
        self.undone = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        masks.register(
            state["attention"][0]
        )  # another process may be the one that reads this pickle
        self.__dict__.update(state)
        if not self.undone:
            optimizer.attend(self.model)

    def __str__(self) -> str:
        roles: dict[str, int] = {}
        for swap in self.swaps:
            roles[swap.role] = roles.get(swap.role, 0) + 1
        counts = ", ".join(f"{n} {role}{'s' if n > 1 else ''}" for role, n in roles.items())
        lines = [f"wired {type(self.model).__name__} as {self.family.name}: {counts}"]
        lines += [f"  left alone: {path}: {why}" for path, why in self.left_alone.items()]
        return "\n".join([*lines, str(self.plan)])

    def to_dict(self) -> dict[str, Any]:
        """What a program would read."""
        return {
            "family": self.family.name,
            "swaps": [
                {"path": s.path, "role": s.role, "class": s.original.__name__} for s in self.swaps
            ],
            "left_alone": self.left_alone,
            "undone": self.undone,
        }
