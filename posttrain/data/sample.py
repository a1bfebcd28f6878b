"""A look at a source for the dry run: its first blocks, cleaned as in the run, nothing put on disk."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np

from posttrain.config import shown
from posttrain.data.block import Cleaned, Task, cleaned
from posttrain.data.blocks import blocks_of, is_of_trees
from posttrain.data.catalogue import Source
from posttrain.data.files import PACKED_SUFFIXES
from posttrain.data.jsonfiles import Fault
from posttrain.data.mix import Columns, MixedBucketSampler
from posttrain.data.reading import Tally

BLOCK = 1 << 17  # bytes of a piece
SAMPLED = 100  # pieces of a large source
GONE_THROUGH = 1 << 30  # bytes, unpacked, that are read to find where its pieces are


class Sample:
    """What the first pieces of a source show. `share` is the part of its bytes that was read."""

    def __init__(self, source: Source, number: int):
        self.source, self.number, self.share = source, number, 1.0
        self.rows = self.made = self.seen = 0
        self.dropped: Counter = Counter()
        self.tallies: dict[Path, Tally] = {}
        self.columns: list[Columns] = []
        self.record = self.failed = None

    def read(self, task: Task, whole: bool, first_only: bool) -> None:
        """Clean its blocks in this process: all of them; or only the first; or SAMPLED ones spread evenly over its
        files, and where those are too large to be gone through, the first of each of the first files."""
        every = self.source.files
        one = task._replace(sources=[self.source])
        if whole or is_of_trees(self.source, task.kind):
            for block in blocks_of(one.sources, task.kind, BLOCK):
                self.saw(cleaned(block, one))
        elif first_only:
            for block in islice(blocks_of(one.sources, task.kind, BLOCK), 1):
                self.saw(cleaned(block, one))
                self.share = min(1.0, max(block.raw_bytes, 1) / sum(file.stat().st_size for file in every))
        elif sum(file.stat().st_size * (4 if file.suffix in PACKED_SUFFIXES else 1) for file in every) <= GONE_THROUGH:
            count = sum(1 for _ in blocks_of(one.sources, task.kind, BLOCK))
            wanted = {round(n * (count - 1) / (SAMPLED - 1)) for n in range(SAMPLED)}
            for number, block in enumerate(blocks_of(one.sources, task.kind, BLOCK)):
                if number in wanted:
                    self.saw(cleaned(block, one))
            self.share = len(wanted) / count
        else:
            read = 0
            for file in every[:SAMPLED]:
                one = task._replace(sources=[self.source._replace(files=[file])])
                for block in islice(blocks_of(one.sources, task.kind, BLOCK), 1):
                    self.saw(cleaned(block, one))
                    read += block.raw_bytes
            self.share = min(1.0, max(read, 1) / sum(file.stat().st_size for file in every))

    def saw(self, done: Cleaned) -> None:
        for file, tally in done.tallies.items():
            self.tallies.setdefault(file, Tally()).add(tally)
            self.rows += tally.rows
        self.made += len(done.items)
        self.seen += done.read
        self.dropped.update(done.dropped.reasons)
        found, kept = done.found, done.kept
        zeros = np.zeros(len(kept), np.uint64)
        self.columns.append(Columns(np.full(len(kept), self.number, np.uint16), found.languages[kept],
                                    found.chars[kept].astype(np.uint32), found.turns[kept].astype(np.uint16),
                                    zeros, zeros, np.arange(len(kept))))  # fmt: skip
        if self.record is None and done.items:
            first = int(kept[0]) if len(kept) else 0
            item, reason = done.items[first], done.found.reasons[first]
            self.record = (f"{shown(item.file)}:{item.line}", item.raw, item.result, reason and reason[0])
        if self.failed is None and done.dropped.lines:
            entry = json.loads(done.dropped.lines[0])
            self.failed = (f"{entry['file']}:{entry['line']}", Fault(entry["reason"], entry["detail"]))

    def check(self, max_bad_rows: float) -> None:
        for file, tally in self.tallies.items():
            tally.check(file, max_bad_rows, whole=self.share == 1)

    def counts(self, sampler: MixedBucketSampler) -> np.ndarray:
        """Records per cell of the mix, scaled up to the whole source."""
        return sum((sampler.counts_of(columns) for columns in self.columns), np.zeros(sampler.shape)) / self.share
