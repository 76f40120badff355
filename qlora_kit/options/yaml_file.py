"""A config file to the values of options.

The file is YAML (or JSON, which is YAML) of one level: names and values, or lists of names. Of a
value its source text is taken, and the option says what it is: `042` is 42 where a number belongs
and a name where a name does, and so are `1.10`, `off` and a date. Its nodes are looked at before
anything is made of them, so that every problem has its line, no tag makes an object, and a few
lines that stand for a huge value stay a few lines.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.errors import ConfigError, UnsafeInputError, excerpt
from qlora_kit.options.option import Options, convert, types_of
from qlora_kit.options.parsed import MOST_PROBLEMS, closest, fields_of, spellings_of

CONFIG_LIMIT = 64 * 1024
"""Bytes of a config file, which take up to a second; an option's line has some fifty."""
YAML_TAG = "tag:yaml.org,2002:"
NULL = f"{YAML_TAG}null"
PLAIN_TAGS = {"null", "bool", "int", "float", "str", "seq", "map", "merge", "timestamp"}


class _Loader(yaml.SafeLoader):
    """Takes every plain value but null for text: what it is, the option knows."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == NULL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_config(
    path: str, groups: Sequence[type[Options]], check: Callable[[bytes], object] = len
) -> dict[str, Any]:
    """The options of a config file by their outside names; their values are not yet checked.

    `check` is called with the file's bytes first. Errors: its own, `ConfigError` with the file and
    the line, `UnsafeInputError` for a tag.
    """
    fields = fields_of(groups)
    spelling = spellings_of(fields)
    text = _config_text(path, check)
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    problems: list[str] = []
    try:
        loader = _Loader(text)
        loader.name = path
        root = loader.get_single_node()
        if root is None or root.tag == NULL:
            return {}
        _refuse_tags(root, path)
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: holds no options", "write `name: value` lines")
        for key, node in root.value:
            if len(problems) == MOST_PROBLEMS:
                break
            line = key.start_mark.line + 1
            word = key.value if isinstance(key, yaml.ScalarNode) else ""
            name = spelling.get(word.replace("-", "_"))
            if name is None or name in ("config", "debug"):
                problems.append(
                    f"{path}:{line}: unknown key {excerpt(word)}{closest(word[:60], spelling)}"
                )
            elif name in lines:
                problems.append(f"{path}:{line}: {word} is set in line {lines[name]} already")
            elif not _is_plain(node):
                # Nothing deeper is built: a few lines of YAML can stand for a huge value.
                problems.append(f"{path}:{line}: {word} is not a value or a list of names")
            else:
                lines[name] = line
                group, field = fields[name]
                value = _value_of(node)
                if value is not None:
                    # What is of no such type is refused with its range where the option is made.
                    with contextlib.suppress(ValueError):
                        value = convert(value, types_of(group)[field.name])
                    values[name] = value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}",
            "correct that line",
        ) from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not a config: {error}", "correct the file") from error
    if problems:
        raise ConfigError("; ".join(problems), "correct or remove these lines")
    return values


def dump(values: Mapping[str, Any]) -> str:
    """The text of a config file that `--config` accepts."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _refuse_tags(root: yaml.Node, path: str) -> None:
    """Only plain values: a tag asks for an object, and may ask to run code."""
    nodes, seen = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # an alias: the same node again
            continue
        seen.add(id(node))
        if node.tag.removeprefix(YAML_TAG) not in PLAIN_TAGS:
            raise UnsafeInputError(
                f"{path}:{node.start_mark.line + 1}: the tag {excerpt(node.tag, 100)} would make "
                "an object",
                "a config file holds plain values only; remove the tag",
            )
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]


def _config_text(path: str, check: Callable[[bytes], object]) -> str:
    try:
        status = os.stat(path)
        # Looked at before it is opened: a FIFO would wait for a writer, and a device need not end.
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"--config {path}: is not a regular file", "name a YAML file")
        if status.st_size > CONFIG_LIMIT:
            raise ConfigError(
                f"--config {path}: has {status.st_size} bytes", f"give at most {CONFIG_LIMIT}"
            )
        content = Path(path).read_bytes()
        check(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config {path}: byte {error.start} is not UTF-8", "save the file as UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--config {path}: {reason}", "name a YAML file that can be read"
        ) from error


def _is_plain(node: yaml.Node) -> bool:
    if isinstance(node, yaml.SequenceNode):
        return all(isinstance(item, yaml.ScalarNode) for item in node.value)
    return isinstance(node, yaml.ScalarNode)


def _value_of(node: yaml.Node) -> str | list[str | None] | None:
    """The text of a value, or of each value of a list; None for null."""
    if isinstance(node, yaml.SequenceNode):
        return [None if item.tag == NULL else item.value for item in node.value]
    return None if node.tag == NULL else str(node.value)
