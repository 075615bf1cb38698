"""From a row to tokens: the text that the model sees, and which of its tokens are trained.

A row becomes one text and the spans of it that are trained, in characters; the tokenizer's offsets turn spans into
tokens. So what is trained is decided on the text that the chat template really made, not on a guess at its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from .recipe import DataSection
    from .rows import Record

IGNORED = -100
"""The label of a token that is not trained, as torch's cross entropy has it."""

Message = dict[str, Any]
Span = tuple[int, int]
Weighted = tuple[int, int, float]
"""A span and the weight of its tokens in the loss."""


@dataclass(frozen=True)
class Row:
    """One row: ids_T and labels_T (int32); a label is the id itself, or -100 where it is not trained.

    weights: fp32 [T], what the loss of each token is multiplied by, or None: all 1.
    """

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Row:
        weights = None if self.weights is None else self.weights[part]
        return Row(self.ids[part], self.labels[part], weights)

    @property
    def trained(self) -> int:
        """How many tokens are trained; the first of a row never is, since nothing predicts it."""
        return int((self.labels[1:] != IGNORED).sum())


class Renderer:
    """Turns rows of one form into tokens with one tokenizer.

    Raises:
        UnsupportedError: the tokenizer has no offsets. DataError: a chat without a chat template.

    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection, form: str) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedError(
                f"{type(tokenizer).__name__} gives no character offsets, which say what tokens are trained; "
                "use a checkpoint with a tokenizer.json"
            )
        if form == "chat" and not tokenizer.chat_template:
            raise DataError(
                "the rows are chats and the tokenizer has no chat template; "
                'name one (data.chat_template = "chatml") or use the form prompt_completion'
            )
        self.tokenizer = tokenizer
        self.form = form
        self.system = data.system
        self.fields = fields_of(data, form)
        self.weight_field = data.weight_field
        self.loss_on = data.loss_on or ("all" if form == "text" else "responses")

    def __call__(self, record: Record, where: str) -> Row:
        """The tokens of one row; `where` names it in errors."""
        row = self._render(record, where)
        if self.weight_field is None:
            return row
        weight = _weight(record[self.weight_field], self.weight_field, where)
        if row.weights is None and weight == 1:
            return row
        import numpy as np

        of_tokens = np.ones(len(row), np.float32) if row.weights is None else row.weights
        return Row(row.ids, row.labels, of_tokens * np.float32(weight))

    def _render(self, record: Record, where: str) -> Row:
        values = [record[field] for field in self.fields]
        if self.form == "chat":
            return self._chat(values[0], where)
        if self.form == "text":
            return self._plain("", _string(values[0], self.fields[0], where))
        prompt, completion = values
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._chat([*prompt, *completion], where, answers_from=len(prompt))
        return self._plain(
            _string(prompt, self.fields[0], where), _string(completion, self.fields[1], where)
        )

    def _plain(self, prompt: str, completion: str) -> Row:
        end = str(self.tokenizer.eos_token or "")
        text = prompt + completion + end
        start = len(prompt) if self.loss_on == "responses" else 0
        return self._encode(text, [(start, len(text), 1.0)], special=True)

    def _chat(self, messages: Any, where: str, answers_from: int = 0) -> Row:
        messages = check_messages(messages, where)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
            answers_from += 1
        text = render(self.tokenizer, messages, where)
        if self.loss_on == "all":
            return self._encode(text, [(0, len(text), 1.0)], special=False)
        spans = [
            (*_answer_span(self.tokenizer, messages, index, text, where), weight)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
            and index >= answers_from
            and (weight := _weight(message.get("weight", 1), "weight", where))
        ]
        return self._encode(text, spans, special=False)

    def _encode(self, text: str, spans: Sequence[Weighted], *, special: bool) -> Row:
        import numpy as np

        encoding = self.tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        ids = np.asarray(encoding["input_ids"], dtype=np.int32)
        offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets[:, 0], offsets[:, 1]
        trained = np.zeros(len(ids), dtype=bool)
        weights = np.ones(len(ids), dtype=np.float32)
        for start, end, weight in spans:
            # A token belongs to the answer in which it starts: one that straddles the border was begun by the prompt.
            inside = (starts >= start) & (starts < end) & (ends > starts)
            trained |= inside
            weights[inside] = weight
        labels = np.where(trained, ids, IGNORED).astype(np.int32)
        return Row(ids, labels, None if (weights == 1).all() else weights)


def fields_of(data: DataSection, form: str) -> tuple[str, ...]:
    """The fields that hold the text of rows of this form."""
    return {
        "chat": (data.messages_field,),
        "prompt_completion": (data.prompt_field, data.completion_field),
        "text": (data.text_field,),
    }[form]


def find_form(data: DataSection, record: Record) -> str:
    """The form asked for, or the one whose fields the first row has."""
    if data.form != "auto":
        return data.form
    forms = ("chat", "prompt_completion", "text")
    for form in forms:
        if all(field in record for field in fields_of(data, form)):
            return form
    expected = "; ".join(f"{form}: {', '.join(fields_of(data, form))}" for form in forms)
    raise DataError(
        f"the first row has the fields {', '.join(map(repr, record))}, which fit no form ({expected}). "
        "Set data.form and name its fields (data.messages_field, data.prompt_field ...)."
    )


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, *, ask: bool = False
) -> str:
    """The text of a conversation; with `ask`, up to where the assistant's answer would start."""
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        )
    except Exception as error:  # a template raises what its author chose
        raise DataError(f"{where}: the chat template refused this conversation: {error}") from error


def check_messages(messages: Any, where: str) -> list[Message]:
    """The messages of one row, as {role, content}.

    Raises:
        DataError: not a list of messages, or a message without role and content.

    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected a list of messages, found {_shown(messages)}")
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            hint = (
                " (hotloop.standardize_data_formats turns from/value into role/content)"
                if isinstance(message, dict) and "from" in message
                else ""
            )
            raise DataError(
                f"{where}: a message is {_shown(message)}, expected role and content{hint}"
            )
    return messages


def _answer_span(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], index: int, text: str, where: str
) -> Span:
    """Where the answer `messages[index]`, with the token that ends it, lies in the text of the conversation.

    It starts where the conversation up to the question, asking for an answer, stops agreeing with the text, and ends
    where the conversation up to the answer does. Both agree all the way unless the template treats the last turn
    differently; then what the template adds only there is left out.
    """
    before = render(tokenizer, messages[:index], where, ask=True) if index else ""
    after = render(tokenizer, messages[: index + 1], where)
    start, end = _common(before, text), _common(after, text)
    found = text[start:end]
    content = messages[index]["content"]
    if isinstance(content, str) and content.strip() not in found:
        raise DataError(
            f"{where}: the chat template changes an earlier answer ({_shown(content)}), so it cannot be told what the "
            'model should learn. Make each answer the last turn of a row, or set data.loss_on = "all".'
        )
    trimmed = found.rstrip()
    if trimmed.endswith(tuple(tokenizer.all_special_tokens)):
        end = start + len(trimmed)  # a line break after the end-of-turn token is never generated
    return start, end


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common from the start."""
    differs = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


def _weight(value: Any, field: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise DataError(f"{where}: {field!r} is {_shown(value)}, expected a number from 0")
    return float(value)


def _string(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is {_shown(value)}, expected text")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
