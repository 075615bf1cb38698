"""A chat template, from Jinja to the Go template that Ollama runs, by what it does.

Sentinel conversations are rendered and cut at their contents. What is left between two contents is taken to depend on
the roles before and after alone; further conversations show whether that is so. It holds for what most models are
tuned with. Dates are beyond it, and then there is no template here and a reason instead; tools and a switch for
thinking are left out of it, and `left_out` says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Render = Callable[[Sequence[Mapping[str, str]], bool], str]
_START = ""

_VARIABLES = {
    "tools": {"tools", "tool_calls"},
    "thinking": {"enable_thinking", "thinking", "reasoning_content"},
}
"""What a chat template may take beside messages, by the names that transformers and the templates give it."""


class NotFoundError(Exception):
    """The chat template is not of this simple kind; the message says what differs."""


@dataclass(frozen=True)
class Turns:
    """What stands between the contents of a conversation.

    before: (role of the message before, "" at the start; role) -> text before the content. opening: what follows the
    last user's content and opens the assistant's turn. system: what the template says where no system message is given.
    """

    before: Mapping[tuple[str, str], str]
    opening: str
    system: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as `go()` prints it; the last message is the user's."""
        text, previous = "", _START
        for message in messages:
            text += self.before[previous, message["role"]] + message["content"]
            previous = message["role"]
        return text + self.opening

    def go(self) -> str:
        """The same as a Go template over .Messages."""
        branches = [
            f'if and (eq $previous {_quoted(previous)}) (eq .Role "{role}") }}}}{_printed(text)}'
            "{{ .Content }}"
            for (previous, role), text in self.before.items()
        ]
        return (
            '{{- $previous := "" }}\n{{- range .Messages }}\n{{- '
            + "\n{{- else ".join(branches)
            + "\n{{- end }}\n{{- $previous = .Role }}\n{{- end }}\n"
            + f'{{{{- if eq $previous "user" }}}}{_printed(self.opening)}{{{{ end }}}}'
        )

    def without(self, bos: str) -> Turns:
        """The same where the reader puts `bos` before every text itself."""
        begun = [text for (previous, _), text in self.before.items() if previous == _START]
        if not all(text.startswith(bos) for text in begun):
            raise NotFoundError(f"it does not begin with {bos!r}, which the tokenizer adds")
        cut = {
            pair: text.removeprefix(bos) if pair[0] == _START else text
            for pair, text in self.before.items()
        }
        return Turns(cut, self.opening, self.system)


def find(render: Render, source: str) -> Turns:
    """What `render` puts between messages. source: the Jinja text.

    Raises:
        NotFoundError: it does more than that.

    """
    if "strftime_now" in source:
        raise NotFoundError("it prints today's date, which a Modelfile cannot")
    first, answer, between, opening = _cut(render, _talk("uau"))
    before = {
        (_START, "user"): first,
        ("user", "assistant"): answer,
        ("assistant", "user"): between,
    }
    system = ""
    proofs = [_talk("u"), _talk("uauau")]
    if _has_system(render):
        start, after, same = _cut(render, _talk("su"))
        before |= {(_START, "system"): start, ("system", "user"): after}
        proofs += [_talk("su"), _talk("suauau")]
        if same != opening:
            raise NotFoundError(
                "what opens the answer depends on whether there is a system message"
            )
        if first.startswith(start) and first.endswith(after) and len(first) >= len(start + after):
            system = first[len(start) : len(first) - len(after)]
    turns = Turns(before, opening, system)
    for messages in proofs:
        expected, found = render(messages, True), turns.render(messages)
        if expected != found:
            raise NotFoundError(
                f"of {len(messages)} messages it makes {expected!r}, where turns alone make {found!r}"
            )
    return turns


def left_out(source: str) -> list[str]:
    """What the Jinja text takes and `Turns` have not: "tools", "thinking"."""
    tags = re.findall(
        r"\{[{%].*?[%}]\}", re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL), re.DOTALL
    )
    words = set(re.findall(r"\w+", " ".join(tags)))
    return [what for what, names in _VARIABLES.items() if words & names]


def _talk(roles: str) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": f"Sentinel{i}qz"} for i, role in enumerate(roles)]


def _has_system(render: Render) -> bool:
    """Whether the template takes a system message: some refuse it, some drop it."""
    messages = _talk("su")
    try:
        return messages[0]["content"] in render(messages, True)
    except Exception:  # whatever a template raises by its `raise_exception`, or Jinja for it
        return False


def _cut(render: Render, messages: Sequence[Mapping[str, str]]) -> list[str]:
    try:
        text = render(messages, True)
    except Exception as error:
        raise NotFoundError(f"it refuses a plain conversation: {error}") from error
    pieces: list[str] = []
    for message in messages:
        piece, found, text = text.partition(message["content"])
        if not found or message["content"] in text:
            raise NotFoundError("it does not print every message once, in order")
        pieces.append(piece)
    return [*pieces, text]


def _printed(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    """A Go string: JSON's escapes are among Go's, as long as characters beyond ASCII stay themselves."""
    return json.dumps(text, ensure_ascii=False)
