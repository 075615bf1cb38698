"""Chat templates as Go templates: found where turns are all there is to them, refused with a reason elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hotloop_gguf.chat import NotFoundError, Turns, find
from hotloop_gguf.modelfile import modelfiles
from hotloop_gguf.tokenizer import Tokenizer
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are \"Q\".<|im_end|>\n{% endif %}"
    + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
LAST_SYSTEM = (  # the system message before the last user's, wherever that is
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.last and messages[0].role == "
    "'system' %}{{ messages[0].content }}\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }}:{{ m.role }}:{{ m.content }};{% endfor %}"


def jinja(text: str) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment.globals |= {"raise_exception": refuse, "bos_token": "<s>"}
    template = environment.from_string(text)

    def render(messages: Sequence[Mapping[str, str]], opened: bool) -> str:
        return template.render(messages=messages, add_generation_prompt=opened)

    return render


def run_go(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """The few actions of Go templates that ours are made of, step by step as text/template takes them."""
    pieces = re.split(r"(\{\{-? ?.*? ?\}\})", template)
    actions: list[tuple[str, str]] = []
    for piece in pieces:
        if piece.startswith("{{-") and actions and actions[-1][0] == "text":
            actions[-1] = ("text", actions[-1][1].rstrip())
        if piece.startswith("{{"):
            actions.append(("do", piece[2:-2].lstrip("-").strip()))
        else:
            actions.append(("text", piece))
    out = ""
    variables: dict[str, Any] = {}
    start = next(i for i, (_, a) in enumerate(actions) if a == "range .Messages")
    depth, end = 0, start
    for i in range(start, len(actions)):
        kind, action = actions[i]
        if kind == "do" and action.split()[0] in ("range", "if"):
            depth += 1
        if kind == "do" and action == "end":
            depth -= 1
            if depth == 0:
                end = i
                break

    def holds(condition: str, message: Mapping[str, str]) -> bool:
        tests = re.findall(r'\(?eq (\$previous|\.Role) "(\w*)"\)?', condition)
        values = {"$previous": variables["$previous"], ".Role": message.get("role", "")}
        return all(values[name] == wanted for name, wanted in tests)

    def execute(part: list[tuple[str, str]], message: Mapping[str, str]) -> str:
        text, taken, active = "", False, True
        for kind, action in part:
            if kind == "text":
                text += action if active else ""
            elif action.startswith(("if ", "else if ")):
                active = not (taken and action.startswith("else")) and holds(action, message)
                taken = active or (taken and action.startswith("else"))
            elif action == "end":
                active, taken = True, False
            elif not active:
                continue
            elif action.startswith("$previous"):
                value = action.partition("=")[2].strip()
                variables["$previous"] = message["role"] if value == ".Role" else value.strip('"')
            elif action == ".Content":
                text += message["content"]
            else:
                text += eval(action)  # a quoted string, whose escapes Python shares
        return text

    out += execute(actions[:start], {})
    for message in messages:
        out += execute(actions[start + 1 : end], message)
    return out + execute(actions[end + 1 :], {})


def talk(roles: str) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [
        {"role": names[r], "content": f'Say "{i}"\n{{{{ .X }}}} é'} for i, r in enumerate(roles)
    ]


@pytest.mark.parametrize(
    "text, roles",
    [
        (CHATML, ["u", "su", "uau", "suauau"]),
        (QWEN, ["u", "su", "uau", "suauau"]),
        (LLAMA3, ["u", "su", "uauau"]),
        (GEMMA2, ["u", "uau"]),
        (GEMMA3, ["u", "su", "suau"]),
        (MISTRAL, ["u", "uauau"]),
    ],
    ids=["chatml", "qwen", "llama3", "gemma2", "gemma3", "mistral"],
)
def test_the_go_template_prints_what_the_chat_template_prints(text: str, roles: list[str]) -> None:
    render = jinja(text)
    turns = find(render, text)
    for conversation in map(talk, roles):
        assert turns.render(conversation) == render(conversation, True)
        assert run_go(turns.go(), conversation) == render(conversation, True)


@pytest.mark.parametrize(
    "text, reason",
    [
        (NUMBERED, "of 5 messages it makes"),
        (LAST_SYSTEM, "every message once, in order|of 6 messages it makes"),
        (CHATML + "{{ strftime_now('%d') }}", "date"),
        ("{{ messages[-1].content }}", "every message once"),
        ("{{ raise_exception('tools only') }}", "refuses a plain conversation: tools only"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "every message once"),
    ],
    ids=["numbered", "system-last", "date", "last-only", "raises", "twice"],
)
def test_a_template_that_is_more_than_turns_is_left_out_with_the_reason(
    text: str, reason: str
) -> None:
    with pytest.raises(NotFoundError, match=reason):
        find(jinja(text), text)


def test_the_default_system_message_is_found() -> None:
    assert find(jinja(QWEN), QWEN).system == 'You are "Q".'
    assert find(jinja(CHATML), CHATML).system == ""


def test_a_bos_that_the_tokenizer_adds_is_cut_once() -> None:
    turns = find(jinja(LLAMA3), LLAMA3).without("<s>")
    assert "<s>" + turns.render(talk("su")) == jinja(LLAMA3)(talk("su"), True)
    with pytest.raises(NotFoundError, match="does not begin"):
        find(jinja(CHATML), CHATML).without("<s>")


def made(text: str, **generation: Any) -> tuple[dict[str, Any], list[str]]:
    tokens = ["<s>", "<|im_end|>", "<|stop|>", "a"]
    added = [{"id": i, "content": t, "special": True} for i, t in enumerate(tokens[:3])]
    definition = {
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
        "added_tokens": added,
    }
    tokenizer = Tokenizer(definition, {"eos_token": "<|im_end|>", "bos_token": "<s>"}, generation)
    request: Any = SimpleNamespace(chat_template=text, render=jinja(text) if text else None)
    return modelfiles(request, tokenizer, [("x-Q8_0", ["x-Q8_0.gguf"]), ("y", ["y-1", "y-2"])])


def test_a_modelfile_has_weights_template_system_stops_and_sampling() -> None:
    files, notes = made(QWEN, eos_token_id=[1, 2], do_sample=True, temperature=0.7, top_k=20)
    text = files["x-Q8_0.Modelfile"]
    assert text.startswith('FROM ./x-Q8_0.gguf\nTEMPLATE """{{- $previous := "" }}\n')
    assert text.split('"""\n', 1)[1].splitlines() == [
        'SYSTEM """You are "Q"."""',
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|stop|>"',
        "PARAMETER temperature 0.7",
        "PARAMETER top_k 20",
    ]
    assert list(files) == ["x-Q8_0.Modelfile"] and "y has no Modelfile" in notes[0]


def test_only_numbers_and_tokens_that_exist_reach_the_modelfile() -> None:
    files, _ = made(QWEN, eos_token_id=[9, -1, 2], do_sample=True, temperature="0.7\nSYSTEM evil")
    lines = files["x-Q8_0.Modelfile"].splitlines()
    assert [line for line in lines if line.startswith(("PARAMETER", "SYSTEM evil"))] == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|stop|>"',
    ]


def test_a_modelfile_without_a_template_says_why() -> None:
    files, notes = made(NUMBERED)
    assert "TEMPLATE" not in files["x-Q8_0.Modelfile"] and "of 5 messages" in notes[0]
    assert "temperature" not in files["x-Q8_0.Modelfile"]  # greedy models are left greedy


def test_a_model_without_a_chat_template_has_no_modelfile() -> None:
    request: Any = SimpleNamespace(chat_template=None, render=None)
    assert modelfiles(request, Tokenizer({}, {}), []) == ({}, [])


def test_quotes_that_a_modelfile_cannot_hold_leave_the_template_out() -> None:
    text = CHATML.replace("<|im_start|>", '"""')
    assert isinstance(find(jinja(text), text), Turns)
    files, notes = made(QWEN.replace('"Q"', '"""Q'))
    assert "TEMPLATE" not in files["x-Q8_0.Modelfile"] and "cannot quote" in notes[0]


@pytest.mark.parametrize(
    "more, what",
    [
        ("{%- if tools %}{{ tools | tojson }}{% endif %}", "tools"),
        ("{%- if messages[0].tool_calls is defined %}x{% endif %}", "tools"),
        ("{%- if enable_thinking is defined and not enable_thinking %}x{% endif %}", "thinking"),
        ("{% if tools %}x{% endif %}{% if reasoning_content %}y{% endif %}", "tools and thinking"),
    ],
)
def test_what_a_template_takes_beside_messages_is_left_out_with_a_note(
    more: str, what: str
) -> None:
    files, notes = made(more + CHATML)
    assert "TEMPLATE" in files["x-Q8_0.Modelfile"]
    assert f"leaves out {what}, which" in notes[0] and "llama-server --jinja" in notes[0]


def test_words_that_a_template_prints_or_comments_are_no_tools() -> None:
    _, notes = made("{# no tools #}Use your tools.\n" + CHATML)
    assert [note for note in notes if "leaves out" in note] == []
