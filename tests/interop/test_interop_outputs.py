"""What else we write for llama.cpp: adapters, split files, importance matrices; and `check_gguf`, which compares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hotloop.exporting import export, measure_importance
from hotloop.exporting.check import LlamaCpp, check_gguf
from hotloop_core.errors import ConfigError, ExportError, UnsupportedError
from transformers import Gemma2Config, LlamaConfig, Qwen2Config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Tiny = Callable[..., Any]
    Logits = Callable[..., torch.Tensor]
    InBoth = Callable[..., tuple[torch.Tensor, torch.Tensor, Any]]

pytest.importorskip("llama_cpp", reason="needs the interop group: llama-cpp-python")

GEMMA = {
    "tie_word_embeddings": True,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
}


@pytest.mark.parametrize(
    "kind, changes, options",
    [
        (LlamaConfig, {}, {}),
        (LlamaConfig, {}, {"use_rslora": True}),
        (LlamaConfig, {}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}}),
        (LlamaConfig, {}, {"target_modules": ["embed_tokens", "q_proj", "k_proj", "lm_head"]}),
        (Qwen2Config, {}, {}),
        (Gemma2Config, GEMMA, {}),
    ],
    ids=["llama", "rslora", "patterns", "embedding-and-head", "qwen2", "gemma2"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_on_its_base_computes_what_the_adapter_model_computes(
    kind: type[Any],
    changes: dict[str, Any],
    options: dict[str, Any],
    tiny: Tiny,
    adapted: Tiny,
    tokenizer: Any,
    in_both: InBoth,
) -> None:
    plain = tiny(kind, **changes)
    before, _, written = in_both(plain)
    base = written.files[0].path
    model = adapted(plain, std=0.1, **options)
    truth, found, report = in_both(model, base=base, quant="lora", name="tune")
    (file,) = report.files
    assert file.path.name == "tune-adapter.gguf" and report.quants == ("adapter",)
    # llama.cpp looks Gemma's GELU up in a table of fp16 values.
    limit = 2e-3 if kind is Gemma2Config else 1e-4
    assert (truth - before).abs().max() > 0.05 * before.abs().max()
    assert (found - truth).abs().max() < limit * truth.abs().max()
    checked = check_gguf(file.path, model, tokenizer, base=base, texts=["abc"], new_tokens=1)
    assert checked.kl < 1e-4 and checked.other_ids == ()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["norm"]}, r"norm.*no factor of a LoRA"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, r"bias.*no factor"),
        ({"target_modules": ["lm_head"]}, r"lm_head.*whose head is its embedding"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens.*whose head is its embedding"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word")
def test_what_an_adapter_in_gguf_cannot_say_is_refused(
    options: dict[str, Any],
    message: str,
    tiny: Tiny,
    adapted: Tiny,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    tied = {"tie_word_embeddings": "lm_head" in message or "embed" in message}
    model = adapted(tiny(LlamaConfig, attention_bias=True, **tied), **options)
    with pytest.raises(UnsupportedError, match=message):
        export(model, tokenizer, tmp_path, format="gguf", quant="adapter")
    assert list(tmp_path.iterdir()) == []


def test_split_files_are_loaded_by_the_first_and_bounded(
    tiny: Tiny,
    tokenizer: Any,
    hf_logits: Logits,
    llama_cpp_logits: Logits,
    tmp_path: Path,
) -> None:
    model = tiny(LlamaConfig)
    report = export(
        model, tokenizer, tmp_path, format="gguf", quant=["f32", "f16"], name="tiny",
        max_shard_bytes=90_000,
    )  # fmt: skip
    parts = [f for f in report.files if "F32" in f.path.name]
    assert parts[0].path.name == f"tiny-F32-00001-of-{len(parts):05}.gguf" and len(parts) > 3
    embedding = 4 * 320 * 64  # one tensor alone may be larger than a part
    assert all(f.bytes < 90_000 + 4096 for f in parts if f.bytes < embedding)
    truth = hf_logits(model)
    assert (llama_cpp_logits(parts[0].path) - truth).abs().max() < 1e-4 * truth.abs().max()
    missing = parts[-1].path
    missing.rename(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match=r"llama\.cpp cannot load"):
        llama_cpp_logits(parts[0].path)


@pytest.fixture(scope="module")
def wide(tiny: Tiny) -> Any:
    """Columns that are multiples of 256, some of which see inputs ten times larger than others."""
    model = tiny(LlamaConfig, hidden_size=256, intermediate_size=256)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[::16] *= 10.0
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    return [{"input_ids": torch.randint(3, 320, (2, 40))} for _ in range(3)]


def test_importance_lowers_the_error_of_a_file_measured_or_read(
    wide: Any,
    tokenizer: Any,
    hf_logits: Logits,
    llama_cpp_logits: Logits,
    tmp_path: Path,
) -> None:
    importance = measure_importance(wide, batches(), source="random ids")
    assert importance.tokens == 240 and len(importance.columns) == 28
    written = export(
        wide, tokenizer, tmp_path, format="gguf", quant=["imatrix", "imatrix_dat"], name="x",
        importance=importance,
    )  # fmt: skip
    files = [file.path for file in written.files]
    assert [file.name for file in files] == ["x-imatrix.gguf", "x-imatrix.dat"]
    truth = hf_logits(wide)
    errors = []
    for i, given in enumerate((None, importance, *files)):
        folder = tmp_path / str(i)
        report = export(wide, tokenizer, folder, format="gguf", quant="q4_k_s", importance=given)
        found = llama_cpp_logits(report.files[0].path)
        with LlamaCpp(report.files[0].path) as llama:
            source = llama.metadata.get("quantize.imatrix.dataset")
        assert source == (None if given is None else "random ids")
        errors.append(float((found - truth).norm() / truth.norm()))
    assert max(errors[1:]) < 0.95 * errors[0], errors


def test_an_importance_file_is_asked_for_only_with_a_measurement(
    tiny: Tiny,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="nothing was"):
        export(tiny(LlamaConfig), tokenizer, tmp_path, format="gguf", quant="imatrix")


def test_a_check_of_a_faithful_file_finds_no_difference(
    tiny: Tiny,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    model = tiny(LlamaConfig)
    path = export(model, tokenizer, tmp_path, format="gguf", quant="f32").files[0].path
    found = check_gguf(path, model, tokenizer, new_tokens=4)
    assert found.other_ids == () and found.kl < 1e-8 and found.top1 == 1.0
    assert found.model_says == found.file_says
    assert "the same token ids on 5 texts" in str(found)


def test_a_check_of_another_models_file_finds_it(
    tiny: Tiny,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    path = export(tiny(LlamaConfig), tokenizer, tmp_path, format="gguf", quant="f32").files[0].path
    found = check_gguf(path, tiny(LlamaConfig, rms_norm_eps=1.0), tokenizer, new_tokens=1)
    assert found.kl > 1e-3 and found.top1 < 1.0


def test_a_check_finds_other_token_ids(
    tiny: Tiny,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    path = export(tiny(LlamaConfig), tokenizer, tmp_path, format="gguf", quant="f32").files[0].path

    class Other:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return list(reversed(tokenizer.encode(text, add_special_tokens=False)))

        def decode(self, ids: list[int]) -> str:
            return tokenizer.decode(ids)

    found = check_gguf(path, tiny(LlamaConfig), Other(), texts=["abc def", "x"], new_tokens=1)
    assert found.other_ids == ("abc def",) and "OTHER TOKEN IDS on 1 of 2" in str(found)
