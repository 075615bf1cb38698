"""From a row to tokens: the text that the model sees, and which of its tokens are trained.

A row becomes one text and the spans of it that are trained, in characters; the tokenizer's offsets turn spans into
tokens. So what is trained is decided on the text that the chat template really made, not on a guess at its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import DataError, UnsupportedError

from .conversation import Conversation, check_messages, check_tools, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from .recipe import DataSection
    from .rows import Record

IGNORED = -100
"""The label of a token that is not trained, as torch's cross entropy has it."""

TOOLS = "tools"
"""The field of a chat with the tools that its assistant may call, as JSON schemas."""

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
        tools = record.get(TOOLS)
        if self.form == "chat":
            return self._chat(values[0], tools, where)
        if self.form == "text":
            return self._plain("", _string(values[0], self.fields[0], where), where)
        prompt, completion = values
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._chat([*prompt, *completion], tools, where, answers_from=len(prompt))
        texts = [_string(v, f, where) for v, f in zip(values, self.fields, strict=True)]
        return self._plain(texts[0], texts[1], where)

    def _plain(self, prompt: str, completion: str, where: str) -> Row:
        end = str(self.tokenizer.eos_token or "")
        text = prompt + completion + end
        start = len(prompt) if self.loss_on == "responses" else 0
        return self._encode(text, [(start, len(text), 1.0)], where, special=True)

    def _chat(self, messages: Any, tools: Any, where: str, answers_from: int = 0) -> Row:
        messages = check_messages(messages, where)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
            answers_from += 1
        chat = Conversation(self.tokenizer, messages, check_tools(tools, where), where)
        text = chat.text()
        if self.loss_on == "all":
            return self._encode(text, [(0, len(text), 1.0)], where, special=False)
        spans = [
            (*chat.answer_span(index, text), weight)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
            and index >= answers_from
            and (weight := _weight(message.get("weight", 1), "weight", where))
        ]
        return self._encode(text, spans, where, special=False)

    def _encode(self, text: str, spans: Sequence[Weighted], where: str, *, special: bool) -> Row:
        import numpy as np

        if not _encodable(text):
            raise DataError(
                f"{where}: half a surrogate pair (\\ud800 to \\udfff), which is no character; correct the row"
            )
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


def _weight(value: Any, field: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise DataError(f"{where}: {field!r} is {shown(value)}, expected a number from 0")
    return float(value)


def _string(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is {shown(value)}, expected text")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
