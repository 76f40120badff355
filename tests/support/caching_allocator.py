"""Torch's caching allocator of CUDA, as far as sizes and addresses go: what it reserves for a run.

Its rules and constants are those of torch 2.13, c10/core/AllocatorConfig.h and
c10/cuda/CUDACachingAllocator.cpp, for one stream and default settings or expandable segments:

  - A size is rounded up to 512 bytes. Up to 1 MiB it is of the small pool, else of the large.
  - The smallest free block of its pool that holds it is taken, the lowest address first. What is
    over is split off: from 512 bytes on in the small pool and in expandable segments, above 1 MiB
    in the large pool.
  - Where no block does, a segment is taken of the device: 2 MiB for small sizes, 20 MiB for sizes
    below 10 MiB, else the size rounded up to 2 MiB. An expandable segment, one for each pool, is
    made longer instead, by pages of 2 or of 20 MiB.
  - A block that is freed is merged with free neighbours of its segment.
  - Where the device has no more, segments (of expandable ones: pages) that are free as a whole are
    given back, and it is tried once more.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

ROUND = 512
SMALL = 2**20
SMALL_SEGMENT, LARGE_SEGMENT = 2 * 2**20, 20 * 2**20
LARGE_FROM, ROUND_LARGE = 10 * 2**20, 2 * 2**20
ENDLESS = 2**50


class FullError(Exception):
    """The device has no more; `reserved` of it are taken, and `asked` were asked for."""

    def __init__(self, asked: int, reserved: int) -> None:
        super().__init__(f"{asked} bytes asked for, {reserved} reserved")


@dataclass(eq=False)
class Block:
    """A stretch of a segment, with its neighbours; `pool` is `small` or `large`."""

    address: int
    size: int
    pool: str
    is_mapped: bool = True
    is_taken: bool = False
    before: Block | None = None
    after: Block | None = None


class CachingAllocator:
    """Hands out blocks of a device that has `capacity` bytes for it; `reserved` are taken of it."""

    def __init__(self, capacity: int = ENDLESS, *, expandable: bool = False) -> None:
        self.capacity, self.expandable = capacity, expandable
        self.reserved = self.allocated = self.peak_reserved = self.peak_allocated = 0
        self._free: dict[str, list[tuple[int, int]]] = {"small": [], "large": []}
        self._blocks: dict[int, Block] = {}
        """Free mapped blocks by address."""
        self._next_address = 0
        self._tail = {}
        if expandable:
            for pool in self._free:
                self._tail[pool] = Block(self._next_address, ENDLESS, pool, is_mapped=False)
                self._next_address += ENDLESS
        self._unmapped = {pool: [tail] for pool, tail in self._tail.items()}

    def malloc(self, size: int) -> Block:
        """A block of at least `size` bytes. Errors: `FullError`."""
        size = max(ROUND, -(-size // ROUND) * ROUND)
        pool = "small" if size <= SMALL else "large"
        block = self._best_fit(pool, size) or self._more(pool, size)
        if block is None:
            self._give_back()
            block = self._more(pool, size)
        if block is None:
            raise FullError(size, self.reserved)
        self._split(block, size)
        block.is_taken = True
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def free(self, block: Block) -> None:
        """Take a block back."""
        block.is_taken = False
        self.allocated -= block.size
        self._merge_and_keep(block)

    def _best_fit(self, pool: str, size: int) -> Block | None:
        free = self._free[pool]
        at = bisect.bisect_left(free, (size, -1))
        if at == len(free):
            return None
        if self.expandable:
            # A block at the end of a segment counts with all that it may become.
            while at + 1 < len(free) and self._reach(free[at + 1]) < self._reach(free[at]):
                at += 1
        block = self._blocks[free[at][1]]
        self._leave(block)
        return block

    def _reach(self, entry: tuple[int, int]) -> int:
        after = self._blocks[entry[1]].after
        return entry[0] + (after.size if after is not None and not after.is_mapped else 0)

    def _more(self, pool: str, size: int) -> Block | None:
        """A block out of new memory of the device; None where it has not so much."""
        if self.expandable:
            return self._longer(pool, size)
        if size <= SMALL:
            segment = SMALL_SEGMENT
        elif size < LARGE_FROM:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.reserved + segment > self.capacity:
            return None
        self.reserved += segment
        block = Block(self._next_address, segment, pool)
        self._next_address += segment + ROUND_LARGE  # segments are no neighbours
        return block

    def _longer(self, pool: str, size: int) -> Block | None:
        """The first place of an expandable segment with so much free or unmapped, mapped."""
        for unmapped in self._unmapped[pool]:
            start = unmapped
            if start.before is not None and not start.before.is_taken and start.before.is_mapped:
                start = start.before
            room, one = 0, start
            while room < size and one is not None and not one.is_taken:
                room, one = room + one.size, one.after  # type: ignore[assignment]
            if room >= size:
                break
        block = start if start.is_mapped else self._map(start, min(start.size, size))
        while block is not None and block.size < size:
            assert block.after is not None
            block = self._map(block.after, min(size - block.size, block.after.size))
        if block is not None:
            self._leave(block)
        return block

    def _map(self, block: Block, size: int) -> Block | None:
        """Map the first pages of an unmapped block, and merge them with free neighbours."""
        page = SMALL_SEGMENT if block.pool == "small" else LARGE_SEGMENT
        size = min(block.size, -(-size // page) * page)
        if self.reserved + size > self.capacity:
            return None
        self.reserved += size
        self._unmapped[block.pool].remove(block)
        if block.size > size:
            rest = Block(block.address + size, block.size - size, block.pool, is_mapped=False)
            self._link(block, rest, block.after)
            bisect.insort(self._unmapped[block.pool], rest, key=lambda one: one.address)
            block.size = size
        block.is_mapped = True
        return self._merge_and_keep(block)

    def _split(self, block: Block, size: int) -> None:
        over = block.size - size
        if over >= ROUND if block.pool == "small" or self.expandable else over > SMALL:
            rest = Block(block.address + size, over, block.pool)
            self._link(block, rest, block.after)
            block.size = size
            self._keep(rest)

    def _merge_and_keep(self, block: Block) -> Block:
        for other in (block.before, block.after):
            if other is None or other.is_taken or not other.is_mapped:
                continue
            self._leave(other)
            if other is block.before:
                block.address, block.before = other.address, other.before
                if other.before is not None:
                    other.before.after = block
            else:
                block.after = other.after
                if other.after is not None:
                    other.after.before = block
            block.size += other.size
        self._keep(block)
        return block

    def _give_back(self) -> None:
        """Segments, or pages of expandable ones, that are free as a whole."""
        for block in list(self._blocks.values()):
            if self.expandable:
                self._unmap(block)
            elif block.before is None and block.after is None:
                self._leave(block)
                self.reserved -= block.size

    def _unmap(self, block: Block) -> None:
        page = SMALL_SEGMENT if block.pool == "small" else LARGE_SEGMENT
        start = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if end <= start:
            return
        self._leave(block)
        self.reserved -= end - start
        last = block.address + block.size
        before, after = block.before, block.after
        whole = Block(start, end - start, block.pool, is_mapped=False)
        if after is not None and not after.is_mapped and end == last:
            self._unmapped[block.pool].remove(after)
            whole.size, after = whole.size + after.size, after.after
        if before is not None and not before.is_mapped and start == block.address:
            self._unmapped[block.pool].remove(before)
            whole.address, whole.size = before.address, whole.size + before.size
            before = before.before
        pieces = [whole]
        if start > block.address:
            pieces.insert(0, Block(block.address, start - block.address, block.pool))
        if end < last:
            pieces.append(Block(end, last - end, block.pool))
        for one in pieces:
            self._link(before, one, after)
            before = one
            if one.is_mapped:
                self._keep(one)
        bisect.insort(self._unmapped[block.pool], whole, key=lambda one: one.address)

    def _link(self, before: Block | None, block: Block, after: Block | None) -> None:
        block.before, block.after = before, after
        if before is not None:
            before.after = block
        if after is not None:
            after.before = block

    def _keep(self, block: Block) -> None:
        bisect.insort(self._free[block.pool], (block.size, block.address))
        self._blocks[block.address] = block

    def _leave(self, block: Block) -> None:
        self._free[block.pool].remove((block.size, block.address))
        del self._blocks[block.address]
