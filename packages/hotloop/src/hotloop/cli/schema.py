"""`hotloop schema`."""

from __future__ import annotations

from .terminal import examples, print_json


@examples("hotloop schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from hotloop.training.recipe import Recipe

    print_json(Recipe.model_json_schema())
