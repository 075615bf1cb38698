"""What a run is to write and tell is checked before it loads anything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hotloop.training.directory import RunDirectory
from hotloop.training.output import check_output, write_exports
from hotloop.training.recipe import make_recipe
from hotloop.training.run import Run
from hotloop_core import ExportReport
from hotloop_core.errors import ConfigError, HotloopError, NoExporterError

if TYPE_CHECKING:
    from pathlib import Path

    from hotloop.training.recipe import Recipe


def asking(**sections: Any) -> Recipe:
    export = sections.pop("export", [])
    least = {"model": {"name": "m", "bits": 16}, "data": {"path": "d"}}
    return make_recipe({**least, "output": {"directory": "run", "export": export}, **sections})


@pytest.mark.parametrize(
    ("sections", "error", "says"),
    [
        ({"export": [{"format": "ggfu"}]}, NoExporterError, "writes 'ggfu'"),
        ({"export": [{"format": "gguf", "quant": "q9"}]}, ConfigError, "no quantisation 'q9'"),
        ({"export": [{"format": "gguf", "quant": []}]}, ConfigError, "an empty list"),
        (
            {"export": [{"format": "safetensors", "quant": "adapter"}], "lora": False},
            ConfigError,
            "without lora there is none",
        ),
        (
            {"export": [{"format": "safetensors", "quant": ["adapter", "16bit"]}]},
            ConfigError,
            "in an item of its own",
        ),
        ({"report_to": ["wandbb"]}, ConfigError, "report_to: wandbb is no tracker"),
    ],
)
def test_what_could_only_fail_after_training_is_refused_before(
    sections: dict[str, Any], error: type[HotloopError], says: str
) -> None:
    with pytest.raises(error, match=says):
        check_output(asking(**sections))


def test_what_can_be_written_is_taken() -> None:
    items = [{"format": "gguf", "quant": ["Q4_K_M", "q8_0"]}, {"format": "safetensors"}]
    check_output(asking(export=items, report_to=["none"]))


def test_a_run_that_could_not_export_does_not_begin(recipe: Recipe, tmp_path: Path) -> None:
    asked = recipe.model_dump(mode="json")
    asked["output"]["export"] = [{"format": "ggfu"}]
    with pytest.raises(NoExporterError):
        Run(make_recipe(asked))
    assert not (tmp_path / "run").exists()


def test_two_exports_of_one_format_both_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*args: Any, **_: Any) -> ExportReport:
        assert not args[2].exists()
        args[2].mkdir(parents=True)
        return ExportReport(format="", quants=(), files=(), tensors=0)

    monkeypatch.setattr("hotloop.exporting.export", write)
    items = [{"format": "safetensors", "quant": q} for q in ("16bit", "adapter", None)]
    run: Any = SimpleNamespace(
        recipe=asking(export=[*items, {"format": "gguf"}]),
        directory=RunDirectory(tmp_path),
        model=None,
        tokenizer=None,
    )
    write_exports(run)
    assert {path.name for path in (tmp_path / "export").iterdir()} == {
        "safetensors-16bit",
        "safetensors-adapter",
        "safetensors-default",
        "gguf",
    }
