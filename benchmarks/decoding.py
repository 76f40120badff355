"""Decoding on the CPU: packed weights, rows together and one by one, rows that end, text.

    python benchmarks/decoding.py

- Linears of a 160 M and a 1.1 B Llama in NF4 for few tokens in bf16: the kernel that reads packed
  weights beside the product by the decoded weight, timed in turn, and how far each is from fp32.
- A random Llama of 160 M: a step with those copies and without; tokens/s of 1 row and of several.
- Requests of many lengths, a place filled as soon as it is free, against batches that go on until
  their last row has ended.
- The text of a token after so many others, and by decoding all of them again.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plan_grid import SHAPE
from random_checkpoint import make_base_files
from record import make_parser, write_result

from qlora_kit.base.linear import base_matmul, quantize_linear
from qlora_kit.base.load import load_base
from qlora_kit.base.packed_matmul import Copies, copying_into
from qlora_kit.base.quantize import Quantization
from qlora_kit.generation.decode import answer_requests
from qlora_kit.generation.engine import Engine
from qlora_kit.generation.request import Request
from qlora_kit.generation.text import AnswerText

LINEARS = ((768, 768), (2048, 768), (768, 2048), (2048, 5632), (5632, 2048))
"""Outputs and inputs."""
TOKENS, ROWS = (1, 2, 4, 8, 16, 64), (1, 4, 16)
NF4 = Quantization(4, "nf4", True)
PROMPT, STEPS = 16, 32
PLACES = 8


def main() -> None:
    """Measure all parts, print and write."""
    parser = make_parser(__doc__, "decoding")
    parser.add_argument("--config", type=Path, help="another shape than that of 160 M")
    parser.add_argument("--rounds", type=int, default=9, help="of each comparison (%(default)s)")
    parser.add_argument("--requests", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--longest", type=int, default=128, help="answer in tokens (%(default)s)")
    asked = parser.parse_args()
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    with torch.no_grad():
        found["linears"] = [linear(shape, asked.rounds) for shape in LINEARS]
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(os.environ["QLORA_KIT_DATA"]) / "models/stories260K"
        directory = make_base_files(asked.config or SHAPE, Path(temporary) / "base", tokenizer)
        base = load_base(str(directory), bits=4, dtype="bf16", device="cpu")
    found["steps"] = [steps(base.model, rows, asked.rounds) for rows in ROWS]
    found["requests"] = requests(base, asked)
    found["text"] = text(base.tokenizer, asked.rounds)
    print(write_result(asked, found))


def in_turn(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Median seconds of both, and the ratio of the other's to the one's: of pairs, one by one."""
    pairs = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        one()
        between = time.perf_counter()
        other()
        pairs.append((between - began, time.perf_counter() - between))
    pairs = pairs[1:]
    ratios = sorted(second / first for first, second in pairs)
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    between = [ratios[0], ratios[-1]]
    return {"seconds": medians, "ratio": statistics.median(ratios), "between": between}


def linear(shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """The kernel of packed weights and the product by the decoded weight, for few tokens."""
    generator = torch.Generator().manual_seed(0)
    layer = quantize_linear(torch.randn(shape, generator=generator).bfloat16() / 50, None, NF4)
    exact, copies, rows = layer.dequantize(torch.float64), Copies(), []
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], generator=generator).bfloat16()
        times = max(1, 2**24 // (shape[0] * shape[1]))

        def decoded(x: torch.Tensor = x, times: int = times) -> torch.Tensor:
            for _ in range(times):
                y = base_matmul(layer, x)
            return y

        def packed(decoded: Callable[[], torch.Tensor] = decoded) -> torch.Tensor:
            with copying_into(copies):
                return decoded()

        expected = x.double() @ exact.t()
        errors = [float((one() - expected).norm() / expected.norm()) for one in (packed, decoded)]
        timed = in_turn(packed, decoded, rounds)
        rows.append({"tokens": tokens, "errors": errors, **timed})
        print(
            f"{shape[0]} x {shape[1]}, {tokens:>2} tokens: decoded {timed['ratio']:.2f} times the "
            f"packed one's time; errors {errors[0]:.1e} packed, {errors[1]:.1e} decoded",
            flush=True,
        )
    return {"shape": shape, "copied": bool(copies), "rows": rows}


def steps(model: Any, rows: int, rounds: int) -> dict[str, Any]:
    """Steps of so many rows with copies of the packed weights, and with none."""
    engines = [Engine(model, pad_id=0) for _ in range(2)]
    engines[1]._copies = None
    for engine in engines:
        for row in range(rows):
            engine.add(Request([5 + row] * PROMPT, (rounds + 2) * STEPS))
        engine.step()

    def run(engine: Engine) -> Callable[[], None]:
        return lambda: [engine.step() for _ in range(STEPS)] and None

    timed = in_turn(run(engines[0]), run(engines[1]), rounds)
    rate = rows * STEPS / timed["seconds"][0]
    print(f"{rows:>2} rows: {rate:.1f} tokens/s, {timed['ratio']:.2f} times without copies")
    return {"rows": rows, "tokens_per_s": rate, **timed}


def requests(base: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """Answers of 1 to `longest` tokens, in places that are filled at once or with all others."""
    drawn = random.Random(0)
    every = [
        Request(
            [drawn.randrange(3, 500) for _ in range(drawn.randrange(4, 64))],
            drawn.randrange(1, asked.longest + 1),
        )
        for _ in range(asked.requests)
    ]

    def together(some: list[Request]) -> Any:
        return list(answer_requests(base.model, base.tokenizer, some, batch_size=PLACES))

    timed = in_turn(
        lambda: together(every),
        lambda: [together(every[at : at + PLACES]) for at in range(0, len(every), PLACES)],
        max(2, asked.rounds // 3),
    )
    tokens = sum(one.max_new_tokens for one in every)
    rate = tokens / timed["seconds"][0]
    print(
        f"{len(every)} requests in {PLACES} places: {rate:.1f} tokens/s; batch by batch takes "
        f"{timed['ratio']:.2f} times as long"
    )
    return {"requests": len(every), "places": PLACES, "tokens_per_s": rate, **timed}


def text(tokenizer: Any, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a token's text after so many others, and those of decoding all of them."""
    ids = tokenizer.encode("One day, a girl named Lily found a big red ball. " * 400)
    table = []
    for seen in (100, 1000, 4000):
        pushed = AnswerText(tokenizer, after=ids[:seen])

        def push(pushed: AnswerText = pushed, seen: int = seen) -> None:
            for token in ids[seen : seen + 64]:
                pushed.push(token)

        def whole(seen: int = seen) -> None:
            for _ in range(64):
                tokenizer.decode(ids[:seen])

        timed = in_turn(push, whole, rounds)
        each = [seconds / 64 for seconds in timed["seconds"]]
        print(f"after {seen} tokens: {1e6 * each[0]:.0f} us a token, all of it {1e6 * each[1]:.0f}")
        table.append({"tokens": seen, **timed, "seconds": each})
    return table


if __name__ == "__main__":
    main()
