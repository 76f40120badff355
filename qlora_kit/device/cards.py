"""What cards can do: memory, compute capability, peaks, bandwidths, the cost of a launch.

`flops` is the dense peak of the tensor units in 16 bits with sums in fp32, which is how torch
multiplies bf16 and fp16. On GeForce cards that is half of what they reach with sums in fp16 (from
Turing on), and a quarter of the figures that are printed with sparsity; professional cards do not
halve it. `flops_fp32` is what matmuls in fp32 get, for torch leaves TF32 off. Both are those of the
maker's tables, at the boost clock of the reference card: NVIDIA's architecture white papers of
Turing, Ampere GA102, Ada and RTX Blackwell for GeForce, its data sheets for the others. Other
clocks, power limits and laptops differ, and laptops are left out: one name is sold with power
limits that are a factor of two apart.

`reached` is the share of `flops` that large matmuls get. A Hopper card is held back by its power:
an H200 gave 788 TFLOP/s of 989, and 4.3 TB/s of 4.8, which is the share of bandwidth that is taken
for all cards. GeForce cards run their halved units near the peak; 1 is an assumption. Copies to and
from the host get `LINK_REACHED` of what the card's lanes of PCI Express carry; a board with an
older generation, or fewer of them, gives less.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from qlora_kit.errors import ConfigError

BANDWIDTH_REACHED = 4.3 / 4.8
"""Measured on an H200; taken for all cards."""
LAUNCH_S = 5e-6
"""Of the host for a kernel that PyTorch launches one by one: 10,000 of them take 35 to 50 ms."""
LANE_BYTES_S = {3: 8e9 / 8 * 128 / 130, 4: 16e9 / 8 * 128 / 130, 5: 32e9 / 8 * 128 / 130}
"""Of a lane of PCI Express by generation, one way: 8, 16 and 32 GT/s, of 130 bits 128 are data."""
LINK_REACHED = 0.8
"""Of the lanes, by large copies from pinned memory; a common figure, measured on none of these."""
HOPPER = 788 / 989
LOW_POWER = 0.5
"""Of cards that are held at 70 W; an assumption."""


@dataclass(frozen=True)
class Card:
    """A card as it is sold: rates in FLOP/s and bytes/s, `launch_s` in seconds.

    `memory_mib` is what the driver shows of it, which ECC takes a sixteenth of on some; `lanes` are
    those of its link to the host: generation of PCI Express, and number.
    """

    name: str
    memory_mib: int
    capability: tuple[int, int]
    flops: float
    flops_fp32: float
    bandwidth: float
    source: str
    reached: float = 1.0
    lanes: tuple[int, int] = (4, 16)
    launch_s: float = LAUNCH_S

    @property
    def memory_bytes(self) -> int:
        """All of its memory; a desktop takes some of it."""
        return self.memory_mib * 1024**2

    @property
    def matmul_rate(self) -> float:
        """FLOP/s of large matmuls in 16 bits."""
        return self.flops * self.reached

    @property
    def memory_rate(self) -> float:
        """Bytes a second that kernels read and write."""
        return self.bandwidth * BANDWIDTH_REACHED

    @property
    def link_rate(self) -> float:
        """Bytes a second that are copied between the host and the card, one way."""
        generation, count = self.lanes
        return LANE_BYTES_S[generation] * count * LINK_REACHED

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bf16; else it is fp16 that runs there."""
        return self.capability >= (8, 0)


TURING = "NVIDIA Turing GPU architecture white paper, appendix"
AMPERE = "NVIDIA Ampere GA102 GPU architecture white paper, appendix"
ADA = "NVIDIA Ada GPU architecture white paper, appendix"
BLACKWELL = "NVIDIA RTX Blackwell GPU architecture white paper, appendix"
SHEET = "NVIDIA data sheet of the card"
GEN3, GEN5 = (3, 16), (5, 16)


def _card(
    name: str,
    memory_mib: int,
    capability: tuple[int, int],
    teraflops: tuple[float, float],
    gigabytes_s: float,
    source: str,
    reached: float = 1.0,
    lanes: tuple[int, int] = (4, 16),
) -> Card:
    flops, flops_fp32 = (rate * 1e12 for rate in teraflops)
    rates = flops, flops_fp32, gigabytes_s * 1e9
    return Card(name, memory_mib, capability, *rates, source, reached, lanes)


CARDS = {
    card.name: card
    for card in (
        _card("rtx2060", 6144, (7, 5), (25.8, 6.5), 336, TURING, lanes=GEN3),
        _card("rtx2070", 8192, (7, 5), (29.9, 7.5), 448, TURING, lanes=GEN3),
        _card("rtx2080ti", 11264, (7, 5), (53.8, 13.4), 616, TURING, lanes=GEN3),
        _card("t4", 15360, (7, 5), (65, 8.1), 320, SHEET, LOW_POWER, GEN3),
        _card("rtx3060", 12288, (8, 6), (25.5, 12.7), 360, "twice its fp32 peak, as in " + AMPERE),
        _card("rtx3070", 8192, (8, 6), (40.6, 20.3), 448, AMPERE),
        _card("rtx3080", 10240, (8, 6), (59.5, 29.8), 760, AMPERE),
        _card("rtx3090", 24576, (8, 6), (71, 35.6), 936, AMPERE),
        _card("rtx4060ti-16gb", 16380, (8, 9), (44.1, 22.1), 288, ADA, lanes=(4, 8)),
        _card(
            "rtx4070tisuper", 16376, (8, 9), (88.2, 44.1), 672, "twice its fp32 peak, as in " + ADA
        ),
        _card("rtx4080", 16376, (8, 9), (97.5, 48.7), 717, ADA),
        _card("rtx4090", 24564, (8, 9), (165.2, 82.6), 1008, ADA),
        _card("rtx5080", 16303, (12, 0), (112.6, 56.3), 960, BLACKWELL, lanes=GEN5),
        _card("rtx5090", 32607, (12, 0), (209.5, 104.8), 1792, BLACKWELL, lanes=GEN5),
        _card("a10", 23028, (8, 6), (125, 31.2), 600, SHEET),
        _card("l4", 23034, (8, 9), (121, 30.3), 300, SHEET, LOW_POWER),
        _card("l40s", 46068, (8, 9), (362, 91.6), 864, SHEET),
        _card("a100-40gb", 40960, (8, 0), (312, 19.5), 1555, SHEET),
        _card("a100-80gb", 81920, (8, 0), (312, 19.5), 1935, SHEET),
        _card("h100-sxm", 81559, (9, 0), (989, 67), 3350, SHEET, HOPPER, GEN5),
        _card("h100-pcie", 81559, (9, 0), (756, 51), 2000, SHEET, HOPPER, GEN5),
        _card("h200", 143771, (9, 0), (989, 67), 4800, SHEET, HOPPER, GEN5),
    )
}
"""By name, as `--card` takes it."""

DEFAULTS = {"h100": "h100-sxm", "a100": "a100-80gb", "rtx4060ti": "rtx4060ti-16gb"}
"""What a name without its variant means."""


VARIANT = r"(\d+gb|pcie|sxm\d?|hbm\d\w?)*"
"""What a driver may say behind the name; `Laptop GPU` and `Ti` are other cards."""
NEAR = 0.15
"""By which share memory may differ from the table's."""


def find_card(name: str) -> Card:
    """A card by its name, in any spelling: `RTX 4090`, `rtx-4090` and `4090` are one.

    Errors: `ConfigError` that names the closest one.
    """
    known = {_plain(one): card for one, card in CARDS.items()}
    known |= {short: CARDS[one] for short, one in DEFAULTS.items()}
    asked = _plain(name)
    for spelt in (asked, f"rtx{asked}"):
        if spelt in known:
            return known[spelt]
    close = difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
    guess = f", did you mean {known[close[0]].name}?" if close else ""
    raise ConfigError(
        f"card {name}: not in the table{guess}",
        f"name one of {', '.join(CARDS)}; or give --device_memory alone",
    )


def card_named(device_name: str, memory_bytes: int) -> Card | None:
    """The card that a driver calls so, such as `NVIDIA GeForce RTX 4090`; None where none is.

    Variants of one name differ in memory, or say what they are plugged into.
    """
    words = _plain(device_name)
    fitting = [
        card
        for card in CARDS.values()
        if re.fullmatch(_plain(card.name.partition("-")[0]) + VARIANT, words)
        and abs(card.memory_bytes - memory_bytes) < NEAR * card.memory_bytes
    ]
    if len(fitting) > 1:
        fitting = [card for card in fitting if ("pcie" in words) == ("pcie" in card.name)]
    return fitting[0] if fitting else None


def _plain(name: str) -> str:
    """Letters and digits alone, without the maker and the brand."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
