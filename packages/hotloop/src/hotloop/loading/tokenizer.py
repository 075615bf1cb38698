"""A model's tokenizer, with a token to pad with, from wherever the model is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_core.errors import CheckpointError, ConfigError

from .intact import read_object
from .source import Hub, Source, fetch, locate

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
"""Files that hold a vocabulary; without any there is no tokenizer."""

_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files beside it that transformers reads, a JSON object each."""

_STUMBLES = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""What transformers raises over a file that is missing, is no JSON, or holds something else than it expects. A library
that is not installed, a lack of memory and remote code's own errors are none of these."""


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` gives, without its model. Arguments: those of `load`.

    Raises:
        CheckpointError: nothing is there, or no tokenizer, or its files are damaged. ConfigError: it cannot
            pad. UnsupportedError: a GGUF file's tokenizer of an unknown kind.

    """
    hub = Hub(revision=revision, token=token, local_files_only=local_files_only)
    source = fetch(locate(name_or_path, hub), hub, remote_code=trust_remote_code)
    return read_tokenizer(source, remote_code=trust_remote_code)


def read_tokenizer(source: Source, *, remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of files that are here; an adapter's own goes before its base's."""
    from .gguf_tokenizer import gguf_tokenizer

    own = source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file()
    if source.gguf is not None and not own:
        tokenizer = gguf_tokenizer(source.directory / source.gguf)
    else:
        directory = source.adapter if own and source.adapter else source.directory
        tokenizer = _of_folder(directory, remote_code=remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _padding(tokenizer)
    return tokenizer


def _of_folder(directory: Path, *, remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=remote_code)
    except Exception as error:
        # The tokenizers library is written in Rust and raises Exception itself, nothing narrower.
        if type(error) is not Exception and not isinstance(error, _STUMBLES):
            raise
        raise CheckpointError(
            f"{_damage(directory)} (transformers says: {error}). Copy or download the tokenizer's files again."
        ) from error


def _damage(directory: Path) -> str:
    """Which file keeps a tokenizer from being read."""
    from tokenizers import Tokenizer

    here = [name for name in _VOCABULARIES if (directory / name).exists()]
    if not here:
        return f"{directory} has no tokenizer: none of {', '.join(_VOCABULARIES)} is there"
    beside = [name for name in _OBJECTS if (directory / name).exists()]
    for name in beside:
        try:
            read_object(directory / name)
        except ConfigError:
            return f"{directory / name} is damaged: it is no JSON object"
    if "tokenizer.json" in here:
        try:
            Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # of the Rust library, see above
            return f"{directory / 'tokenizer.json'} is damaged: {error}"
    return f"{directory}: no tokenizer can be made of {', '.join([*here, *beside])}"


def _padding(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token of the vocabulary to pad with: a reserved one, so that EOS is learnt, else EOS."""
    vocabulary = tokenizer.get_vocab()
    reserved = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")
    spare = [t for t in reserved if t in vocabulary and t != tokenizer.eos_token]
    if not spare and tokenizer.eos_token is None:
        raise ConfigError(
            "the tokenizer has neither a padding token nor an end-of-sequence token; add one, "
            "resize the embedding and save the model first"
        )
    return spare[0] if spare else str(tokenizer.eos_token)
