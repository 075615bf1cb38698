"""A model's tokenizer, with a token to pad with, from wherever the model is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_core.errors import CheckpointError, ConfigError

from .source import Hub, Source, fetch, locate

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedTokenizerBase


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
        CheckpointError: nothing is there, or no tokenizer. ConfigError: it cannot pad. UnsupportedError:
            a GGUF file's tokenizer of an unknown kind.

    """
    hub = Hub(revision=revision, token=token, local_files_only=local_files_only)
    source = fetch(locate(name_or_path, hub), hub, remote_code=trust_remote_code)
    return read_tokenizer(source, remote_code=trust_remote_code)


def read_tokenizer(source: Source, *, remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of files that are here; an adapter's own goes before its base's."""
    from transformers import AutoTokenizer

    from .gguf_tokenizer import gguf_tokenizer

    own = source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file()
    directory = source.adapter if own else source.directory
    if source.gguf is not None and not own:
        tokenizer = gguf_tokenizer(source.directory / source.gguf)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=remote_code)
        except Exception as error:  # whatever a damaged file makes transformers stumble over
            raise CheckpointError(f"{directory}: its tokenizer cannot be read: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _padding(tokenizer)
    return tokenizer


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
