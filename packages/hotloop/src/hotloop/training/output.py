"""What a recipe asks for beside the steps, exports and trackers: refused before a run where they could only fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_core import discover
from hotloop_core.errors import ConfigError

if TYPE_CHECKING:
    from .recipe import Recipe
    from .run import Run


def check_output(recipe: Recipe) -> None:
    """Raises, before hours of training, where its results could not be written or told.

    Raises:
        NoExporterError, ConfigError: an exporter, quantisation or tracker that is not there.

    """
    for item in recipe.output.export:
        exporter = discover().exporter(item.format)
        quants = [item.quant] if isinstance(item.quant, str) else item.quant
        if quants == []:
            raise ConfigError(
                f"output.export of {item.format}: quant is an empty list; choose among {', '.join(exporter.quants)}"
            )
        found = {exporter.resolve(name) for name in quants or list(exporter.quants)[:1]}
        adapter = found & exporter.adapter_quants
        if adapter and (recipe.lora is None or adapter != found):
            why = (
                "without lora there is none"
                if recipe.lora is None
                else "name it in an item of its own"
            )
            raise ConfigError(
                f"output.export of {item.format}: {', '.join(sorted(adapter))} is the adapter alone; {why}"
            )
    if recipe.report_to:
        from transformers.integrations import get_available_reporting_integrations

        known = {"all", "none", *get_available_reporting_integrations()}
        missing = [name for name in recipe.report_to if name not in known]
        if missing:
            raise ConfigError(
                f"report_to: {', '.join(missing)} is no tracker that is installed here; transformers finds "
                f"{', '.join(sorted(known - {'all', 'none'})) or 'none'}. Install it, or leave it out."
            )


def write_exports(run: Run) -> list[str]:
    """The exports that the run's recipe asks for, of the model as it is; the paths of their files.

    Each format has a folder; so has each item where several are of one format, as one may replace what another wrote.
    """
    from hotloop.exporting import export

    items = run.recipe.output.export
    formats = [item.format for item in items]
    written: list[str] = []
    for item in items:
        quants = [item.quant] if isinstance(item.quant, str) else item.quant or ["default"]
        several = formats.count(item.format) > 1
        folder = "-".join([item.format, *quants]) if several else item.format
        result = export(
            run.model,
            run.tokenizer,
            run.directory.exports / folder,
            format=item.format,
            quant=item.quant,
            name=run.directory.path.name,
            overwrite=True,
        )
        written += [str(file.path) for file in result.files]
    return written
