"""The exporter on a hand-made request: what it writes, what it refuses, what it leaves behind."""

from __future__ import annotations

import errno
import json
import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from hotloop_core import ExportRequest, TensorEntry, discover, facts_of
from hotloop_core.errors import CheckpointError, ExportError, OutputExistsError, UnsupportedError
from hotloop_core.files import HashingFile
from hotloop_gguf import pretokenizers
from hotloop_gguf.encoders import encode
from hotloop_gguf.export import Quantisation, export, write
from hotloop_gguf.mixes import BLOCKS, Choice
from hotloop_gguf.writer import Block

LLAMA = discover().match({"model_type": "llama"})
VOCABULARY = {t: i for i, t in enumerate([*pretokenizers.byte_characters().values(), "Ġa"])}
MERGES = [("Ġ", "a")]
BPE = pretokenizers._Bpe(VOCABULARY, MERGES)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SHAPES = {
    "embedding": (260, 64),
    "q": (64, 64),
    "k": (32, 64),
    "v": (32, 64),
    "o": (64, 64),
    "before_attention": (64,),
    "before_mlp": (64,),
    "gate": (96, 64),
    "up": (96, 64),
    "down": (64, 96),
    "final_norm": (64,),
}


def tokenize(text: str) -> list[int]:
    patterns = pretokenizers._compiled(pretokenizers.CANDIDATES[0].patterns, text)
    return BPE.encode(pretokenizers.split(patterns, text), False)


def entries(loaded: list[str] | None = None, **shapes: tuple[int, ...]) -> list[TensorEntry]:
    torch.manual_seed(0)
    tensors = {role: torch.randn(shape) for role, shape in (SHAPES | shapes).items()}

    def load(role: str) -> torch.Tensor:
        if loaded is not None:
            loaded.append(role)
        return tensors[role]

    return [
        TensorEntry(
            name=f"model.{role}", role=role, part="weight", shape=tuple(tensor.shape),
            layer=None if role in ("embedding", "final_norm") else 0, dtype="float32",
            load=lambda role=role: load(role),
        )
        for role, tensor in tensors.items()
    ]  # fmt: skip


@pytest.fixture
def request_(tmp_path: Path) -> ExportRequest:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    model = {"type": "BPE", "vocab": VOCABULARY, "merges": MERGES}
    (source / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    return ExportRequest(
        family=LLAMA, facts=facts_of(LLAMA, CONFIG), tensors=entries(), directory=out,
        source=source, name="tiny", quants=("f32", "q8_0"), tokenize=tokenize,
    )  # fmt: skip


def files(request: ExportRequest) -> list[str]:
    return sorted(file.name for file in request.directory.iterdir())


def test_each_tensor_is_loaded_once_for_all_quantisations(request_: ExportRequest) -> None:
    loaded: list[str] = []
    calls: list[tuple[int, int, str]] = []
    report = export(
        replace(request_, tensors=entries(loaded), progress=lambda *call: calls.append(call))
    )
    assert loaded == list(SHAPES)
    assert calls[-1] == (len(SHAPES), len(SHAPES), "model.final_norm")
    assert [f.path.name for f in report.files] == ["tiny-F32.gguf", "tiny-Q8_0.gguf"]
    assert report.tensors == len(SHAPES) and report.dropped == {} and report.notes == ()
    read = {t.name: t for t in GGUFReader(report.files[0].path).tensors}
    assert len(read) == len(SHAPES)
    expected = {e.role: e.load() for e in entries()}
    assert torch.equal(torch.tensor(read["blk.0.ffn_down.weight"].data), expected["down"])
    pairs = expected["q"].reshape(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
    assert torch.equal(torch.tensor(read["blk.0.attn_q.weight"].data), pairs)


def test_a_few_tensors_are_held_at_a_time(request_: ExportRequest) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def load(shape: tuple[int, ...]) -> torch.Tensor:
        assert sum(held() is not None for held in alive) <= 4  # used, waiting, written, waiting
        tensor = torch.ones(shape)
        alive.append(weakref.ref(tensor))
        return tensor

    lazy = [replace(entry, load=lambda s=entry.shape: load(s)) for entry in entries()]
    assert export(replace(request_, tensors=lazy)).tensors == len(alive)


def test_a_width_that_does_not_fit_is_reported(request_: ExportRequest) -> None:
    report = export(replace(request_, quants=("q4_k_m",)))
    assert "q4_k_m: 5 tensors are Q5_0 instead of Q4_K" in " ".join(report.notes)


def test_an_existing_output_is_refused_and_replaced_when_asked(request_: ExportRequest) -> None:
    first = export(request_)
    with pytest.raises(OutputExistsError, match=r"tiny-F32\.gguf, tiny-Q8_0\.gguf"):
        export(request_)
    again = export(replace(request_, overwrite=True))
    assert [f.sha256 for f in again.files] == [f.sha256 for f in first.files]


def test_a_full_disk_leaves_nothing(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = HashingFile.write

    class Disk:
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def failing(self: HashingFile, data: Any) -> int:
        if self.bytes > 60_000:
            self._file = Disk()  # type: ignore[assignment]
        return write(self, data)

    monkeypatch.setattr(HashingFile, "write", failing)
    with pytest.raises(ExportError, match="No space left"):
        export(request_)
    assert files(request_) == []


def test_tokens_without_a_vector_are_refused(request_: ExportRequest) -> None:
    with pytest.raises(CheckpointError, match="257 tokens, the embedding 250 rows"):
        export(replace(request_, tensors=entries(embedding=(250, 64))))
    assert files(request_) == []


def test_an_unknown_pre_tokenizer_is_refused_before_any_weight(request_: ExportRequest) -> None:
    loaded: list[str] = []
    with pytest.raises(UnsupportedError, match=r"pre-tokenizers that llama\.cpp knows"):
        export(replace(request_, tokenize=lambda _: [0], tensors=entries(loaded)))
    assert loaded == [] and files(request_) == []


def test_a_missing_tokenizer_is_refused(request_: ExportRequest) -> None:
    with pytest.raises(ExportError, match="tokenizer"):
        export(replace(request_, tokenize=None))


def test_a_family_without_gguf_facts_is_refused(request_: ExportRequest) -> None:
    with pytest.raises(UnsupportedError, match="'llama' does not say how"):
        export(replace(request_, family=replace(LLAMA, exports={})))


def test_a_tensor_without_a_place_is_refused_by_name(request_: ExportRequest) -> None:
    stranger = replace(entries()[0], role="other", name="model.stranger")
    with pytest.raises(UnsupportedError, match=r"model\.stranger"):
        export(replace(request_, tensors=[*entries(), stranger]))


def test_two_tensors_for_one_place_are_refused(request_: ExportRequest) -> None:
    with pytest.raises(ExportError, match=r"two tensors map to 'token_embd\.weight'"):
        export(replace(request_, tensors=[*entries(), entries()[0]]))


def test_a_tensor_of_another_shape_than_announced_is_refused(request_: ExportRequest) -> None:
    wrong = [replace(entry, load=lambda: torch.zeros(1)) for entry in entries()]
    with pytest.raises(ExportError, match=r"announced with shape \(260, 64\)"):
        export(replace(request_, tensors=wrong))
    assert files(request_) == []


def test_a_quantisation_of_a_third_party_is_written_with_its_own_encoder(
    request_: ExportRequest,
) -> None:
    asked: list[tuple[str, str]] = []

    def choose(entry: TensorEntry) -> Choice:
        return Choice(BLOCKS["F32" if len(entry.shape) == 1 else "Q8_0"])

    def encoder(
        tensor: torch.Tensor, block: Block, name: str, importance: torch.Tensor | None
    ) -> Iterable[memoryview]:
        asked.append((name, block.name))
        return encode(tensor * 2, block, name, importance)

    mine = Quantisation("lean", 7, choose)
    report = write(replace(request_, quants=("lean",)), [mine], encoder=encoder)
    assert [f.path.name for f in report.files] == ["tiny-LEAN.gguf"]
    assert ("model.down", "Q8_0") in asked and ("model.final_norm", "F32") in asked
    read = {t.name: t for t in GGUFReader(report.files[0].path).tensors}
    norm = torch.tensor(read["output_norm.weight"].data)
    assert torch.equal(norm, 2 * entries()[-1].load())


def test_a_row_block_at_a_time_is_taken_where_the_stream_has_rows(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotloop_gguf.pipeline.ELEMENTS", 1024)
    whole = export(request_)
    asked: list[int] = []

    def rows(entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        asked.append((stop - start) * (entry.shape[1] if len(entry.shape) > 1 else 1))
        return entry.load()[start:stop]

    lazy = [replace(e, rows=partial(rows, e)) for e in entries()]
    again = export(replace(request_, tensors=lazy, overwrite=True))
    assert [f.sha256 for f in again.files] == [f.sha256 for f in whole.files]
    assert max(asked) <= 1024 < 260 * 64
