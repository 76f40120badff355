"""The house is built as its plan says: floors, doors and who may touch bitsandbytes.

Everything is read off the syntax tree, imports inside functions and of types alone included.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from forked import Answer, Forks

from qlora_kit.commands.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qlora_kit"
FLOORS = {
    "process": 0,
    "redact": 0,
    "errors": 1,
    "options": 2,
    "files": 2,
    "config": 3,
    "pictures": 3,
    "device": 3,
    "kernels": 4,
    "base": 5,
    "data": 5,
    "lora": 6,
    "gguf": 6,
    "training": 7,
    "memory": 8,
    "generation": 8,
    "plan": 9,
    "serving": 9,
    "export": 9,
    "run": 10,
    "commands": 11,
    "live": 11,
    "library": 12,
    "": 12,
    "__main__": 13,
}
"""The floor of each folder, and of each module that is in none; the package is the empty name."""

BITSANDBYTES = {"base.quantize", "training.optimizer"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(
    node: ast.AST, *, types: bool, functions: bool
) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif is_type_checking(child) and not types:
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from statements(other, types=types, functions=functions)
        elif functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from statements(child, types=types, functions=functions)


def imported(name: str, *, types: bool, functions: bool = True) -> set[str]:
    """Full names of the modules that a module imports."""
    found = set()
    for node in statements(tree(name), types=types, functions=functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{name}: a relative import"
            assert node.module
            found.add(node.module)
    return found


def at_the_top(modules: Iterable[str]) -> set[str]:
    """Modules, and those of the package that are imported with them."""
    found, left = set[str](), list(modules)
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            tops = imported(name, types=False, functions=False)
            left += [one.removeprefix("qlora_kit.") for one in tops if one.startswith("qlora_kit.")]
    return found


def own(name: str, *, types: bool) -> set[str]:
    """The package's modules that a module imports, by their short names."""
    inside = {full for full in imported(name, types=types) if full.split(".")[0] == "qlora_kit"}
    return {full.removeprefix("qlora_kit").removeprefix(".") for full in inside}


def folder(name: str) -> str:
    """The first part of a module's name: its folder, or itself."""
    return name.split(".")[0]


def test_every_floor_is_one_of_a_folder_that_is_there() -> None:
    assert {folder(name) for name in MODULES} == FLOORS.keys()


def test_imports_go_down_or_stay_in_a_folder() -> None:
    """Those of types too: who may not see a room has no use for what is in it."""
    wrong = []
    for name in MODULES.keys() - PACKAGES:
        for other in own(name, types=True):
            here, there = FLOORS[folder(name)], FLOORS[folder(other)]
            if there > here or (there == here and folder(other) != folder(name)):
                wrong.append(f"{name} ({here}) imports {other} ({there})")
    assert not wrong


def test_no_module_imports_itself_around_a_corner() -> None:
    graph = {name: own(name, types=True) for name in MODULES}
    # Raises CycleError, with the modules of the cycle.
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES)


def test_names_come_from_the_module_that_defines_them() -> None:
    wrong = []
    for name in MODULES:
        for node in statements(tree(name), types=True, functions=True):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "qlora_kit"
            ):
                continue
            home = (node.module or "").removeprefix("qlora_kit").removeprefix(".")
            if home in PACKAGES:
                wrong.append(f"{name} imports from the package {node.module}")
                continue
            for alias in node.names:
                if alias.name not in defined(home):
                    wrong.append(f"{name} imports {alias.name} from {home}, which only has it")
    assert not wrong


@cache
def defined(name: str) -> frozenset[str]:
    """The names that a module's own top level makes."""
    found: set[str] = set()
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        for target in ast.walk(node):
            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                found.add(target.id)
    return frozenset(found)


LONGEST_MODULE, LONGEST_FUNCTION, MOST_IMPORTED = 300, 60, 12
LATE = 15


def functions(name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.walk(tree(name)):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child


def test_a_module_is_read_in_one_sitting() -> None:
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lines.items() if n > LONGEST_MODULE} == {}


def test_a_function_fits_on_a_screen() -> None:
    lines = {
        f"{name}.{one.name}": (one.end_lineno or 0) - one.lineno + 1
        for name in MODULES
        for one in functions(name)
    }
    assert {name: n for name, n in lines.items() if n > LONGEST_FUNCTION} == {}


def test_a_module_knows_few_others() -> None:
    counts = {name: len(own(name, types=True)) for name in MODULES}
    assert {name: count for name, count in counts.items() if count > MOST_IMPORTED} == {}


def test_imports_inside_functions_are_few() -> None:
    """One in each command, behind which torch is imported, and what else has a reason."""
    late = [
        f"{name} imports {node.module}"
        for name in MODULES
        for function in functions(name)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qlora_kit")
    ]
    assert len(late) <= LATE, late


def test_sub_packages_are_empty() -> None:
    assert [name for name in PACKAGES if name and MODULES[name].read_text().strip()] == []


def test_only_two_modules_import_bitsandbytes() -> None:
    users = {
        name
        for name in MODULES
        if any(full.split(".")[0] == "bitsandbytes" for full in imported(name, types=True))
    }
    assert users <= BITSANDBYTES
    # As text it is an import as well: `importlib.import_module("bitsandbytes.optim")`.
    hidden = {
        name
        for name in MODULES
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call) and "import" in ast.unparse(node.func)
        if any("bitsandbytes" in ast.unparse(argument) for argument in node.args)
    }
    assert not hidden


def test_the_loop_knows_neither_lora_nor_the_base_nor_memory() -> None:
    rooms = {name.split(".")[0] for name in own("training.loop", types=True)}
    assert rooms.isdisjoint({"lora", "base", "memory", "commands", "export"})


LIGHT = at_the_top(
    ["files.publish", "process.worker", *(n for n in MODULES if folder(n) == "commands")]
)
"""What is imported before a command's arguments are read, or by a process that has no torch."""


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_what_answers_at_once_imports_nothing_heavy(name: str) -> None:
    tops = {full.split(".")[0] for full in imported(name, types=False, functions=False)}
    assert tops - sys.stdlib_module_names <= {"qlora_kit", "rich", "yaml"}


def test_no_module_has_the_name_of_a_standard_one() -> None:
    # `copy`, `select` or `profile` would be found instead of it by a script beside it.
    own_names = {name.rpartition(".")[2] for name in MODULES}
    own_names |= {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert not own_names & set(sys.stdlib_module_names) - {""}


def test_every_command_has_a_script_of_three_lines() -> None:
    scripts = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}
    assert scripts.keys() == COMMANDS.keys()
    for name, path in scripts.items():
        assert path.read_text() == (
            f"from qlora_kit.commands.{name} import main\n\nraise SystemExit(main())\n"
        )


HEAVY = ("torch", "transformers", "bitsandbytes", "numpy", "safetensors", "accelerate", "peft")
REFUSE = f"""
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise AssertionError(name + " is imported before the arguments are read")
sys.meta_path.insert(0, Refuse())
"""
"""From here on nothing heavy can be imported."""


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Answer]]:
    """What a command says to `--help` or to a misspelt flag."""
    folder = tmp_path_factory.mktemp("answers")
    forks = Forks(folder, REFUSE)
    yield lambda *arguments: forks.run(folder, *arguments)
    forks.close()


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_needs_no_torch_and_under_a_second(
    answer: Callable[..., Answer], command: str
) -> None:
    found = answer(*([command] if command else []), "--help")
    assert (found.code, found.err) == (0, "")
    assert "usage: " in found.out
    assert found.seconds < 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_flag_needs_no_torch_and_under_a_second(
    answer: Callable[..., Answer], command: str
) -> None:
    found = answer(command, "--confgi", "x")
    assert found.code == 2
    assert found.out == ""
    *usage, line = found.err.splitlines()
    assert usage[0].startswith(f"usage: qlora-kit {command.replace('_', '-')} ")
    assert line.startswith("error: unknown flag --confgi, did you mean --config? ")
    assert found.seconds < 1


def test_test_modules_have_names_of_their_own() -> None:
    """pytest imports them by their names alone: of two that are alike one is not collected."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
