"""What a finished run leaves in its directory, all of it or nothing, and its picture (`--plot`)."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.export.companions import write_companions
from qlora_kit.files.atomic import sync, write_file
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.options.yaml_file import dump
from qlora_kit.pictures import png, training_figure
from qlora_kit.run.directory import CONFIG, RESULT, RunDirectory
from qlora_kit.run.metrics import METRICS_FILE, write_json, write_text
from qlora_kit.run.model_card import model_card
from qlora_kit.run.prepare import PreparedRun

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; font-family: sans-serif }}
img {{ max-width: 100% }}
</style>
</head><body><h1>{title}</h1><p>{said}</p>
<img alt="{said}" src="data:image/png;base64,{picture}"></body></html>
"""


def write_result(plan: PreparedRun, place: RunDirectory, record: Mapping[str, Any]) -> None:
    """Write the adapter, what belongs beside it, and `record`, which makes the run a finished one.

    Errors: `NumericError` for an adapter that is not finite, `OSError`.
    """
    base, config = plan.base, plan.config
    with place.result() as directory:
        save_adapter(base, directory, row_format=plan.rows.form)
        write_companions(base, directory, own_templates=config.data.chat_template is not None)
        write_text(directory / CONFIG, dump(config.as_flat()))
        write_text(directory / "README.md", model_card(record, is_chat=plan.rows.is_chat))
        write_json(directory / RESULT, record)
        sync(place.path / METRICS_FILE)
    if config.output.plot is not None:
        _write_plot(config.output.plot, place.path / METRICS_FILE, record)


def _write_plot(name: str, metrics: Path, record: Mapping[str, Any]) -> None:
    """Draw loss, learning rate, tokens a second and memory of the steps in `metrics`."""
    lines = metrics.read_text(encoding="utf-8").splitlines()
    steps = [
        {**step, "tokens_per_s": step["tokens"] / max(step["seconds"], 1e-9)}
        for step in map(json.loads, lines)
    ]
    train, held_out = record["train"], record["eval"] or {}
    losses = [(one["step"], one["loss"]) for one in held_out.get("history", ())]
    if held_out:
        losses = [(0, held_out["loss_before"]), *losses, (train["steps"], held_out["loss_after"])]
    picture = png(training_figure(steps, losses, train["steps"], "at most so far"))
    if Path(name).suffix == ".html":
        model, data = record["model"]["name"], record["config"]["data"]
        title = f"{model} in {record['config']['bits']} bits on {data}"
        said = f"{train['steps']} steps in {train['seconds']:.0f} s"
        if held_out:
            before, after = held_out["loss_before"], held_out["loss_after"]
            said += f", held-out loss {before:.3f} to {after:.3f}"
        texts = {"title": html.escape(title), "said": html.escape(said)}
        picture = PAGE.format(picture=base64.b64encode(picture).decode(), **texts).encode()
    write_file(Path(name), picture)
