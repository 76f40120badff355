"""What a process takes on a device outside its tensors, by kind of device, with its source.

`benchmarks/device_overhead.py` measures a row of this table where there is a GPU. On the CPU a
plan counts tensors: what the process takes beside them (imports, pages of files) is the host's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Overhead:
    """Bytes outside tensors: `fixed` (context, libraries, workspaces), and `share` of the peak.

    Where a run is planned for a card, a share `margin` of its memory is left free.
    """

    fixed: int
    share: float
    margin: float
    source: str

    def of(self, peak_bytes: int) -> int:
        """The bytes beside tensors whose peak is `peak_bytes`."""
        return self.fixed + int(self.share * peak_bytes)

    def room(self, budget_bytes: int) -> int:
        """The most bytes of tensors that fit into a budget together with the rest."""
        return int((budget_bytes - self.fixed) / (1 + self.share))


OVERHEADS = {
    "cpu": Overhead(0, 0.0, 0.0, "tensors are counted; the process itself is not part of the plan"),
    "cuda": Overhead(
        450_000_000,
        0.0,
        0.02,  # holes between blocks of the caching allocator; a guess until it is measured
        "context and libraries, a common figure for cards of the last years, not measured here; "
        "benchmarks/device_overhead.py measures yours",
    ),
}
