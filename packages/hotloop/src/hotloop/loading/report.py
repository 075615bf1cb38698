"""What a load did: who read the weights, how long it took, and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_REPORT = "_hotloop_load"


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Of one `load`.

    reader: "hotloop", each tensor straight to its home; or "transformers", the whole model to the device and from there
    to the homes, with the reason. seconds: for weights, from the first to the last. tensors: read by "hotloop".
    on_host: what lives in host memory, with its size; None where nothing does.
    """

    reader: Literal["hotloop", "transformers"]
    reason: str | None
    seconds: float
    tensors: int | None = None
    on_host: str | None = None

    def __str__(self) -> str:
        by = self.reader if self.reason is None else f"{self.reader}, because {self.reason}"
        host = "" if self.on_host is None else f"; {self.on_host}"
        return f"weights read by {by} in {self.seconds:.1f} s{host}"


def load_report(model: Any) -> LoadReport | None:
    """The report of a model that `hotloop.load` gave (or of the model under PEFT); None for any other."""
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    return root.__dict__.get(_REPORT)


def attach(model: Any, report: LoadReport) -> None:
    """Keeps a model's report with it."""
    model.__dict__[_REPORT] = report
