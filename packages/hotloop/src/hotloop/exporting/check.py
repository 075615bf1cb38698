"""A GGUF file, loaded by llama.cpp and compared with the model that it was made of."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError, ExportError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and it's 12345 times faster than 67 cats.",
    "def main(argv):\n    for i in range(10):\n        print(f'{i:>4}')\n\treturn argv[0] != None",
    "naïve café straße Ελληνικά русский текст 中文字符 日本語 한국어 العربية हिन्दी ไทย 🙂 👩‍👩‍👧",
    "1 22 333 4444 2024-01-31 3.14159 ½ €100 a+b=c <tag/> (parens) [brackets] {braces}\r\n\r\n  x",
    "Water boils at a lower temperature on a high mountain, because the pressure of the air is lower "
    "there. A cook who knows this lets the potatoes stay in the pot for some minutes more.",
)
"""Prose, code, scripts, digits and white space: where tokenizers and quantised weights differ first."""
CONTEXT = 512
_F32 = 0


@dataclass(frozen=True, kw_only=True)
class Check:
    """How far a file in llama.cpp is from the model in transformers.

    other_ids: texts whose token ids differ, of `texts`. kl: mean KL(model || file) over positions, in nats.
    top1: share of positions where both predict the same token. model_says, file_says: greedy continuations of `prompt`.
    """

    path: Path
    texts: int
    other_ids: tuple[str, ...]
    kl: float
    top1: float
    prompt: str
    model_says: str
    file_says: str

    def __str__(self) -> str:
        same = (
            f"the same token ids on {self.texts} texts"
            if not self.other_ids
            else f"OTHER TOKEN IDS on {len(self.other_ids)} of {self.texts} texts, first {self.other_ids[0]!r}"
        )
        return (
            f"{self.path.name} in llama.cpp: {same}; KL to the model {self.kl:.2e} nats, same first choice at "
            f"{self.top1:.1%} of positions\n  model: {self.model_says!r}\n  file:  {self.file_says!r}"
        )


def check_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    *,
    texts: Sequence[str] = TEXTS,
    prompt: str = "The capital of France is",
    new_tokens: int = 16,
    base: Path | None = None,
    threads: int = 2,
) -> Check:
    """Loads `path` with llama.cpp and compares token ids, next-token distributions and greedy text.

    Args:
        path: a GGUF file (the first, where it is split), or an adapter's.
        model: what it was made of, a transformers or PEFT model.
        tokenizer: the model's.
        texts: what to compare on; each is cut at 512 tokens.
        prompt: what both continue.
        new_tokens: how far.
        base: for an adapter's file: the GGUF of its base.
        threads: for llama.cpp.

    Raises:
        UnsupportedError: llama-cpp-python is not installed. ExportError: llama.cpp refuses the file.
        ConfigError: no token to compare on.

    """
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if not any(ids):
        raise ConfigError(f"the {len(texts)} texts to compare on hold no token; pass some words")
    with LlamaCpp(path, base=base, threads=threads) as llama:
        other = tuple(t for t, row in zip(texts, ids, strict=True) if llama.ids(t) != list(row))
        divergence, same, positions = 0.0, 0, 0
        for tokens in (row[:CONTEXT] for row in ids if row):
            p, q = (
                scores.double().log_softmax(-1)
                for scores in (_model_scores(model, tokens), llama.logits(tokens))
            )
            divergence += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            positions += len(tokens)
        start = tokenizer.encode(prompt)
        model_says = list(start)
        for _ in range(new_tokens):
            model_says.append(int(_model_scores(model, model_says)[-1].argmax()))
        file_says = llama.greedy(start, new_tokens)
    return Check(
        path=path,
        texts=len(texts),
        other_ids=other,
        kl=divergence / positions,
        top1=same / positions,
        prompt=prompt,
        model_says=tokenizer.decode(model_says[len(start) :]),
        file_says=tokenizer.decode(file_says[len(start) :]),
    )


def require_llama_cpp() -> None:
    """Raises UnsupportedError where llama-cpp-python is not installed."""
    if find_spec("llama_cpp") is None:
        raise UnsupportedError(
            "checking a GGUF file needs llama.cpp's Python package: `uv add llama-cpp-python`, or "
            "export without --check"
        )


class LlamaCpp:
    """A GGUF file in llama.cpp, with a float32 cache and plain attention, so that only the weights are rounded.

    A context manager. base: for an adapter's file, the GGUF that it is put on.

    Raises:
        UnsupportedError: llama-cpp-python is not installed. ExportError: llama.cpp refuses the file.

    """

    def __init__(self, path: Path, *, base: Path | None = None, threads: int = 1) -> None:
        require_llama_cpp()
        import llama_cpp

        self._native = llama_cpp
        options: dict[str, Any] = {
            "n_ctx": CONTEXT, "n_batch": CONTEXT, "n_threads": threads, "n_threads_batch": threads,
            "type_k": _F32, "type_v": _F32, "logits_all": True, "flash_attn": False, "verbose": False,
        }  # fmt: skip
        if base is not None:
            options["lora_path"] = str(path)
        with _plain_buffers(llama_cpp.llama_cpp):
            try:
                self._llama = llama_cpp.Llama(str(base or path), **options)
            except (ValueError, RuntimeError) as error:
                raise ExportError(f"llama.cpp cannot load {path}: {error}") from error

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()

    @property
    def metadata(self) -> dict[str, str]:
        """The file's keys, as text."""
        return self._llama.metadata

    def ids(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of a text, special tokens in it recognised."""
        return self._llama.tokenize(text.encode(), add_bos=bos, special=True)

    def is_end(self, token: int) -> bool:
        """Whether generation ends at that token."""
        return bool(self._native.llama_vocab_is_eog(self._llama._model.vocab, token))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [len(ids), vocabulary]."""
        import torch

        self._llama.reset()
        self._llama.eval(list(ids))
        return torch.tensor(self._llama.scores[: len(ids)])

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """`ids` and `count` more, the likeliest each."""
        found = list(ids)
        for _ in range(count):
            found.append(int(self.logits(found)[-1].argmax()))
        return found


@contextmanager
def _plain_buffers(native: Any) -> Iterator[None]:
    """Weights as the file has them: llama.cpp's repacked ones crash on some virtual machines."""
    make = native.llama_model_default_params

    def plain() -> Any:
        parameters = make()
        parameters.use_extra_bufts = False
        return parameters

    native.llama_model_default_params = plain
    try:
        yield
    finally:
        native.llama_model_default_params = make


def _model_scores(model: Any, ids: Sequence[int]) -> Tensor:
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)], device=device)).logits
    return logits[0].float().cpu()
