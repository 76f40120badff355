"""The Triton kernels compiled for seven architectures: registers, spills, shared memory, widths.

    python benchmarks/kernels.py

It needs no card: Triton compiles to PTX and its own ptxas to machine code, ahead of time, with the
hints that the launcher gives for pointers of 16-byte alignment and sizes that 16 divides. Widths
are the bytes that one thread's widest load and store move at once, read off the PTX. Writes
results/kernels.json.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import record
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora_kit.kernels import triton_dequantize, triton_rmsnorm, triton_rotary, triton_swiglu

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
DTYPES = ("fp16", "bf16", "fp32")
WIDTHS = (128, 4096, 16384)
"""Of rows that are normalized: a head, an 8B model, the widest."""
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
    instructions: dict[str, int] = field(default_factory=dict)


def builds(dtype: str) -> Iterator[Build]:
    """All cases in a dtype."""
    yield from dequantizing(dtype)
    for width in WIDTHS:
        yield from normalizing(dtype, width)
    yield from rotating(dtype)
    yield from gating(dtype)


def small_set(dtype: str) -> list[Build]:
    """Each kernel in one case."""
    chosen = {}
    for build in (*dequantizing(dtype), *normalizing(dtype, 4096), *rotating(dtype)):
        chosen.setdefault(build.function.__name__, build)
    for build in gating(dtype):
        chosen.setdefault(build.function.__name__, build)
    return list(chosen.values())


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
    one, sizes_types = f"*{dtype}", {"rows": "i32", "n": "i32"}
    forward = dict.fromkeys(("x", "weight", "y"), one) | {"scales": "*fp32"} | sizes_types
    backward = dict.fromkeys(("grad", "x", "weight", "out"), one)
    backward |= {"scales": "*fp32"} | sizes_types
    for style in (1, 3) if width == 4096 else (1,):
        values = {"STYLE": style, "ADDS": False, **sizes}
        name = f"{'Llama' if style == 1 else 'Gemma'} {width}"
        given = forward | {"eps": "fp32"}
        rows, back = triton_rmsnorm.normalize_rows, triton_rmsnorm.normalize_backward
        if style == 1:
            yield Build(f"norm {name}", rows, given, values, warps)
        added = given | {"added": one, "summed": one}
        yield Build(f"add and norm {name}", rows, added, values | {"ADDS": True}, warps)
        again = {key: values[key] for key in ("STYLE", "ROWS", "BLOCK")}
        if style == 1:
            function = triton_rmsnorm.normalize_again
            yield Build(f"norm again {name}", function, forward, again, warps)
        added = backward | {"residual": one}
        yield Build(f"norm backward, added {name}", back, added, values | {"ADDS": True}, warps)


def rotating(dtype: str) -> Iterator[Build]:
    tensors = dict.fromkeys(("q", "k", "cos", "sin", "q_out", "k_out"), f"*{dtype}")
    numbers = {
        name: "i32"
        for name in triton_rotary.rotate_heads.arg_names
        if name not in tensors and not name.isupper()
    }
    for d, width in ((128, 128), (96, 96), (128, 64)):
        for neighbours in (False, True)[: 2 if d == width == 128 else 1]:
            half, rest = width // 2, d - width
            block = triton.next_power_of_2(half)
            values = {
                "HALF": half,
                "REST": rest,
                "NEIGHBOURS": neighbours,
                "BACK": False,
                "KEYS": True,
                "HEADS": min(32, triton_rotary.PAIRS // block),
                "BLOCK": block,
                "REST_BLOCK": triton.next_power_of_2(max(1, rest)),
            }
            part = f", {width} of it" if rest else ""
            kind = "neighbours" if neighbours else "halves"
            name = f"rotary {kind}, heads of {d}{part}"
            types = tensors | numbers
            yield Build(name, triton_rotary.rotate_heads, types, values, triton_rotary.WARPS, False)


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
    return _read(kernel.asm["ptx"], kernel.metadata.shared, architecture)


def _read(ptx: str, shared: int, architecture: int) -> Compiled:
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    program = "ptxas-blackwell" if architecture >= 100 else "ptxas"
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [folder / program, "-v", f"--gpu-name={target[1]}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
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
        moved,
    )


def _width(instruction: str) -> int:
    """The bytes that a load or a store moves a thread."""
    bits = re.search(r"\.[bfus](\d+)$", instruction)
    times = re.search(r"\.v(\d)", instruction)
    assert bits is not None
    return int(bits[1]) // 8 * (int(times[1]) if times else 1)


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


if __name__ == "__main__":
    main()
