"""Chat templates by name, data in other conversation formats, and loss on the answers alone for a trainer's data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase, Trainer

IGNORED = -100


@dataclass(frozen=True)
class ChatTemplate:
    """A conversation format. stop: the token that ends an answer; None: the tokenizer's own end of text."""

    text: str
    stop: str | None = None


CHAT_TEMPLATES: Mapping[str, ChatTemplate] = {
    "chatml": ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        stop="<|im_end|>",
    ),
    "llama-3": ChatTemplate(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        stop="<|eot_id|>",
    ),
    "gemma": ChatTemplate(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        stop="<end_of_turn>",
    ),
    "mistral": ChatTemplate(
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
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


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str = "chatml"
) -> PreTrainedTokenizerBase:
    """Gives the tokenizer a built-in chat template, and the token that ends its answers as end of text.

    Args:
        tokenizer: changed in place and returned.
        chat_template: one of `CHAT_TEMPLATES`.

    Raises:
        ConfigError: an unknown name, or a format whose stop token is not in the vocabulary.

    """
    template = CHAT_TEMPLATES.get(chat_template)
    if template is None:
        raise ConfigError(
            f"no built-in chat template {chat_template!r}; there are {', '.join(CHAT_TEMPLATES)}. "
            "Any other can be set as tokenizer.chat_template."
        )
    if template.stop is not None:
        if template.stop not in tokenizer.get_vocab():
            free = ", ".join(name for name, other in CHAT_TEMPLATES.items() if other.stop is None)
            raise ConfigError(
                f"the chat template {chat_template!r} ends answers with {template.stop!r}, which is not in this "
                f"tokenizer's vocabulary. Choose one that needs no token of its own ({free})."
            )
        tokenizer.eos_token = template.stop
    tokenizer.chat_template = template.text
    return tokenizer


_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def standardize_data_formats(dataset: Any) -> Any:
    """Rows with `conversations` of {from, value} become rows with `messages` of {role, content}.

    Args:
        dataset: a `datasets.Dataset`, or a list of rows (returned as new rows). Rows that have `messages` stay.

    Raises:
        DataError: a row has neither, or a message has another shape or an unknown speaker.

    """
    if isinstance(dataset, list):
        return [_standard_row(row) for row in dataset]
    if "messages" in dataset.column_names:
        return dataset
    return dataset.map(
        lambda row: {"messages": _standard_row(row)["messages"]},
        remove_columns=[name for name in ("conversations",) if name in dataset.column_names],
    )


def _standard_row(row: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        return dict(row)
    if "conversations" not in row:
        raise DataError(f"a row has {', '.join(row)}; expected 'messages' or 'conversations'")
    rest = {key: value for key, value in row.items() if key != "conversations"}
    return {**rest, "messages": [_standard_message(message) for message in row["conversations"]]}


def _standard_message(message: Mapping[str, Any]) -> dict[str, Any]:
    speaker, content = ("from", "value") if "from" in message else ("role", "content")
    role = _ROLES.get(str(message.get(speaker)).lower())
    if role is None or content not in message:
        raise DataError(
            f"a message is {dict(message)!r}; expected from/value or role/content of {', '.join(_ROLES)}"
        )
    return {"role": role, "content": message[content]}


def train_on_responses_only(trainer: Trainer, instruction_part: str, response_part: str) -> Trainer:
    r"""Masks every token of the trainer's data that is not part of an answer.

    Args:
        trainer: a TRL `SFTTrainer` whose data is tokenised already; its data sets are replaced.
        instruction_part: the text that starts a question, as the chat template writes it ("<|im_start|>user\n").
        response_part: the text that starts an answer ("<|im_start|>assistant\n").

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
        return {"labels": _only_responses(ids, row.get("labels") or ids, ask, answer)}

    trainer.train_dataset = _masked(trainer.train_dataset, mask, response_part)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = _masked(trainer.eval_dataset, mask, response_part)
    return trainer


def _masked(dataset: Any, mask: Any, response_part: str) -> Any:
    if isinstance(dataset, dict):
        return {name: _masked(part, mask, response_part) for name, part in dataset.items()}
    if "input_ids" not in (dataset.column_names or ()):
        raise DataError(
            f"the trainer's data has the columns {dataset.column_names}; expected input_ids. "
            "Call this after the trainer was made, without skip_prepare_dataset."
        )
    masked = dataset.map(mask)
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
