"""What is wrong with a checkpoint, found before and after its tensors are read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import CheckpointError, ConfigError

from .intact import require_index, require_whole
from .source import refuse_pickles

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from hotloop_core import ModelFacts
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model folder, each one's header checked against its length.

    Raises:
        SecurityError: the weights are pickled, or the index names files elsewhere.
        CheckpointError: a shard is missing, or truncated.

    """
    refuse_pickles(directory)
    require_index(directory)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [directory / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {some(missing)} of its {len(files)} weight files; copy or "
            "download it again"
        )
    for file in files:
        require_whole(file, "download")
    return files


def is_finite(tensor: Tensor) -> Tensor | None:
    """Whether no element is NaN or infinite, as a tensor on the same device; None where there is nothing to tell.

    The largest and the smallest element tell: NaN passes through both. One pass, before quantisation, which hides it.
    """
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return None
    if tensor.element_size() == 1:  # float8 has no reductions
        tensor = tensor.float()
    low, high = torch.aminmax(tensor.detach())
    return torch.isfinite(low) & torch.isfinite(high)


def refuse_non_finite(bad: Sequence[str], what: str) -> None:
    """Raises CheckpointError, naming tensors, where there are any that hold NaN or infinity."""
    if bad:
        raise CheckpointError(
            f"{what}: {len(bad)} tensors hold NaN or infinity: {some(bad)}. Training cannot "
            "recover from that; take an earlier checkpoint."
        )


def require_complete(info: Mapping[str, Any], what: str) -> None:
    """Raises CheckpointError, naming tensors, where transformers' loading report is not clean."""
    titles = {
        "missing_keys": "missing",
        "unexpected_keys": "not of this model",
        "mismatched_keys": "of another shape",
        "error_msgs": "failed",
    }
    problems = [
        f"{title}: {some(sorted(map(_key, info[kind])))}"
        for kind, title in titles.items()
        if info.get(kind)
    ]
    if problems:
        raise CheckpointError(
            f"{what} does not hold this model's tensors; {'; '.join(problems)}. Check that "
            "config.json and the weights belong together."
        )


def misshapen(model: PreTrainedModel) -> list[tuple[str, Iterable[int], Iterable[int]]]:
    """(name, found, expected) of parameters that are not what the config says.

    transformers' own report leaves out what it loads beside a quantiser, in some versions.
    """
    import torch

    with torch.device("meta"):
        expected = dict(type(model)(model.config).named_parameters())
    return [
        (name, found.shape, expected[name].shape)
        for name, found in model.named_parameters()
        if found.is_floating_point() and name in expected and found.shape != expected[name].shape
    ]


def _key(key: str | tuple[str, Iterable[int], Iterable[int]]) -> str:
    """A tensor's name, with (found, expected) shapes where these disagree."""
    return key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} for {tuple(key[2])}"


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, facts: ModelFacts, what: str) -> None:
    """Raises ConfigError where the tokenizer has ids that the embedding has no row for."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= facts.vocab_size:
        raise ConfigError(
            f"{what}: the tokenizer's highest id is {highest:,}, the embedding has "
            f"{facts.vocab_size:,} rows. Use the model's own tokenizer, or resize the embedding "
            "(model.resize_token_embeddings) and save it first."
        )


def require_length(max_seq_len: int, facts: ModelFacts, scaled: Mapping[str, Any] | None) -> None:
    """Raises ConfigError where sequences are asked for that the model cannot position."""
    if not isinstance(max_seq_len, int) or max_seq_len < 1:
        raise ConfigError(
            f"max_seq_len={max_seq_len!r}; expected the tokens of the longest sequence, at least 1"
        )
    limit = positions(facts, scaled)
    if max_seq_len > limit:
        scaling = {"rope_type": "yarn", "factor": float(-(-max_seq_len // facts.max_positions))}
        raise ConfigError(
            f"max_seq_len={max_seq_len:,} is beyond the {limit:,} positions of this model. Lower "
            f"it, or ask for rope scaling: rope_scaling={scaling}."
        )


def positions(facts: ModelFacts, scaled: Mapping[str, Any] | None) -> int:
    """Tokens that a sequence may have: the config's, or the original ones times the scaling
    factor.
    """
    rope = {**facts.rope, **(scaled or {})}
    original = rope.get("original_max_position_embeddings") or facts.max_positions
    return max(facts.max_positions, int(original * float(rope.get("factor") or 1.0)))


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of `names`, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
