"""What `show-data` shows of rows, and where its page may go: no weight is read.

The place, the rows and the tokenizer's files are refused before torch is imported.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.base.checks import read_context
from qlora_kit.base.source import resolve
from qlora_kit.base.tokenizer import load_tokenizer
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import ShowConfig
from qlora_kit.config.data import DEFAULT_LENGTH, DataConfig
from qlora_kit.data.chat_template import chat_options, check_chat_options, use_template
from qlora_kit.data.rows import load_rows
from qlora_kit.data.source import local_files
from qlora_kit.errors import ConfigError
from qlora_kit.options.parsed import Parsed

if TYPE_CHECKING:
    from qlora_kit.data.report import Report


def page_path(parsed: Parsed, head: str) -> Path | None:
    """Where `--html` goes: a new file, or in the place of an earlier page that is not read here.

    A page is known by `head`, its beginning. Errors: `ConfigError`, before anything is read.
    """
    name = parsed[ShowConfig].html
    if name is None:
        return None
    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"--html {name}: is a directory", "name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--html {name}: {path.parent} is no directory", "make it first")
    if not os.path.lexists(path):
        return path
    if not path.is_file():
        raise ConfigError(f"--html {name}: is not a regular file", "name a new file")
    with open(path, "rb") as file:
        if file.read(len(head)) != head.encode():
            raise ConfigError(
                f"--html {name}: is there, and is no page of show-data", "name a new file"
            )
    data = parsed[DataConfig]
    named = (data.data, data.eval_data, data.chat_template, parsed.config_file)
    # A page that lies in a directory of data is none of its files.
    lies_there = path.suffix == ".html" and any(os.path.isdir(one) for one in named if one)
    read = (one for other in named if other is not None for one in local_files(other))
    if not lies_there and any(one.exists() and path.samefile(one) for one in read):
        raise ConfigError(f"--html {name}: is read here", "name a new file")
    return path


def data_report(parsed: Parsed) -> Report:
    """The rows, encoded as a run would. Errors: those of the tokenizer and the rows."""
    base, data, options = parsed[BaseConfig], parsed[DataConfig], parsed[ShowConfig]
    source = resolve(base.model, base.revision, weights=False)
    rows = load_rows(data, options.seed)
    tokenizer = load_tokenizer(source.directory)
    if data.chat_template is not None:
        use_template(tokenizer, data.chat_template)
    check_chat_options(tokenizer, chat_options(data))
    context = DEFAULT_LENGTH if data.max_length is None else data.max_length
    length = data.length_in(read_context(source.directory) or context)
    from qlora_kit.data.report import report_of

    return report_of(
        rows,
        data,
        length,
        source.name,
        tokenizer,
        batch_size=options.batch_size,
        seed=options.seed,
        count=options.rows,
    )
