"""Which `raise` statements of the package an error went through, and which there are."""

from __future__ import annotations

import ast
import traceback
from pathlib import Path

import qlora_kit

PACKAGE = Path(qlora_kit.__file__).parent


def sites_of(error: BaseException | None) -> set[tuple[str, int]]:
    """Modules and lines of the package where an error, or what it stands for, was raised."""
    sites, rest = set(), [error]
    while rest:
        one = rest.pop()
        if one is None:
            continue
        rest += [one.__cause__, one.__context__]
        for frame, line in traceback.walk_tb(one.__traceback__):
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                sites.add((str(path.relative_to(PACKAGE).with_suffix("")), line))
    return sites


def raises_of(module: str) -> dict[int, str]:
    """The line of each `raise` in a module, to its function and text."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Raise):
                    text = " ".join(ast.unparse(node).split())
                    # An inner function comes later, and is the nearer one.
                    found[node.lineno] = f"{function.name}: {text[:100]}"
    return dict(sorted(found.items()))
