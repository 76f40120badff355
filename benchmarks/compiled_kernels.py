"""The Triton kernels compiled for seven architectures: registers, spills, shared memory, widths.

    python benchmarks/compiled_kernels.py

It needs no card: Triton compiles to PTX and its own ptxas to machine code, ahead of time, with the
hints that the launcher gives for pointers of 16-byte alignment and sizes that 16 divides. Widths
are the bytes that one thread's widest load and store move at once, read off the PTX. Writes
results/kernels.json, and the table in README.md.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from qlora_kit.kernels import triton_dequantize, triton_rmsnorm, triton_rotary, triton_swiglu

PAGE = Path(__file__).parent / "README.md"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
DTYPES = ("fp16", "bf16", "fp32")
WIDTHS = (128, 4096, 16384)
"""Of rows that are normalized: a head, an 8B model, the widest."""
STYLES = {1: "Llama", 0: "no weight", 2: "OLMo 2", 3: "Gemma"}
"""Of norms, by the kernels' numbers."""
UNHINTED = ("length", "rows")
"""Sizes that need not be divisible by 16."""


@dataclass(frozen=True)
class Build:
    """A kernel for a case: `types` of its arguments, `values` of its constants."""

    name: str
    function: Any
    types: Mapping[str, str]
    values: Mapping[str, Any]
    warps: int
    fusion: bool = True


@dataclass
class Compiled:
    """What ptxas and the PTX say; bytes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    widest_load: int
    widest_store: int
    instructions: str


def builds(dtype: str) -> Iterator[Build]:
    """All cases in a dtype."""
    yield from dequantizing(dtype)
    for width in WIDTHS:
        yield from normalizing(dtype, width)
    yield from rotating(dtype)
    yield from gating(dtype)


def small_set(dtype: str) -> list[Build]:
    """Each kernel in one case, and a norm without a weight, which other code is compiled for."""
    chosen: dict[str, Build] = {}
    parts = dequantizing(dtype), normalizing(dtype, 4096), rotating(dtype), gating(dtype)
    for build in itertools.chain(*parts):
        chosen.setdefault(build.function.__name__, build)
    bare = next(b for b in normalizing(dtype, WIDTHS[0]) if not b.values["STYLE"])
    return [*chosen.values(), bare]


def dequantizing(dtype: str) -> Iterator[Build]:
    types = {
        "words": "*i32",
        "absmax": "*u8",
        "nested_absmax": "*fp32",
        "nested_map": "*fp32",
        "nested_offset": "*fp32",
        "out": f"*{dtype}",
        "count": "i32",
    }
    single = {"words": "*i32", "absmax": "*fp32", "out": f"*{dtype}", "count": "i32"}
    for fp4 in (False, True):
        for nested in (True, False)[: 1 if fp4 else 2]:
            name = f"{'fp4' if fp4 else 'nf4'}{', nested scales' if nested else ''}"
            values = {"NESTED": nested, "FP4": fp4, "WORDS": triton_dequantize.WORDS}
            yield Build(
                f"dequantize {name}",
                triton_dequantize.decode,
                types if nested else single,
                values,
                triton_dequantize.WARPS,
                False,
            )


def normalizing(dtype: str, width: int) -> Iterator[Build]:
    sizes = triton_rmsnorm.tile(width)
    warps = sizes.pop("num_warps")
    one = f"*{dtype}"
    forward = dict.fromkeys(("x", "y"), one) | {"scales": "*fp32", "rows": "i32", "n": "i32"}
    backward = forward | dict.fromkeys(("grad", "out"), one)
    del backward["y"]
    rows, again = triton_rmsnorm.normalize_rows, triton_rmsnorm.normalize_again
    back = triton_rmsnorm.normalize_backward
    for style in STYLES if width == WIDTHS[0] else (1,):
        weight = {"weight": one} if style else {}
        name = f"{STYLES[style]}, {width}"
        plain = {"STYLE": style, **sizes}
        alone, adds = plain | {"ADDS": False}, plain | {"ADDS": True}
        given = forward | weight | {"eps": "fp32"}
        yield Build(f"norm {name}", rows, given, alone, warps)
        given |= {"added": one, "summed": one}
        yield Build(f"add and norm {name}", rows, given, adds, warps)
        yield Build(f"norm again {name}", again, forward | weight, plain, warps)
        given = backward | weight | {"residual": one}
        yield Build(f"norm backward and add {name}", back, given, adds, warps)


def rotating(dtype: str) -> Iterator[Build]:
    function = triton_rotary.rotate_heads
    tensors = dict.fromkeys(("q", "k", "cos", "sin", "q_out", "k_out"), f"*{dtype}")
    numbers = [name for name in function.arg_names if name not in tensors and not name.isupper()]
    types = tensors | dict.fromkeys(numbers, "i32")
    queries = {name: kind for name, kind in types.items() if name not in ("k", "k_out")}
    shapes = [(128, 128, False), (128, 128, True), (96, 96, False), (128, 64, False)]
    for d, width, neighbours in shapes:
        half, rest = width // 2, d - width
        block, rest_block = map(triton.next_power_of_2, (half, max(1, rest)))
        values = {
            "HALF": half,
            "REST": rest,
            "NEIGHBOURS": neighbours,
            "BACK": False,
            "KEYS": True,
            "HEADS": min(32, triton_rotary.PAIRS // block),
            "BLOCK": block,
            "REST_BLOCK": rest_block,
        }
        part = f", {width} of it" if rest else ""
        name = f"rotary {'neighbours' if neighbours else 'halves'}, heads of {d}{part}"
        warps = triton_rotary.WARPS
        yield Build(name, function, types, values, warps, False)
        if d == width == 128:
            yield Build(f"{name}, back", function, types, values | {"BACK": True}, warps, False)
        if d == 96:
            alone = values | {"KEYS": False}
            yield Build(f"{name}, queries alone", function, queries, alone, warps, False)


def gating(dtype: str) -> Iterator[Build]:
    one = f"*{dtype}"
    sizes = {"f": "i32", "gate_row": "i32", "up_row": "i32"}
    for gelu in (False, True):
        values = {"GELU": gelu, "BLOCK": triton_swiglu.BLOCK}
        forward = dict.fromkeys(("gate", "up", "out"), one) | sizes
        backward = dict.fromkeys(("grad", "gate", "up", "grad_gate", "grad_up"), one) | sizes
        name = "GeGLU" if gelu else "SwiGLU"
        yield Build(name, triton_swiglu.gate_rows, forward, values, triton_swiglu.WARPS)
        backward |= {"out_row": "i32"}
        function = triton_swiglu.gate_backward
        yield Build(f"{name} backward", function, backward, values, triton_swiglu.WARPS)


def compiled(build: Build, architecture: int) -> Compiled:
    """Compile one case for compute capability `architecture` / 10."""
    names = build.function.arg_names
    # What is neither given nor a constant is none, as the launcher has it.
    signature = {name: build.types.get(name, "constexpr") for name in names}
    constants = {
        (place,): build.values.get(name)
        for place, name in enumerate(names)
        if name not in build.types
    }
    hints = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if build.types.get(name, "fp32") != "fp32" and name not in UNHINTED
    }
    source = ASTSource(build.function, signature, constants, hints)
    options = {"num_warps": build.warps, "enable_fp_fusion": build.fusion}
    kernel = triton.compile(source, GPUTarget("cuda", architecture, 32), options)
    said = ["--regAllocOptLevel=2", *([] if build.fusion else ["--fmad=false"])]  # as Triton does
    return _read(kernel.asm["ptx"], kernel.metadata.shared, architecture, said)


def _read(ptx: str, shared: int, architecture: int, options: Sequence[str]) -> Compiled:
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        program = get_ptxas(architecture).path
        command = [program, "-v", f"--gpu-name={target[1]}", file.name, "-o", "/dev/null"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.findall(r"(\d+) bytes spill", said)
    assert registers is not None
    assert len(spilled) == 2
    moved: dict[str, int] = {}
    for one in re.findall(r"\b((?:ld|st)\.global[.\w]*)", ptx):
        moved[one] = moved.get(one, 0) + 1
    return Compiled(
        int(registers[1]),
        sum(map(int, spilled)),
        shared,
        max((_width(one) for one in moved if one.startswith("ld")), default=0),
        max((_width(one) for one in moved if one.startswith("st")), default=0),
        ", ".join(f"{times} {one}" for one, times in moved.items()),
    )


def _width(instruction: str) -> int:
    """The bytes that a load or a store moves a thread."""
    bits = re.search(r"\.[bfus](\d+)$", instruction)
    times = re.search(r"\.v(\d)", instruction)
    assert bits is not None
    return int(bits[1]) // 8 * (int(times[1]) if times else 1)


def table(rows: list[dict[str, Any]]) -> str:
    """Of each kernel in 16 bits (bf16, of sm_75 fp16): what it takes on each architecture."""
    architectures = sorted({row["architecture"] for row in rows})
    heads = " | ".join(f"sm_{one}" for one in architectures)
    lines = [
        f"| kernel | {heads} | shared bytes | spilled bytes | load, store |",
        f"|---|{'---:|' * len(architectures)}---:|---:|---:|",
    ]
    chosen = [
        row for row in rows if row["dtype"] == ("bf16" if row["architecture"] > 75 else "fp16")
    ]
    for name in dict.fromkeys(row["kernel"] for row in chosen):
        ours = {row["architecture"]: row for row in chosen if row["kernel"] == name}
        widths = sorted({(row["widest_load"], row["widest_store"]) for row in ours.values()})
        cells = [
            name,
            *(str(ours[one]["registers"]) for one in architectures),
            str(max(row["shared_bytes"] for row in ours.values())),
            str(max(row["spilled_bytes"] for row in ours.values())),
            "; ".join(f"{load}, {store}" for load, store in widths),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table(rows: list[dict[str, Any]]) -> None:
    """Put the table into benchmarks/README.md."""
    between = re.compile(r"(<!-- kernels -->\n).*?(<!-- /kernels -->)", re.S)
    text = PAGE.read_text()
    PAGE.write_text(between.sub(lambda marks: f"{marks[1]}{table(rows)}{marks[2]}", text))


def main() -> None:
    """Compile everything and write."""
    parser = record.make_parser(__doc__, "kernels")
    parser.add_argument("--architecture", type=int, nargs="*", default=ARCHITECTURES)
    given = parser.parse_args()
    rows = []
    for architecture in given.architecture:
        for dtype in DTYPES:
            if dtype == "bf16" and architecture < 80:
                continue  # these cards have none
            for build in builds(dtype):
                found = compiled(build, architecture)
                rows.append(
                    {
                        "kernel": build.name,
                        "architecture": architecture,
                        "dtype": dtype,
                        "warps": build.warps,
                        **asdict(found),
                    }
                )
        print(f"sm_{architecture}: {sum(r['architecture'] == architecture for r in rows)} kernels")
    spilling = [row for row in rows if row["spilled_bytes"]]
    print(f"{len(rows)} kernels, {len(spilling)} spill")
    print(record.write_result(given, {"triton": triton.__version__, "kernels": rows}))
    if given.results == record.RESULTS:
        write_table(rows)


if __name__ == "__main__":
    main()
