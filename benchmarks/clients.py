"""What others make of the exports: vLLM, lm-eval, llama.cpp, transformers and PEFT as judges.

Adapters are trained with the package's commands in 4 bits (the package's tiny base, and stories260K
where QLORA_KIT_DATA has it), exported in every format, and given to the programs that people serve
and measure with, each in an environment of its own in which this project cannot be imported. Each
answers ten held-out prompts greedily and gives log-probabilities at every token of what our own
model answers; both must be ours. A text can be right where a model is not: what counts are the
log-probabilities. A client that cannot be installed or does not take a format is a row that says
why. Each client has a result of its own, so that one of them can be asked again.

The environments take 9 GB, most of it torch four times, and are kept in `--environments`.

    python benchmarks/clients.py --environments DIR      # forty minutes on a core
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from clients_parts import made  # noqa: E402
from clients_parts.cases import CASES, CLIENTS, UNQUANTIZED, Case  # noqa: E402
from clients_parts.distance import distance  # noqa: E402
from clients_parts.environments import (  # noqa: E402
    CannotInstallError,
    clean_environment,
    python_of,
)
from record import make_parser, write_result  # noqa: E402

PARTS = Path(__file__).resolve().parent / "clients_parts"
NEW_TOKENS = 24
PROMPTS = 10
LIMIT_S = 600
LIMIT_BYTES = 10 * 1024**3
ALONE = ("vllm",)
"""Clients that take one model a process."""


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.made or Path(temporary)).resolve()
        named = given.model or ""
        settings = [one for one in made.settings() if one.name.startswith(named)]
        asked = [
            one
            for setting in settings
            for one in prepare(
                setting, given, folder / re.sub("[ ,]+", "-", setting.name), setting is settings[0]
            )
        ]
        for client in CLIENTS:
            of_client = [one for one in asked if one.case.client == client]
            answer_all(of_client, given)
            rows = [one.said for one in of_client]
            result = {"settings": made.SETTINGS, "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
            if rows:
                write_result(given, result | {"rows": rows}, client.lower().replace("-", "_"))
    parts = sorted(given.results.glob(f"{given.result}_*.json"))
    print("\n".join(table([row for part in parts for row in json.loads(part.read_text())["rows"]])))


def arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "clients")
    kept = Path(tempfile.gettempdir()) / "qlora-kit-clients"
    parser.add_argument("--environments", type=Path, default=kept, help="folder (%(default)s)")
    parser.add_argument("--made", type=Path, help="folder of adapters and exports, used again")
    parser.add_argument("--client", nargs="+", choices=CLIENTS)
    parser.add_argument("--format", nargs="+", choices=sorted({one.format for one in CASES}))
    parser.add_argument("--model", help="how the names of the settings begin")
    given = parser.parse_args()
    given.environments = given.environments.resolve()
    return given


@dataclass
class Asked:
    """A case of one setting: the task, what our models answer, and what is to be said of it."""

    case: Case
    task: dict[str, Any]
    ours: dict[str, Any]
    said: dict[str, Any]


def prepare(
    setting: made.Trained, given: argparse.Namespace, folder: Path, first: bool
) -> list[Asked]:
    """Train and export for one setting, and ask our own models."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter = made.trained(setting, folder)
    rows = made.rows_of(setting, PROMPTS)
    config = json.loads((setting.base / "config.json").read_text())
    task = {
        "rows": rows,
        "new_tokens": NEW_TOKENS,
        "context": setting.context,
        "vocabulary": config["vocab_size"],
        "rank": json.loads((adapter / "adapter_config.json").read_text())["r"],
        "base": str(setting.base),
    }
    answer = folder / "ours.json"
    answer.unlink(missing_ok=True)
    models = {"trained": [], UNQUANTIZED: ["--bits", "16", "--dtype", "fp32"]}
    asked = task | {"adapter": str(adapter), "options": models, "answer": str(answer)}
    why = run(sys.executable, "ask_ours.py", [asked])
    ours = json.loads(answer.read_text()) if answer.exists() else {"failed": why}
    if "trained" not in ours:
        raise SystemExit(f"our own model: {ours}")
    for row, said in zip(rows, ours["trained"]["rows"], strict=True):
        row |= {"ids": said["tokens"], "continuation": said["continuation"]}
    found = []
    for number, case in enumerate(CASES):
        if not is_wanted(case, given) or (case.once and not first):
            continue
        described = {one: getattr(case, one) for one in ("client", "format", "how", "against")}
        one = Asked(case, dict(task), ours, {"model": setting.name, **described})
        one.task |= {"how": case.how, "plain_kernels": case.plain_kernels}
        one.task |= {"answer": str(folder / f"answer-{number}.json")}
        Path(one.task["answer"]).unlink(missing_ok=True)
        try:
            one.task |= given_to(case, adapter, folder)
        except Exception as error:
            one.said["not_exported"] = f"{type(error).__name__}: {error}"
        found.append(one)
    return found


def is_wanted(case: Case, given: argparse.Namespace) -> bool:
    return (
        case.format in made.offered()
        and (given.client is None or case.client in given.client)
        and (given.format is None or case.format in given.format)
    )


def given_to(case: Case, adapter: Path, folder: Path) -> dict[str, str]:
    """The files that a client reads, exported where they are not there."""
    place = made.exported(case.format, adapter, folder)
    if case.format == "adapter":
        return {"adapter": str(place)}
    if (place / "adapter").is_dir():
        return {"model": str(place), "base": str(place), "adapter": str(place / "adapter")}
    if case.format == "gguf-lora":
        base = made.base_gguf(adapter, folder)
        return {"model": str(base), "lora": str(made.file_of(place))}
    return {"model": str(made.file_of(place) if case.format.startswith("gguf") else place)}


def answer_all(asked: list[Asked], given: argparse.Namespace) -> None:
    """Let one client answer; a task that ends its process takes no other along."""
    waiting = [one for one in asked if "not_exported" not in one.said]
    if not waiting:
        return
    try:
        python = python_of(waiting[0].case.environment, given.environments)
    except CannotInstallError as error:
        for one in waiting:
            one.said["not_installed"] = str(error)
        return
    while waiting:
        together = waiting if waiting[0].case.client not in ALONE else waiting[:1]
        why = run(str(python), together[0].case.script, [one.task for one in together])
        answered = [one for one in together if Path(one.task["answer"]).exists()]
        for one in answered:
            one.said |= judged(one, json.loads(Path(one.task["answer"]).read_text()))
        if len(answered) < len(together):
            together[len(answered)].said["failed"] = why
        done = min(len(answered) + 1, len(together))
        for one in waiting[:done]:
            print(json.dumps(one.said), flush=True)
        waiting = waiting[done:]


def judged(one: Asked, theirs: dict[str, Any]) -> dict[str, Any]:
    """The distance of a client's answer from the model of ours that it should be."""
    if "rows" not in theirs:
        return theirs
    said = distance(one.ours[one.case.against], theirs, one.task["rows"])
    if one.case.against == UNQUANTIZED:
        far = distance(one.ours["trained"], theirs, one.task["rows"])
        kept = ("equal_text", "logprob", "kl", "top1", "given")
        said["from_trained"] = {name: far[name] for name in kept if name in far}
    shown = ("warnings", "repacking_layers", "versions")
    return said | {name: theirs[name] for name in shown if theirs.get(name)}


def run(python: str, script: str, tasks: list[dict[str, Any]]) -> str:
    """Ask in a process with a limit of time and memory; its last word, of interest if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        question = Path(folder) / "tasks.json"
        question.write_text(json.dumps(tasks))
        try:
            done = subprocess.run(
                [python, "-E", "-s", str(PARTS / script), str(question)],
                cwd=folder,
                env=clean_environment() | {"HF_HOME": folder},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LIMIT_S * len(tasks),
                check=False,
                preexec_fn=limited,
            )
        except subprocess.TimeoutExpired:
            return f"no answer within {LIMIT_S * len(tasks)} s"
    lines = done.stderr.strip().splitlines() or ["without a word"]
    return f"ended with {done.returncode}: {lines[-1][:300]}"


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """As it stands in the README of the benchmarks: a line for each case, a column for a setting.

    A cell has the texts that are equal, of ten; the largest difference of a log-probability (of
    the sum over a completion where a client gives no more); and the divergence.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    cases: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        read = f"{row['format']}{row['how'] and ': '}{row['how']}"
        cases.setdefault((row["client"], read, row["against"]), {})[row["model"]] = cell(row)
    lines = [["client", "format", "is our model", *models], ["---"] * 3 + ["---:"] * len(models)]
    lines += [[*case, *(found.get(one, "") for one in models)] for case, found in cases.items()]
    return [f"| {' | '.join(line)} |" for line in lines]


def cell(row: dict[str, Any]) -> str:
    if why := next((one for one in WHY if one in row), None):
        return why.replace("_", " ")
    figures = [row["logprob"], row["kl"]] if "kl" in row else [row["given"]]
    return ", ".join([str(row["equal_text"]), *(f"{one:.0e}" for one in figures)])


WHY = ("not_exported", "not_installed", "refused", "failed")


if __name__ == "__main__":
    main()
