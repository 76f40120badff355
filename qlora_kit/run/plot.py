"""A finished run as one picture (`--plot`): loss, learning rate, tokens a second, memory."""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.errors import ConfigError, excerpt
from qlora_kit.files.atomic import write_file
from qlora_kit.pictures import png, training_figure

KINDS = (".png", ".html")
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; font-family: sans-serif }}
img {{ max-width: 100% }}
</style>
</head><body><h1>{title}</h1><p>{said}</p>
<img alt="{said}" src="data:image/png;base64,{picture}"></body></html>
"""


def check_plot(name: str | None, overwrite: bool) -> None:
    """Refuse a picture that could not be written; torch is not needed. Errors: `ConfigError`."""
    if name is None:
        return
    path, shown = Path(name), f"--plot {excerpt(name)}"
    if path.suffix not in KINDS:
        raise ConfigError(f"{shown}: is neither a .png nor a .html", "name a file that ends so")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{shown}: matplotlib is not installed", "pip install 'qlora-kit[plots]'")
    if not path.parent.is_dir():
        raise ConfigError(f"{shown}: {path.parent} is no directory", "make it first")
    if os.path.lexists(path) and not (overwrite and path.is_file() and not path.is_symlink()):
        raise ConfigError(f"{shown}: is there already", "name a new file, or give --overwrite")


def write_plot(name: str, metrics: Path, record: Mapping[str, Any]) -> None:
    """Draw the steps that `metrics` has a line of. Errors: `OSError`."""
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
