"""One model_type through the commands: what `benchmarks/models.py` does in a type's process."""

from __future__ import annotations

import contextlib
import json
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from any_model import random_model, save_random, tiny_config
from families import save_tokenizer, token_ids
from models_steps import CHAIN, Cell, FaultError, RefusedError, line_of
from torch import nn
from trained import write_rows

from qlora_kit.commands.main import main
from qlora_kit.errors import QloraKitError


def prepare(root: Path) -> None:
    """Everything imported and the rows written, before the processes are forked."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    write_rows(root / "rows.jsonl")
    random_model("llama")(input_ids=token_ids())
    for command in ("finetune", "export"):
        with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
            main([command, "--help"])


def make_row(kind: str, bits: Sequence[int], folder: Path, path: Path) -> None:
    """The row of a type, written into `path` after every step, so that a crash leaves it there."""
    folder.mkdir()
    row: dict[str, Any] = {}

    def note(step: str) -> None:
        path.write_text(json.dumps({**row, "at": step}))

    note("nothing")
    if made := make_checkpoint(kind, folder / "base", row):
        row["transformers"] = made
    for number in bits:
        cell = Cell(folder / "base", number, folder / str(number))
        cell.folder.mkdir()
        row[str(number)] = cell.found
        for step, work in CHAIN.items():
            note(f"{number} bits, {step}")
            try:
                work(cell)
            except QloraKitError as error:
                cell.found["refused"] = line_of(error, folder)
                cell.found["refused_at"] = step
                break
            except RefusedError as error:
                cell.found["refused"], cell.found["refused_at"] = str(error), step
                break
            except (FaultError, AssertionError) as error:
                cell.found["fault"] = f"{step}: {error}"[:300]
                break
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                said = f"{step}: {type(error).__name__}: {error} ({Path(place.filename).name})"
                cell.found["fault"] = said.replace(str(folder.parent), "")[:400]
                traceback.print_exc()
                break
        else:
            cell.found["works"] = True
        shutil.rmtree(cell.folder)
    note("the end")
    shutil.rmtree(folder)


def make_checkpoint(kind: str, directory: Path, row: dict[str, Any]) -> str | None:
    """A tiny checkpoint; what transformers says where it makes none, or does not run it."""
    directory.mkdir()
    try:
        config = tiny_config(kind)
        config.save_pretrained(directory)
    except Exception as error:
        return f"no config: {type(error).__name__}: {error}"[:300]
    save_tokenizer(directory)
    try:
        model = save_random(directory, kind)
    except Exception as error:
        return f"no model: {type(error).__name__}: {error}"[:300]
    row["class"] = type(model).__name__
    count = sum(one.numel() for one in model.parameters())
    in_linears = sum(one.weight.numel() for one in model.modules() if isinstance(one, nn.Linear))
    row["parameters"], row["in_linears"] = count, round(in_linears / count, 3)
    try:
        with torch.no_grad():
            model(input_ids=token_ids(), use_cache=False)
    except Exception as error:
        return f"no forward: {type(error).__name__}: {error}"[:300]
    return None
