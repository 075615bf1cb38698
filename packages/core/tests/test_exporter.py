from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hotloop_core import ExportedFile, ExporterSpec, ExportReport
from hotloop_core.errors import ConfigError, ExportError
from hotloop_core.exporter import round_tensor

SPEC = ExporterSpec(
    api=1,
    name="demo",
    target="demo:export",
    summary="",
    quants={"q8_0": "eight bits", "f16": "sixteen"},
    aliases={"fast": "q8_0"},
)


def test_quant_names_and_aliases_resolve_in_any_case() -> None:
    assert [SPEC.resolve(name) for name in ("q8_0", "Q8_0", "FAST")] == ["q8_0"] * 3


def test_an_unknown_quant_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'q8_0'\? It has q8_0, f16"):
        SPEC.resolve("q8_1")


def test_a_report_prints_files_hashes_and_what_was_left_out() -> None:
    file = ExportedFile(path=Path("/x/m.gguf"), bytes=1234, sha256="ab")
    report = ExportReport(
        format="demo", quants=("f16",), files=(file, file), tensors=3, dropped={"t": "why"},
        notes=("look",),
    )  # fmt: skip
    assert report.bytes == 2468
    for part in ("demo f16: 3 tensors, 2,468 bytes", "m.gguf", "sha256 ab", "t (why)", "look"):
        assert part in str(report)


def test_rounding_is_to_nearest_even_and_refuses_what_does_not_fit() -> None:
    value = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8])
    assert round_tensor(value, torch.bfloat16, "w").tolist() == [1.0, 1.0 + 2**-6]
    assert round_tensor(torch.tensor([65504.0]), torch.float16, "w").item() == 65504.0
    with pytest.raises(ExportError, match=r"w: a value of 7e\+04 does not fit"):
        round_tensor(torch.tensor([1.0, -7e4]), torch.float16, "w")


def test_rounding_leaves_integers_empty_tensors_and_wider_dtypes_alone() -> None:
    assert round_tensor(torch.tensor([2**40]), torch.int64, "i").item() == 2**40
    assert round_tensor(torch.empty(0), torch.float16, "e").shape == (0,)
    assert round_tensor(torch.tensor([3e38]), torch.float64, "d").dtype == torch.float64
