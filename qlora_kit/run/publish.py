"""What a finished run leaves in its directory, all of it or nothing."""

from __future__ import annotations

from qlora_kit.export.companions import write_companions
from qlora_kit.files.atomic import sync
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.options.yaml_file import dump
from qlora_kit.run.directory import RESULT, RunDirectory
from qlora_kit.run.metrics import METRICS_FILE, write_json, write_text
from qlora_kit.run.model_card import model_card
from qlora_kit.run.plot import write_plot
from qlora_kit.run.prepare import PreparedRun
from qlora_kit.run.result import RunRecord


def write_result(plan: PreparedRun, place: RunDirectory, record: RunRecord) -> None:
    """Write the adapter, what belongs beside it, and `record`, which makes the run a finished one.

    Errors: `NumericError` for an adapter that is not finite, `OSError`.
    """
    base, config = plan.base, plan.config
    with place.result() as directory:
        save_adapter(base, directory, row_format=plan.rows.form)
        write_companions(base, directory, own_templates=config.data.chat_template is not None)
        write_text(directory / "config.yaml", dump(config.as_flat()))
        write_text(directory / "README.md", model_card(record))
        write_json(directory / RESULT, record)
        sync(place.path / METRICS_FILE)
    if config.output.plot is not None:
        write_plot(config.output.plot, place.path / METRICS_FILE, record)
