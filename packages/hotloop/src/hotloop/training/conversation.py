"""A conversation as a chat template writes it: its text, and where in the text the answers are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]
"""From one character to before another."""


@dataclass(frozen=True)
class Conversation:
    """The messages of one row and the tools that its assistant may call; `where` names the row in errors."""

    tokenizer: PreTrainedTokenizerBase
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    where: str

    def text(self) -> str:
        """The text of the whole conversation.

        Raises:
            DataError: the template refuses it, or has no place for tools or for what the assistant calls.

        """
        text = self._render(self.messages)
        if self.tools and text == self._render(self.messages, tools=False):
            raise DataError(
                f"{self.where}: the row has tools and the chat template has no place for them; use the template of a "
                "model that calls tools, or leave them out"
            )
        for message in self.messages:
            for call in message.get("tool_calls") or ():
                name = _called(call, self.where)
                if name not in text:
                    raise DataError(
                        f"{self.where}: the assistant calls {name!r} and the chat template leaves it out; use the "
                        "template of a model that calls tools, or write the call into content"
                    )
        return text

    def answer_span(self, index: int, text: str) -> Span:
        """Where the answer `messages[index]`, with the token that ends it, lies in the text of the conversation.

        It starts where the conversation up to the question, asking for an answer, stops agreeing with the text, and
        ends where the conversation up to the answer does. Both agree all the way unless the template treats the last
        turn differently; then what the template adds only there is left out. An answer to nothing starts where another
        one would differ from it.
        """
        content = self.messages[index]["content"]
        after = self._render(self.messages[: index + 1])
        end = _common(after, text)
        if index:
            start = _common(self._render(self.messages[:index], ask=True), text)
        else:
            other = "+" if (content or "").lstrip().startswith("-") else "-"
            start = _common(self._render([{**self.messages[0], "content": other}]), text)
        found = text[start:end]
        if content is not None and content.strip() not in found:
            raise DataError(
                f"{self.where}: the chat template changes an earlier answer ({shown(content)}), so it cannot be told "
                'what the model should learn. Make each answer the last turn of a row, or set data.loss_on = "all".'
            )
        trimmed = found.rstrip()
        if trimmed.endswith(tuple(self.tokenizer.all_special_tokens)):
            end = start + len(
                trimmed
            )  # a line break after the end-of-turn token is never generated
        return start, end

    def _render(self, messages: list[Message], *, ask: bool = False, tools: bool = True) -> str:
        """With `ask`, up to where the assistant's answer would start."""
        template: Any = self.tokenizer.apply_chat_template
        try:
            return str(
                template(
                    messages,
                    tools=self.tools if tools else None,
                    tokenize=False,
                    add_generation_prompt=ask,
                )
            )
        except Exception as error:  # a template raises what its author chose
            raise DataError(
                f"{self.where}: the chat template refused this conversation: {error}"
            ) from error


def check_messages(messages: Any, where: str) -> list[Message]:
    """The messages of one row, as {role, content}; content in parts of text becomes one text.

    Raises:
        DataError: not a list of messages, a message without role and content, or content that is no text.

    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected a list of messages, found {shown(messages)}")
    return [_message(message, where) for message in messages]


def _message(message: Any, where: str) -> Message:
    if (
        not isinstance(message, dict)
        or not isinstance(message.get("role"), str)
        or not ("content" in message or message.get("tool_calls"))
    ):
        hint = (
            " (hotloop.standardize_data_formats turns from/value into role/content)"
            if isinstance(message, dict) and "from" in message
            else ""
        )
        raise DataError(f"{where}: a message is {shown(message)}, expected role and content{hint}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise DataError(f"{where}: the content of a message is {shown(content)}, expected text")
    return {**message, "content": content}


def _part(part: Any, where: str) -> str:
    """A template for text alone would write the part as Python prints it."""
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    raise DataError(
        f"{where}: a part of a message is {shown(part)}, expected text; only text is trained"
    )


def check_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """The tools of one row, a list of JSON schemas or that list as JSON text.

    Raises:
        DataError: something else.

    """
    if not tools:
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: 'tools' is no well-formed JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools' is {shown(tools)}, expected a list of JSON schemas")
    return tools


def _called(call: Any, where: str) -> str:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise DataError(f"{where}: a tool call is {shown(call)}, expected a function with a name")
    return name


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common from the start."""
    differs = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


def shown(value: Any) -> str:
    """A value for a message: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
