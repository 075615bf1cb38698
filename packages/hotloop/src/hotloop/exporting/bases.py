"""What a QLoRA adapter is merged into: the 4-bit weights it was trained against, or the 16-bit ones before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hotloop_core.errors import DataError

from .checkpoint import on_original

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Base = Literal["trained", "original"]
NOTES = {
    "trained": "merged into the dequantised 4-bit weights that the adapter was trained against",
    "original": "merged into the original 16-bit weights, not the 4-bit ones that the adapter was trained against",
}


@dataclass(frozen=True)
class BaseLosses:
    """Held-out loss of the adapter on each base: mean over trained tokens, in nats."""

    trained: float
    original: float
    tokens: int

    @property
    def better(self) -> Base:
        """The base with the smaller loss; the one trained against where they are equal."""
        return "original" if self.original < self.trained else "trained"

    def __str__(self) -> str:
        return (
            f"held-out loss over {self.tokens:,} tokens: {self.trained:.4f} on the dequantised 4-bit base, "
            f"{self.original:.4f} on the original 16-bit base ({self.original - self.trained:+.4f})"
        )


def compare_bases(model: Any, batches: Iterable[Mapping[str, Any]]) -> BaseLosses:
    """The held-out loss of a QLoRA model, and of its adapter on the original 16-bit weights.

    model: a PEFT model with one active adapter on a 4-bit base. batches: keyword arguments of its forward, `labels`
    among them.

    Raises:
        DataError: no trained token. ConfigError, ExportError: see `hotloop.export` with base="original".

    """
    held_out = list(batches)
    trained, tokens = mean_loss(model, held_out)
    device = next(model.parameters()).device
    original, _ = mean_loss(on_original(model).to(device), held_out)
    return BaseLosses(trained, original, tokens)


def mean_loss(model: Any, batches: Iterable[Mapping[str, Any]]) -> tuple[float, int]:
    """(mean loss over the trained tokens of `batches` in nats, how many those are).

    Raises:
        DataError: there is none.

    """
    import torch

    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            count = int((batch["labels"][:, 1:] != -100).sum())
            inputs = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
            total += float(model(**inputs).loss) * count
            tokens += count
    model.train(training)
    if not tokens:
        raise DataError("no held-out token to compare on; set data.held_out in the recipe")
    return total / tokens, tokens
