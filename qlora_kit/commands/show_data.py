"""`qlora-kit show-data`: show which tokens of a data set are trained on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import ShowConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.options.parsed import Parsed, refuse_tokens

if TYPE_CHECKING:
    from qlora_kit.commands.data_report import Report

SUMMARY = "Show which tokens are trained on, what is skipped or cut, and how much is padding."


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    parsed = parse("qlora-kit show-data", SUMMARY, (BaseConfig, DataConfig, ShowConfig), given)
    refuse_tokens(parsed)
    options = parsed[ShowConfig]
    page = None if options.html is None else _page_path(options.html, parsed)
    report = _report(parsed)
    from qlora_kit.commands.data_page import page_of
    from qlora_kit.commands.data_text import print_report
    from qlora_kit.commands.terminal import Terminal
    from qlora_kit.files.atomic import write_file

    if page is not None:
        _page_path(str(page), parsed)  # what came there meanwhile is not lost
        write_file(page, page_of(report).encode())
    terminal = Terminal()
    if options.json:
        terminal.json(report.as_json())
    else:
        print_report(report, terminal)
        if page is not None:
            terminal.print(f"page: {page}")
    if report.refusal is not None:
        # Shown all the same: this is what a run would say.
        raise report.refusal
    return 0


def _page_path(name: str, parsed: Parsed) -> Path:
    """Where the page goes: a new file, or in the place of an earlier page that is not read here.

    Errors: `ConfigError`, before anything is read.
    """
    from qlora_kit.commands.data_page import HEAD

    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(f"--html {name}: is a directory", "name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--html {name}: {path.parent} is no directory", "make it first")
    if not os.path.lexists(path):
        return path
    if not path.is_file():
        raise ConfigError(f"--html {name}: is not a regular file", "name a new file")
    with open(path, "rb") as file:
        if file.read(len(HEAD)) != HEAD.encode():
            raise ConfigError(
                f"--html {name}: is there, and is no page of show-data", "name a new file"
            )
    data = parsed[DataConfig]
    from qlora_kit.data.source import local_files

    named = (data.data, data.eval_data, data.chat_template, parsed.config_file)
    for read in (one for name in named if name is not None for one in local_files(name)):
        # A page that lies in a directory of data is none of its files.
        lies_there = any(os.path.isdir(one) and path.suffix == ".html" for one in named if one)
        if read.exists() and path.samefile(read) and not lies_there:
            raise ConfigError(f"--html {name}: is read here", "name a new file")
    return path


def _report(parsed: Parsed) -> Report:
    """What is shown: the tokenizer alone is read, no weight."""
    from qlora_kit.base.contents import find
    from qlora_kit.base.json_file import read_json
    from qlora_kit.base.source import resolve
    from qlora_kit.base.tokenizer import load_tokenizer
    from qlora_kit.config.data import DEFAULT_LENGTH
    from qlora_kit.data.chat_template import chat_options, check_chat_options, use_template
    from qlora_kit.data.rows import load_rows

    base, data, options = parsed[BaseConfig], parsed[DataConfig], parsed[ShowConfig]
    source = resolve(base.model, base.revision, weights=False)
    rows = load_rows(data, options.seed)
    tokenizer = load_tokenizer(source.directory)
    if data.chat_template is not None:
        use_template(tokenizer, data.chat_template)
    check_chat_options(tokenizer, chat_options(data))
    context = DEFAULT_LENGTH if data.max_length is None else data.max_length
    if path := find(source.directory, "config.json"):
        context = read_json(path).get("max_position_embeddings") or context
        if type(context) is not int or context < 1:
            raise ModelError(
                f"{path}: max_position_embeddings is {str(context)[:60]}", "correct the file"
            )
    length = data.length_in(context)
    from qlora_kit.commands.data_report import report_of

    return report_of(rows, data, length, options, source.name, tokenizer)
