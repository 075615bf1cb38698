"""Asking a model: the conversation goes through its chat template, the answer comes back as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase


class _Pieces(TextStreamer):
    """Hands each finished piece of text to a function instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, take: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._take(text)


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's next message.

    Args:
        model: in any mode; it is evaluated, and put back into its mode.
        tokenizer: with a chat template.
        messages: {role, content}, the last one the question.
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token each time.
        on_text: called with each piece of the answer as soon as it is there.

    """
    device = model.device
    inputs: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs = inputs.to(device)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(
            **inputs,
            **sampling,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=None if on_text is None else _Pieces(tokenizer, on_text),
        )
    model.train(training)
    return str(
        tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    )
