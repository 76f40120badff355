"""What lies beside weights so that others generate as we do: chat templates, tokens to stop at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qlora_kit.base.base import Base
from qlora_kit.base.hub import TEMPLATES
from qlora_kit.base.json_file import read_json
from qlora_kit.base.tokenizer import copy_tokenizer
from qlora_kit.data.chat_template import write_templates
from qlora_kit.files.atomic import write_plain
from qlora_kit.generation.decode import end_ids

SETTINGS = "generation_config.json"


def write_companions(base: Base, directory: Path, own_templates: bool) -> None:
    """Write the tokenizer and the generation settings of `base` for what was trained.

    With `own_templates` the chat templates are the tokenizer's and not those of the files. The
    settings get every token at which an answer stops here.
    """
    files = base.files
    assert files is not None  # it was trained on
    copy_tokenizer(files.tokenizer, directory, templates=not own_templates)
    if own_templates:
        shutil.rmtree(directory / TEMPLATES, ignore_errors=True)
        write_templates(base.tokenizer, directory)
    known = None if files.generation is None else files.source.directory / SETTINGS
    write_generation_settings(base.model, base.tokenizer, known, directory)


def write_generation_settings(
    model: PreTrainedModel, tokenizer: Any, known: Path | None, directory: Path
) -> None:
    """Write generation_config.json, as it is in the file `known` but for the tokens to stop at."""
    target = directory / SETTINGS
    if known is not None:
        settings = read_json(known)
    else:
        # What transformers takes from the model's config where there is no such file.
        made = model.generation_config
        names = ("bos_token_id", "pad_token_id")
        settings = {name: getattr(made, name) for name in names if getattr(made, name) is not None}
    said = settings.get("eos_token_id")
    listed = [said] if isinstance(said, int) else list(said or ())
    more = sorted(end_ids(model, tokenizer) - set(listed))
    if known is not None and not more:
        if known != target:
            shutil.copyfile(known, target)
        return
    ends = [*listed, *more]
    settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    write_plain(target, (json.dumps(settings, indent=2) + "\n").encode())
