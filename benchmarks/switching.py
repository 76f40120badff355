"""What adapters cost beside one base: microseconds a switch, milliseconds a token, bytes; and PEFT.

Switches: `bank.use` and PEFT's `set_adapter` among 64 adapters, on a Llama with as many linears as
a 7B has (32 layers) and a small hidden size, for a switch multiplies nothing: query and value are
64 linears, all of them 224. The figure is of the longest run of switches in a row.

Tokens: a Llama of 160 M with random weights in 4 bits, adapters of r 16 on all linears, 8 rows:
prompts of 64 tokens, and steps of one token a row. Ours are the base alone, one adapter for all
rows, that adapter merged, and 8 adapters, one a row; PEFT's one for all and `adapter_names`, on
transformers' and bitsandbytes' base in 4 bits in evaluation mode. As its users have it, adapters
are cast to fp32, and on CPUs with AVX512-BF16 bitsandbytes lays weights out again for a kernel in
bf16, which ours reads in steps too; of a prompt's logits the last are asked for as `generate` does
it, by a slice for which torch copies the head's weight. PEFT without its defaults does none of the
three. All sides take turns in one process; ratios are medians of the rounds.

    python benchmarks/switching.py
    python benchmarks/switching.py --rounds 1 --layers 2 --adapters 4 --counts 1 10
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from record import make_parser, write_result


def main() -> None:
    parser = make_parser(__doc__, "switching")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 64])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--peft_counts", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--layers", type=int, default=12, help="of the shape of 160 M")
    parser.add_argument("--only", choices=("switches", "tokens"))
    given = parser.parse_args()
    # Here: `--help` answers without them.
    from switching_parts import picture, switches, tokens

    result: dict[str, Any] = {"most_adapters": max(given.adapters)}
    with tempfile.TemporaryDirectory() as scratch:
        if given.only != "switches":
            result["tokens"] = tokens.measure(Path(scratch), given.rounds, given.layers)
            print(json.dumps(result["tokens"], indent=1), flush=True)
        if given.only != "tokens":
            result["switches"] = switches.measure(
                Path(scratch), given.adapters, given.counts, given.peft_counts
            )
    path = write_result(given, result)
    if given.only is None:
        picture.draw(path.with_suffix(".png"), result)
    print(path)


if __name__ == "__main__":
    main()
