"""
A model of CUDA's caching allocator (c10/cuda/CUDACachingAllocator.cpp of torch 2.13): what it takes from the card for
a sequence of allocations. Sizes are rounded to 512 bytes; up to 1 MiB comes from segments of 2 MiB, up to 10 MiB from
segments of 20 MiB, larger from segments of their own in steps of 2 MiB; the best fitting free block is taken and split,
neighbours that are free are merged. Segments go back to the card only where the next allocation would not fit.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

ROUND, SMALL, SMALL_SEGMENT = 512, 2**20, 2 * 2**20
LARGE_SEGMENT, LARGE_FROM, STEP = 20 * 2**20, 10 * 2**20, 2 * 2**20


@dataclass
class Block:
    """A stretch of a segment, between its neighbours."""

    size: int
    pool: str
    free: bool = True
    before: int | None = None
    after: int | None = None


class CachingAllocator:
    """malloc and free by any hashable key. `reserved` is what it holds of the card; with `expandable` segments grow at
    their end (PYTORCH_ALLOC_CONF=expandable_segments:True), so that little is lost to blocks that do not fit."""

    def __init__(self, expandable: bool = False):
        self.expandable = expandable
        self.blocks: dict[int, Block] = {}
        self.free_blocks: dict[str, list[tuple[int, int]]] = {"small": [], "large": []}  # (size, address), sorted
        self.tails: dict[str, int] = {}  # of expandable segments: the address of the last block
        self.address: dict[object, int] = {}
        self.next_segment = 0
        self.reserved = self.peak_reserved = 0

    def malloc(self, key: object, size: int) -> None:
        size = max(ROUND, -(-size // ROUND) * ROUND)
        pool = "small" if size <= SMALL else "large"
        found = bisect_left(self.free_blocks[pool], (size, -1))
        if found < len(self.free_blocks[pool]):
            _, at = self.free_blocks[pool].pop(found)
        else:
            at = self._grow(pool, size) if self.expandable else self._new_segment(pool, size)
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._split(at, size)
        self.blocks[at].free = False
        self.address[key] = at

    def _new_segment(self, pool: str, size: int) -> int:
        taken = SMALL_SEGMENT if pool == "small" else LARGE_SEGMENT if size < LARGE_FROM else -(-size // STEP) * STEP
        at = self.next_segment
        self.next_segment += taken + 2**40  # far apart: segments never merge
        self.blocks[at] = Block(taken, pool)
        self.reserved += taken
        return at

    def _grow(self, pool: str, size: int) -> int:
        """Expandable: the free end of the pool's only segment is lengthened, or a new end put behind it."""
        tail = self.tails.get(pool)
        at = tail if tail is not None and self.blocks[tail].free else None
        if at is not None:
            self._take_from_free(at)
            more = -(-(size - self.blocks[at].size) // STEP) * STEP
            self.blocks[at].size += more
        else:
            more = -(-size // STEP) * STEP
            at = {"small": 0, "large": 2**60}[pool] if tail is None else tail + self.blocks[tail].size
            self.blocks[at] = Block(more, pool, before=tail)
            if tail is not None:
                self.blocks[tail].after = at
            self.tails[pool] = at
        self.reserved += more
        return at

    def _split(self, at: int, size: int) -> None:
        block = self.blocks[at]
        rest = block.size - size
        if rest < ROUND or (block.pool == "large" and not self.expandable and rest <= SMALL):
            return
        behind = at + size
        self.blocks[behind] = Block(rest, block.pool, before=at, after=block.after)
        if block.after is not None:
            self.blocks[block.after].before = behind
        block.size, block.after = size, behind
        insort(self.free_blocks[block.pool], (rest, behind))
        if self.tails.get(block.pool) == at:
            self.tails[block.pool] = behind

    def free(self, key: object) -> None:
        at = self.address.pop(key)
        block = self.blocks[at]
        if block.before is not None and self.blocks[block.before].free:
            self._take_from_free(block.before)
            at = self._merge(block.before, at)
        behind = self.blocks[at].after
        if behind is not None and self.blocks[behind].free:
            self._take_from_free(behind)
            self._merge(at, behind)
        block = self.blocks[at]
        block.free = True
        insort(self.free_blocks[block.pool], (block.size, at))

    def _take_from_free(self, at: int) -> None:
        free = self.free_blocks[self.blocks[at].pool]
        free.pop(bisect_left(free, (self.blocks[at].size, at)))

    def _merge(self, first: int, second: int) -> int:
        left, right = self.blocks[first], self.blocks.pop(second)
        left.size, left.after = left.size + right.size, right.after
        if right.after is not None:
            self.blocks[right.after].before = first
        if self.tails.get(left.pool) == second:
            self.tails[left.pool] = first
        return first


def peak_reserved(changes: Iterable[tuple[object, int]], expandable: bool = False) -> int:
    """Bytes that the allocator holds at most over (key, +bytes or -bytes)."""
    allocator = CachingAllocator(expandable)
    for key, change in changes:
        if change > 0:
            allocator.malloc(key, change)
        else:
            allocator.free(key)
    return allocator.peak_reserved
