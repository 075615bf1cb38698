"""What a model does behind its layers: what the logits are divided by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kinds import own_code

if TYPE_CHECKING:
    from .reading import Reading

CLOSE = 1e-2


def read_logits(reading: Reading) -> None:
    """Runs the root on hidden states of our own and compares with its head's product."""
    model = reading.model
    with torch.no_grad():
        hidden = torch.randn(
            1, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0)
        )
        hook = model.get_submodule(reading.decoder).register_forward_hook(
            lambda *_: _Outputs(hidden)
        )
        try:
            with own_code(
                f"model_type={model.config.model_type!r} does not run on hidden states of ours"
            ):
                found = model(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits
        finally:
            hook.remove()
        plain = model.get_output_embeddings()(hidden)
    cap = reading.config.get(reading.keys.get("logit_softcap", ""))
    if cap:
        found = torch.atanh((found / cap).clamp(-1 + 1e-7, 1 - 1e-7)) * cap
    divisor = float(plain.square().sum() / (plain * found).sum())
    if abs(divisor - 1) > CLOSE:
        factor = reading.key_with(1 / divisor, CLOSE)
        if factor is not None:
            reading.missing.append(f"logits that are multiplied by {factor!r}")
        else:
            reading.name("logit_divisor", divisor, "what the logits are divided by", CLOSE)


class _Outputs(dict[str, Tensor]):
    """Hidden states in the shape of a decoder's output."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> Any:
        return None

    def __getitem__(self, index: Any) -> Tensor:
        return self.last_hidden_state
