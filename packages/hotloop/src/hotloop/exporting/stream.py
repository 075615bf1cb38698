"""The tensors of a live model, or of its adapter, as an exporter receives them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from hotloop_core import TensorEntry
from hotloop_core.errors import ExportError

from .merging import effective_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from torch import Tensor, device, dtype, nn

    from .places import Places


@dataclass(frozen=True)
class Tensors:
    """A TensorStream: every tensor once, in checkpoint order; nothing is loaded before an entry's `load()`."""

    entries: tuple[TensorEntry, ...]

    def __iter__(self) -> Iterator[TensorEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def dtype(self) -> str:
        """The torch name of the float dtype that most elements have: the model's own, whatever a
        trainer made of its norms.
        """
        elements: Counter[str] = Counter()
        for entry in self.entries:
            if "float" in entry.dtype:
                elements[entry.dtype] += prod(entry.shape)
        return elements.most_common(1)[0][0] if elements else "float32"


def merged_tensors(
    model: nn.Module, places: Places, *, tied: bool, device: device | None = None
) -> tuple[Tensors, bool]:
    """The tensors of a transformers model with what PEFT put into it merged away, and whether its head is still tied.

    tied: what the config says. A head that shares its parameter with the embedding is left out where the config ties
    them; one that an adapter has made different is given, and the answer is False. device: where tensors are brought
    and merged; None: where each is.

    Raises:
        UnsupportedError, ExportError: see `merging.effective_tensors`.

    """
    entries: list[TensorEntry] = []
    seen: set[int] = set()
    head_given = False
    for tensor in effective_tensors(model, device):
        place, part = places.find(tensor.name)
        if tied and tensor.shared is not None:
            if id(tensor.shared) in seen:
                continue
            seen.add(id(tensor.shared))
        head_given |= place.role == "head" and part == "weight"
        entries.append(
            TensorEntry(
                name=tensor.name,
                role=place.role,
                part=part,
                layer=place.layer,
                shape=tensor.shape,
                dtype=_name(tensor.dtype),
                load=_checked(tensor.name, tensor.load),
                rows=None if tensor.rows is None else _checked(tensor.name, tensor.rows),
            )
        )
    return Tensors(tuple(entries)), tied and not head_given


def adapter_tensors(file: Path, places: Places) -> Tensors:
    """The tensors of `adapter_model.safetensors` as PEFT wrote it, under PEFT's names."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        names: Iterable[str] = list(opened.keys())
        slices = {name: opened.get_slice(name) for name in names}
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        kinds = {
            name: _name(s[:0].dtype if shapes[name] else s[()].dtype) for name, s in slices.items()
        }

    def loader(name: str) -> Callable[[], Tensor]:
        def load() -> Tensor:
            with safe_open(file, framework="pt") as again:
                return again.get_tensor(name)

        return _checked(name, load)

    entries: list[TensorEntry] = []
    for name in names:
        path = name.removeprefix("base_model.model.")
        for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            owner, found, _ = path.partition(f".{part}")
            if found:
                place, part = places.find(f"{owner}.weight")[0], part.replace("embedding_", "")
                break
        else:
            place, part = places.find(path)
        entries.append(
            TensorEntry(
                name=name,
                role=place.role,
                part=part,
                layer=place.layer,
                shape=shapes[name],
                dtype=kinds[name],
                load=loader(name),
            )
        )
    return Tensors(tuple(entries))


def _name(kind: dtype) -> str:
    return str(kind).removeprefix("torch.")


def _checked(name: str, load: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`load` without gradients and in full precision, refusing what is not finite."""

    def checked(*rows: int) -> Tensor:
        import torch

        whole = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda"))
        with torch.no_grad(), next(whole), next(whole):
            tensor = load(*rows)
            if tensor.is_floating_point() and tensor.numel():
                ends = tensor.aminmax()  # a NaN anywhere makes both NaN; one pass over the tensor
                if not (ends.min.isfinite() & ends.max.isfinite()):
                    bad = tensor.numel() - int(tensor.isfinite().sum())
                    raise ExportError(
                        f"{name} has {bad} of {tensor.numel()} values that are NaN or infinite. "
                        "Nothing was written: training diverged or the checkpoint is damaged. "
                        "Export an earlier checkpoint."
                    )
        return tensor

    return checked
