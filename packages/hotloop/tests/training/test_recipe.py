"""The recipe's schema, its files, and what is said about a wrong one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hotloop.training.recipe import Recipe, make_recipe, read_recipe
from hotloop.training.recipe_file import dump
from hotloop_core.errors import ConfigError
from pydantic import ValidationError

LEAST = {"model": {"name": "m"}, "data": {"path": "d.jsonl"}, "output": {"directory": "run"}}

TOML = """
[model]
name = "m"
bits = 16
[data]
path = "d.jsonl"
[lora]
r = 8
[schedule]
learning_rate = 1e-3
[output]
directory = "run"
export = [{ format = "gguf", quant = ["q8_0", "f16"] }]
"""

YAML = """
model: {name: m, bits: 16}
data: {path: d.jsonl}
lora: {r: 8}
schedule: {learning_rate: 1e-3}
output:
  directory: run
  export:
    - {format: gguf, quant: [q8_0, f16]}
"""


def test_toml_and_yaml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "a.yaml").write_text(YAML)
    assert read_recipe(tmp_path / "a.toml") == read_recipe(tmp_path / "a.yaml")


def test_a_run_reads_the_recipe_that_it_wrote(tmp_path: Path) -> None:
    odd = {"system": "1e5", "messages_field": "1.5e-3", "prompt_field": "no", "text_field": "2"}
    written = make_recipe({**LEAST, "data": {"path": "d", **odd}, "schedule": {"warmup": 1e-5}})
    (tmp_path / "a.yaml").write_text(dump(written.model_dump(mode="json")))
    assert read_recipe(tmp_path / "a.yaml") == written


def test_every_problem_is_listed_with_its_path_and_the_nearest_key() -> None:
    with pytest.raises(ConfigError) as caught:
        make_recipe(
            {
                "model": {"name": "m", "bist": 4, "max_seq_len": "long"},
                "data": {"path": "d", "held_out": 1.5},
                "shedule": {},
                "output": {"export": [{"fromat": "gguf"}]},
            }
        )
    text = str(caught.value)
    assert "model.bist: unknown key; did you mean 'bits'?" in text
    assert "model.max_seq_len: Input should be a valid integer, found 'long'" in text
    assert "data.held_out: Input should be less than 1, found 1.5" in text
    assert "shedule: unknown key; did you mean 'schedule'?" in text
    assert "output.directory: missing" in text
    assert "output.export.0.fromat: unknown key; did you mean 'format'?" in text


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("schedule", {"epochs": 1.0, "steps": 5}, "epochs and steps are both set"),
        ("data", {"path": "d", "form": "text", "loss_on": "responses"}, "which has none"),
        ("lora", {"r": 0}, "lora.r: Input should be greater than 0"),
        ("lora", {"r": True}, "lora.r: Input should be a valid integer"),
        ("lora", {"seed": -1}, "lora.seed: Input should be greater than or equal to 0"),
        ("lora", False, "4-bit weights do not train"),
        ("schedule", {"epochs": math.inf}, "schedule.epochs: Input should be a finite number"),
        ("schedule", {"warmup": math.inf}, "schedule.warmup: Input should be a finite number"),
        ("schedule", {"seed": 2**32}, "schedule.seed: Input should be less than 4294967296"),
    ],
)
def test_values_that_cannot_be_are_refused(section: str, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe({**LEAST, section: values})


def test_set_overrides_one_value_in_tomls_notation(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    overrides = [
        "lora.r=32",
        "schedule.learning_rate=5e-5",
        "model.name=other",
        "data.packing=false",
    ]
    recipe = read_recipe(tmp_path / "a.toml", overrides=[*overrides, 'lora.targets=["q_proj"]'])
    assert recipe.lora is not None and recipe.lora.r == 32 and recipe.lora.targets == ["q_proj"]
    assert recipe.schedule.learning_rate == 5e-5
    assert recipe.model.name == "other"
    assert recipe.data.packing is False


@pytest.mark.parametrize("text", ["lora.r", "=3", "lora..r=3", "model.name.x=3"])
def test_a_malformed_override_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    with pytest.raises(ConfigError, match="--set"):
        read_recipe(tmp_path / "a.toml", overrides=[text])


def test_lora_false_means_full_fine_tuning(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML.replace("[lora]\nr = 8\n", ""))
    assert read_recipe(tmp_path / "a.toml").lora is not None
    assert read_recipe(tmp_path / "a.toml", overrides=["lora=false"]).lora is None
    (tmp_path / "a.yaml").write_text(YAML.replace("{r: 8}", "null"))
    assert read_recipe(tmp_path / "a.yaml").lora is None


def test_paths_are_relative_to_the_recipe_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").touch()
    (tmp_path / "a.toml").write_text(TOML)
    recipe = read_recipe(tmp_path / "a.toml")
    assert recipe.data.path == str(tmp_path / "d.jsonl")
    assert recipe.model.name == "m"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "ends in .toml"),
        ("a.toml", "[model", "not well-formed TOML"),
        ("a.yaml", "{", "not well-formed YAML"),
        ("a.yaml", "- 1", "holds a list"),
        ("a.yaml", "model: !!python/object/apply:os.system [ls]", "not well-formed YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / name)
    with pytest.raises(ConfigError, match=r"does not exist. A recipe says model.name, data.path"):
        read_recipe(tmp_path / "none.toml")
    assert make_recipe(LEAST)  # which is no less than that


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_recipe(LEAST).model = None  # type: ignore[misc, assignment]


def test_the_schema_describes_every_key_that_the_model_has() -> None:
    schema = Recipe.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert {"const": False} in schema["properties"]["lora"]["anyOf"]


def test_the_examples_are_valid_and_their_data_is_there() -> None:
    folder = Path(__file__).parents[4] / "examples"
    recipes = [*folder.glob("*.toml"), *folder.glob("*.yaml")]
    assert recipes
    for file in recipes:
        assert Path(read_recipe(file).data.path).is_file(), file.name
