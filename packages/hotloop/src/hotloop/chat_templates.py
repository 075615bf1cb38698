"""Chat templates by name, data in other conversation formats, and loss on the answers alone for a trainer's data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError, DataError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase, Trainer

IGNORED = -100


@dataclass(frozen=True)
class ChatTemplate:
    """A conversation format. stop: the token that ends an answer; None: the tokenizer's own end of text."""

    text: str
    stop: str | None = None


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA_TURNS = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

CHAT_TEMPLATES: Mapping[str, ChatTemplate] = {
    "chatml": ChatTemplate(_CHATML, stop="<|im_end|>"),
    "llama-3": ChatTemplate("{{ bos_token }}" + _LLAMA_TURNS, stop="<|eot_id|>"),
    "llama-3.1": ChatTemplate(
        "{{ bos_token }}{% set system = '' %}{% if messages[0].role == 'system' %}"
        "{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}{% endif %}"
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n{{ system }}<|eot_id|>" + _LLAMA_TURNS,
        stop="<|eot_id|>",
    ),
    "gemma": ChatTemplate(
        "{{ bos_token }}{% set system = '' %}{% if messages[0].role == 'system' %}"
        "{% set system = messages[0].content | trim + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ system if loop.first }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        stop="<end_of_turn>",
    ),
    "mistral": ChatTemplate(
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    "phi-3": ChatTemplate(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        stop="<|end|>",
    ),
    "phi-4": ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        stop="<|im_end|>",
    ),
    "qwen-2.5": ChatTemplate(
        "{% if messages[0].role != 'system' %}<|im_start|>system\n"
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}"
        + _CHATML,
        stop="<|im_end|>",
    ),
    "zephyr": ChatTemplate(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "alpaca": ChatTemplate(
        "{{ bos_token or '' }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}
"""The built-in formats, by name."""

_SAME = {
    "llama3": "llama-3",
    "llama-31": "llama-3.1",
    "llama-3.2": "llama-3.1",
    "llama-3.3": "llama-3.1",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma-2": "gemma",
    "gemma-3": "gemma",
    "phi-3.5": "phi-3",
    "phi-35": "phi-3",
    "qwen2.5": "qwen-2.5",
    "qwen-25": "qwen-2.5",
    "qwen25": "qwen-2.5",
}
"""Other names that such scripts use, and formats that are the same."""


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
) -> PreTrainedTokenizerBase:
    """Gives the tokenizer a built-in chat template, and the token that ends its answers as end of text.

    Args:
        tokenizer: changed in place and returned.
        chat_template: one of `CHAT_TEMPLATES`.
        mapping: refused, unless it names fields and roles as they are: rows are converted instead.
        map_eos_token: False leaves the end of text as it is.

    Raises:
        ConfigError: an unknown name, or a format whose stop token is not in the vocabulary.
        UnsupportedError: a mapping.

    """
    if any(name != meaning for name, meaning in (mapping or {}).items()):
        raise UnsupportedError(
            f"get_chat_template(mapping={mapping!r}): templates read role and content. Convert the rows instead: "
            "dataset = hotloop.standardize_data_formats(dataset), and leave mapping out."
        )
    template = CHAT_TEMPLATES.get(_SAME.get(chat_template, chat_template))
    if template is None:
        raise ConfigError(
            f"no built-in chat template {chat_template!r}; there are {', '.join(CHAT_TEMPLATES)}. Leave this call out "
            "where the tokenizer has its model's own, or set any other as tokenizer.chat_template."
        )
    if template.stop is not None:
        if template.stop not in tokenizer.get_vocab():
            free = ", ".join(name for name, other in CHAT_TEMPLATES.items() if other.stop is None)
            raise ConfigError(
                f"the chat template {chat_template!r} ends answers with {template.stop!r}, which is not in this "
                f"tokenizer's vocabulary. Choose one that needs no token of its own ({free})."
            )
        if map_eos_token:
            tokenizer.eos_token = template.stop
    tokenizer.chat_template = template.text
    return tokenizer


def __getattr__(name: str) -> Any:
    """Refuses by name what scripts import from such a module and Hotloop does not have."""
    from .fast.refusals import refuse_name

    refuse_name(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_ROLES = {"human": "user", "input": "user", "gpt": "assistant", "output": "assistant"}
_KNOWN = ("user", "assistant", "system", "tool", *_ROLES)


def standardize_data_formats(dataset: Any) -> Any:
    """Conversations of {from, value} become conversations of {role, content}, in the column where they are.

    That is `conversations` or `messages`; whatever else a row or a message has stays. TRL takes either column.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, or a list of rows (returned as new rows).

    Raises:
        DataError: a row has neither, or a message has another shape or an unknown speaker.

    """
    return (
        [_standard_row(row) for row in dataset]
        if isinstance(dataset, list)
        else dataset.map(_standard_row)
    )


standardize_sharegpt = standardize_data_formats
"""The older name of it, under which scripts import it."""


def _standard_row(row: Mapping[str, Any]) -> dict[str, Any]:
    column = next((name for name in ("messages", "conversations") if name in row), None)
    if column is None:
        raise DataError(f"a row has {', '.join(row)}; expected 'messages' or 'conversations'")
    return {**row, column: [_standard_message(message) for message in row[column]]}


def _standard_message(message: Mapping[str, Any]) -> dict[str, Any]:
    if message.get("role") is not None and "content" in message:  # any role: the template decides
        return {**message, "role": _ROLES.get(message["role"], message["role"])}
    speaker = str(message.get("from")).lower()
    if speaker not in _KNOWN or "value" not in message:
        raise DataError(
            f"a message is {dict(message)!r}; expected role and content, or from and value with from one of "
            f"{', '.join(_KNOWN)}"
        )
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    return {"role": _ROLES.get(speaker, speaker), "content": message["value"], **rest}


def train_on_responses_only(
    trainer: Trainer, instruction_part: str, response_part: str, *, num_proc: int | None = None
) -> Trainer:
    r"""Masks every token of the trainer's data that is not part of an answer.

    Args:
        trainer: a TRL `SFTTrainer` whose data is tokenised already; its data sets are replaced.
        instruction_part: the text that starts a question, as the chat template writes it ("<|im_start|>user\n").
        response_part: the text that starts an answer ("<|im_start|>assistant\n").
        num_proc: processes that do it.

    Raises:
        DataError: the data has no `input_ids`, or no row of it has an answer.

    """
    tokenizer: Any = trainer.processing_class
    ask, answer = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (instruction_part, response_part)
    )

    def mask(row: Mapping[str, Any]) -> dict[str, Any]:
        ids = row["input_ids"]
        labels, result = row.get("labels") or ids, []
        for size in row.get("seq_lengths") or [
            len(ids)
        ]:  # an answer does not go on in the next of packed rows
            own = slice(len(result), len(result) + size)
            result += _only_responses(ids[own], labels[own], ask, answer)
        return {"labels": result}

    trainer.train_dataset = _masked(trainer.train_dataset, mask, response_part, num_proc)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = _masked(trainer.eval_dataset, mask, response_part, num_proc)
    return trainer


def _masked(dataset: Any, mask: Any, response_part: str, num_proc: int | None) -> Any:
    if isinstance(dataset, dict):
        return {n: _masked(part, mask, response_part, num_proc) for n, part in dataset.items()}
    if "input_ids" not in (dataset.column_names or ()):
        raise DataError(
            f"the trainer's data has the columns {dataset.column_names}; expected input_ids. "
            "Call this after the trainer was made, without skip_prepare_dataset."
        )
    masked = dataset.map(mask) if num_proc is None else dataset.map(mask, num_proc=num_proc)
    if all(label == IGNORED for row in masked for label in row["labels"]):
        raise DataError(
            f"no row contains {response_part!r} as its tokenizer writes it, so nothing would be trained. "
            "Print trainer.processing_class.decode(trainer.train_dataset[0]['input_ids']) and take the text from there."
        )
    return masked


def _only_responses(
    ids: Sequence[int], labels: Sequence[int], ask: Sequence[int], answer: Sequence[int]
) -> list[int]:
    """labels, with -100 outside the answers: each starts after `answer` and ends before the next `ask`."""
    result, inside, at = [IGNORED] * len(ids), False, 0
    while at < len(ids):
        if list(ids[at : at + len(answer)]) == list(answer):
            inside, at = True, at + len(answer)
        elif list(ids[at : at + len(ask)]) == list(ask):
            inside, at = False, at + len(ask)
        else:
            if inside:
                result[at] = labels[at]
            at += 1
    return result
