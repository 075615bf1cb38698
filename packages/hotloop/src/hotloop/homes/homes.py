"""`Homes`: where the frozen weights of a model wait, the way to the device, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from hotloop_core import Attention, CustomBlock, FamilySpec, Glu, Plan
from hotloop_core.errors import PlanError, UnsupportedError, UnwireError
from hotloop_core.plan import amount
from hotloop_engine.stores import HostBuffer, StreamedWeights
from torch import Tensor, nn

from .classes import HOME, Housed, HousedModel, house, housed_class
from .ends import EmbeddingHome, HeadHome, HostEmbedding, HostHead, head_home, is_linear
from .streamed import Streamed, StreamedHome
from .weights import over, parts, require_frozen

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class Housing:
    """One module whose class was replaced."""

    path: str
    module: nn.Module
    original: type[nn.Module]
    kind: type[Housed]

    @property
    def holds(self) -> bool:
        """Whether the module still is what it was made."""
        return type(self.module) is housed_class(self.original, self.kind)


@dataclass(eq=False)
class Copied:
    """A layer in a store. leaves: each projection's path and module, and where its parts are among the layer's."""

    index: int = -1
    leaves: list[tuple[str, Any, slice]] = field(default_factory=list)


class Homes:
    """Where the frozen weights of one model wait, and how they come to the device.

    device: where the model computes. layers: the decoder layers that stream, in order.
    """

    def __init__(self, model: Any, plan: Plan, spec: FamilySpec, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.layers = plan.streamed
        self._model, self._spec = model, spec
        self._store: StreamedWeights | None = StreamedWeights(device) if self.layers else None
        self._index: dict[int, int] = {}
        self._head: HeadHome | None = None
        self._housings: list[Housing] = []
        if plan.has_weights_on_host:
            self._house("", model, HousedModel, self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "a wired model whose weights live on the host is not copied or pickled as a whole; save its adapter "
            "(save_pretrained), export it (hotloop.export), or undo first: receipt_of(model).undo(), then "
            "homes_of(model).undo()"
        )

    def fetch(self, layer: int, next_layer: int | None = None) -> None:
        """Work queued after this call sees the weights of decoder layer `layer`.

        next_layer: the layer that the pass comes to next, in either direction; the nearest one that streams, from
        there on, sets out. Nothing happens for a layer that is resident.
        """
        index = self._index.get(layer)
        if index is None:
            return
        upcoming = None
        if next_layer is not None:
            step = 1 if next_layer > layer else -1
            upcoming = index + step if 0 <= index + step < len(self._index) else None
        self._stream().fetch(index, next_index=upcoming)

    def fetch_in_turn(self, layer: int) -> None:
        """`fetch` where modules are called one by one, layer after layer and pass after pass, as in generation."""
        index = self._index[layer]
        self._stream().fetch(index, next_index=(index + 1) % len(self._index))

    def views(self, layer: int) -> Sequence[Tensor]:
        """The tensors of a streamed layer on the device; they hold its values after its fetch."""
        return self._stream().views(self._index[layer])

    def rest(self) -> None:
        """Gives back the device memory that layers pass through, until the next pass takes it again.

        Whoever only looks at a weight, as PEFT does for its device, has made that memory before it is of use.
        """
        if self._store is not None:
            self._store.rest()
            for housing in self._housings:
                home = housing.module.__dict__[HOME]
                if isinstance(home, StreamedHome):
                    home.forget()

    def start_head(self) -> None:
        """The head's weight sets out, if it lives on the host; reading `lm_head.weight` then need not wait for it."""
        if self._head is not None:
            self._head.start()

    def drop_head(self) -> None:
        """Gives back a head's weight that set out and was not read."""
        if self._head is not None:
            self._head.drop()

    def hold(self, plan: Plan) -> bool:
        """Whether all that `plan` has on the host is there."""
        housed = {housing.path for housing in self._housings}
        return (
            set(plan.streamed) <= set(self._index)
            and (not plan.embedding_on_host or self._spec.embedding in housed)
            and (not plan.head_on_host or self._spec.head in housed)
        )

    def move(self, plan: Plan) -> None:
        """Moves to the host what `plan` has there; what is there already stays. Before or after `wire`.

        A layer is copied before any changes, so a host that cannot hold them leaves the model as it was.

        Raises:
            PlanError: the plan would bring weights back to the device. Else as `house_layer` and `house_ends`.
        """
        layers = plan.streamed
        housed = {housing.path for housing in self._housings}
        if not (
            set(self._index) <= set(layers)
            and (plan.embedding_on_host or self._spec.embedding not in housed)
            and (plan.head_on_host or self._spec.head not in housed)
        ):
            raise PlanError(
                "the plan brings weights back to the device; undo the homes and settle the model by it instead"
            )
        for layer in layers:
            for path, leaf in self._projections(layer):
                require_frozen(path, leaf._parameters["weight"])
        self._ends(plan)
        if layers != tuple(self._index):
            store = StreamedWeights(self.device)
            copies = {layer: self._copy(layer, store) for layer in layers}
            before, self._store, self._index = self._store, store, {}
            for layer, copied in copies.items():
                self._point(layer, copied)
            if before is not None:
                before.close()
        self.plan, self.layers = plan, layers
        self.house_ends()

    def house_layer(self, layer: int) -> None:
        """Moves the projections of a streamed layer to the host. In the order of layers, each once.

        Raises:
            PlanError: a weight trains. UnsupportedError: it is no plain or bitsandbytes 4-bit linear.
            BudgetError: the host cannot lock memory for it.
        """
        self._point(layer, self._copy(layer, self._stream()))

    def house_ends(self) -> None:
        """Moves the embedding and the head to the host, where the plan says so; tied, they share one copy.

        Raises:
            PlanError: a weight trains, or one of two tied weights is to stay. UnsupportedError: a head that is no plain
                linear. BudgetError: the host cannot lock memory for it.
        """
        rows, matrix, tied = self._ends(self.plan)
        if self.plan.embedding_on_host and HOME not in rows.__dict__:
            self._to_host(self._spec.embedding, rows)
            home = EmbeddingHome(self._spec.embedding, self.device)
            self._house(self._spec.embedding, rows, HostEmbedding, home)
        if self.plan.head_on_host and HOME not in matrix.__dict__:
            if tied:
                matrix._parameters["weight"] = rows._parameters["weight"]
            else:
                self._to_host(self._spec.head, matrix)
            weight = matrix._parameters["weight"]
            self._head = head_home(self._spec.head, weight, self.device)
            self._house(self._spec.head, matrix, HostHead, self._head)

    def undo(self) -> None:
        """Brings every weight back to the device, bit for bit, and gives every module its own class.

        Raises:
            UnwireError: something changed since (a wiring on top, say); nothing was undone.
        """
        changed = [h for h in self._housings if not h.holds]
        if changed:
            first = changed[0]
            raise UnwireError(
                f"{first.path or 'the model'}: expected the {first.original.__name__} that lives on the host, found "
                f"{type(first.module).__module__}.{type(first.module).__name__}; undo the later change first, such "
                "as a wiring: receipt_of(model).undo()"
            )
        moved: dict[int, Any] = {}  # tied weights stay tied
        for housing in reversed(self._housings):
            module = housing.module
            weight = module._parameters.get("weight")
            if weight is not None:
                if id(weight) not in moved:
                    moved[id(weight)] = self._to_device(weight)
                module._parameters["weight"] = moved[id(weight)]
                if getattr(module, "quant_state", None) is not None:
                    module.__dict__["quant_state"] = moved[id(weight)].quant_state
            module.__class__ = housing.original
            del module.__dict__[HOME]
        self._housings.clear()
        self._index.clear()
        self.drop_head()
        self._head = None
        if self._store is not None:
            self._store.close()

    def __str__(self) -> str:
        sizes: dict[str, int] = {}
        for housing in self._housings:
            weight = housing.module._parameters.get("weight")
            if weight is not None:
                kind = "layers" if housing.kind is Streamed else housing.path
                nbytes = sum(t.nbytes for t in parts(weight))
                sizes[kind] = sizes.get(kind, 0) + nbytes
        found = ", ".join(f"{name} {amount(size)}" for name, size in sizes.items())
        return f"on the host: {found or 'nothing'}"

    def _stream(self) -> StreamedWeights:
        if self._store is None:
            raise PlanError(
                "the plan streams no layer; make one that does, and settle the model by it"
            )
        return self._store

    def _house(self, path: str, module: nn.Module, kind: type[Housed], home: object) -> None:
        self._housings.append(Housing(path, module, type(module), kind))
        house(module, kind, home)

    def _copy(self, layer: int, store: StreamedWeights) -> Copied:
        """Copies the projections of a layer into a store; they themselves stay as they are."""
        copied, tensors = Copied(), []
        for path, leaf in self._projections(layer):
            weight = leaf._parameters["weight"]
            require_frozen(path, weight)
            pieces = parts(weight)
            copied.leaves.append((path, leaf, slice(len(tensors), len(tensors) + len(pieces))))
            tensors += pieces
        copied.index = store.add_layer(tensors)
        return copied

    def _point(self, layer: int, copied: Copied) -> None:
        """Gives the projections of a layer their copies in the store at hand."""
        self._index[layer] = copied.index
        host = self._stream().host(copied.index)
        for path, leaf, span in copied.leaves:
            _put(leaf, host[span])
            home = StreamedHome(self, layer, path, span)
            if HOME in leaf.__dict__:
                leaf.__dict__[HOME] = home  # it streamed before, from another store
            else:
                self._house(path, leaf, Streamed, home)

    def _projections(self, layer: int) -> list[tuple[str, Any]]:
        """(path, the linear that holds the weight) of each projection that streams."""
        spec = self._spec.layer_spec(self._model.config.to_dict(), layer)
        for part in (spec.attention, spec.mlp):
            if not isinstance(part, Attention | Glu | CustomBlock):
                raise UnsupportedError(
                    f"{self._spec.layers}.{layer}: dense layers stream; this one has {type(part).__name__}. Plan with "
                    "its weights resident."
                )
        paths = [f"{self._spec.layers}.{layer}.{path}" for path in spec.projections.values()]
        modules = ((path, self._model.get_submodule(path)) for path in dict.fromkeys(paths))
        return [(path, _linear(path, module)) for path, module in modules]

    def _ends(self, plan: Plan) -> tuple[Any, Any, bool]:
        """The embedding, the head, and whether they share a weight; None where the plan moves neither."""
        spec = self._spec
        if not (plan.embedding_on_host or plan.head_on_host):
            return None, None, False
        embedding: Any = self._model.get_submodule(spec.embedding)
        head: Any = self._model.get_submodule(spec.head)
        if plan.embedding_on_host:
            embedding = _base(spec.embedding, embedding)
            require_frozen(spec.embedding, embedding._parameters["weight"])
        if plan.head_on_host:
            head = _base(spec.head, head)
            require_frozen(spec.head, head._parameters["weight"])
            if not is_linear(head):
                raise UnsupportedError(
                    f"{spec.head}: a {type(head).__name__} cannot live on the host; expected nn.Linear. Plan with the "
                    "head resident."
                )
        tied = _weight(head) is _weight(embedding) is not None
        if tied and plan.embedding_on_host != plan.head_on_host:
            raise PlanError(
                f"{spec.embedding} and {spec.head} share one weight; the plan puts only one of them on the host. Plan "
                "with both there, or neither."
            )
        return embedding, head, tied

    def _to_host(self, path: str, module: nn.Module) -> None:
        weight = module._parameters["weight"]
        assert weight is not None
        require_frozen(path, weight)
        buffer = HostBuffer(weight.nbytes, self.device)
        host = buffer.view(0, weight.shape, weight.dtype).copy_(weight.detach())
        module._parameters["weight"] = nn.Parameter(host, requires_grad=False)

    def _to_device(self, weight: Tensor) -> Any:
        tensors = [t.to(self.device, copy=True) for t in parts(weight)]
        return over(weight, tensors, lambda table: table.to(self.device))


def _base(path: str, module: nn.Module) -> Any:
    """The module that holds the weight, under LoRA."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, LoraLayer):
        return module.get_base_layer()  # type: ignore[attr-defined]
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise UnsupportedError(
            f"{path}: a {type(module).__name__} trains it, or may; only frozen weights, with LoRA or without, live on "
            "the host. Plan with it resident."
        )
    return module


def _weight(module: Any) -> Any:
    """The weight that a module multiplies by, under LoRA; where it lives on the host, that, not a copy of it."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return base._parameters["weight"] if HOME in base.__dict__ else getattr(base, "weight", None)


def _linear(path: str, module: nn.Module) -> Any:
    leaf = _base(path, module)
    quantised = getattr(leaf._parameters.get("weight"), "quant_state", None) is not None
    if quantised or is_linear(leaf):
        return leaf
    raise UnsupportedError(
        f"{path}: a {type(leaf).__module__}.{type(leaf).__name__} does not stream; nn.Linear and bitsandbytes' "
        "quantised Linear4bit do. Plan with its weights resident."
    )


def _put(leaf: Any, tensors: Sequence[Tensor]) -> None:
    """Gives a projection its weight over other memory, and lets go of the old."""
    weight = over(leaf._parameters["weight"], tensors, lambda table: table.to("cpu"))
    leaf._parameters["weight"] = weight
    if getattr(leaf, "quant_state", None) is not None:
        leaf.__dict__["quant_state"] = weight.quant_state
