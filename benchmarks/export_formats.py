"""What llama.cpp and transformers read of each form of trained adapters: tokens, KL, agreement.

Adapters on all linears are trained on NF4 by `finetune`, computing in fp32, so that what is seen is
the format's own distance: `tiny` on its sample, stories260K on WikiSQL. `export` writes each form,
and its export.json says what every reader found on the held-out rows. Of the types of a GGUF it is
measured as well what their numbers alone cost, and what llama.cpp's way to multiply by them adds
(`export_parts/gguf_values.py`). Needs QLORA_KIT_DATA and the extras gguf and llamacpp.

    OMP_NUM_THREADS=1 python benchmarks/export_formats.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from record import make_parser, write_result

if TYPE_CHECKING:
    from export_parts.gguf_values import Trained

TYPES = {f"--format gguf --dtype {name}": name for name in ("f16", "bf16", "q8_0", "q4_0")}
"""The forms that round what they multiply, and are."""
FORMS = (
    "--format hf --dtype fp32",
    "--format hf-4bit",
    "--format hf-8bit",
    "--format gguf --dtype f32",
    *TYPES,
    "--format gguf --quantize Q8_0",
    "--format gguf --quantize Q4_K_M",
    "--format gguf --merge_base none --dtype f32",
    "--format gguf-lora",
)
LIMITS = {"f32": 1e-5, "f16": 1e-5, "bf16": 1e-4, "q8_0": 5e-3}
"""KL in nats a token: what these types may cost by llama.cpp."""


class RefusedError(Exception):
    """The line that a command ended with."""


def run(*arguments: str) -> None:
    """A command of the package, quietly. Errors: `RefusedError`."""
    from qlora_kit.commands.main import main

    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = main(list(arguments))
    if code:
        raise RefusedError(said.getvalue().splitlines()[-1])


def exported(adapter: Path, form: str, place: Path, trained: Trained) -> dict[str, Any]:
    """What export.json says of the readers of one form, and its bytes; of a type its parts.

    llama.cpp quantizes no rows to Q8_0 that are no multiple of 32: then it is why.
    """
    try:
        run("export", "--adapter", str(adapter), "--output_dir", str(place), *form.split())
    except RefusedError as error:
        if "--quantize" not in form:
            raise
        return {"form": form, "refused": str(error).removeprefix("error: ")}
    report = json.loads((place / "export.json").read_text())
    names = ("kl", "top1_agreement", "max_logit_difference", "tokens", "texts", "texts_equal")
    readers = {
        reader: {name: found.get(name) for name in names}
        for reader, found in report["readers"].items()
    }
    size = sum(one.stat().st_size for one in place.rglob("*") if one.is_file())
    found = {"form": form, "bytes": size, "readers": readers}
    return found | ({"parts": trained.parts(place, TYPES[form])} if form in TYPES else {})


def main() -> None:
    from export_parts.gguf_values import Trained

    given = make_parser(__doc__ or "", "export_formats").parse_args()
    data = Path(os.environ["QLORA_KIT_DATA"])
    stories, wikisql = data / "models" / "stories260K", data / "text" / "wikisql"
    models = {
        "tiny": "--model tiny --data sample:extract",
        "stories260K": f"--model {stories} --data {wikisql} --batch_size 8 "
        "--gradient_accumulation_steps 1 --learning_rate 2e-3 --max_steps 200",
    }
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in models.items():
            adapter = Path(folder) / name
            options += " --bits 4 --dtype fp32 --target_modules all-linear"
            run("finetune", "--output_dir", str(adapter), *options.split())
            losses = json.loads((adapter / "run.json").read_text())["eval"]
            forms, trained = [], Trained.open(adapter)
            for number, form in enumerate(FORMS):
                forms.append(exported(adapter, form, Path(folder) / f"{name} {number}", trained))
                print(name, json.dumps(forms[-1]), flush=True)
            result[name] = {"eval": losses, "forms": forms}
    print(write_result(given, {"models": result, "limits": LIMITS}))


if __name__ == "__main__":
    main()
