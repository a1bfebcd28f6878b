"""
The events of a model of any depth from those of three decoder layers: the middle layer's are repeated.

A decoder's inner layers do the same, so a trace of three layers knows everything of a model of twenty-eight; a test
holds the result to a trace in full depth, event by event. What crosses a border (an output that the next layer frees,
a gradient that the layer below frees) is found by its place: the n-th storage made in a layer's m-th stretch.
"""

from collections import defaultdict
from typing import NamedTuple

from posttrain.forecast.allocations import AllocationLog, Segment

FIRST, MIDDLE, LAST = 0, 1, 2
TRACED_LAYERS = 3


class LayersDiffer(Exception):
    """The traced layers are not alike, so that nothing follows from them for other depths."""


class Event(NamedTuple):
    """One storage made (+bytes) or dropped (-bytes). `storage` is its number in the log; `copy` tells layers apart."""

    change: int
    storage: int
    copy: int
    phase: str


def events(log: AllocationLog, layers: int) -> list[Event]:
    """The log's events as a model of `layers` decoder layers has them. Without change for the depth of the trace.

    Raises LayersDiffer.
    """
    copies = layers - TRACED_LAYERS + 1  # of the middle layer: number 1 beside the first, the highest beside the last
    alike = _Alike(log.segments)
    out: list[Event] = []
    for segment in log.segments:
        if segment.layer == MIDDLE:
            upwards = segment.phase != "backward"
            for copy in range(1, copies + 1) if upwards else range(copies, 0, -1):
                last = copy == (copies if upwards else 1)
                inside = (_inside(log, alike, segment, *event, copy, copies, last) for event in segment.events)
                out += [event for event in inside if event]
        else:
            for change, number in segment.events:
                out += _outside(log, segment, change, number, copies)
    _check(log, out, layers)
    return out


def _inside(log, alike, segment, change, number, copy, copies, last) -> Event | None:
    """An event of the middle layer, in one of its instances."""
    layer = log.storages[number].layer
    if layer == MIDDLE:
        return Event(change, number, copy, segment.phase)
    if layer == FIRST and copy > 1:
        return Event(change, alike.of(number, MIDDLE), copy - 1, segment.phase)
    if layer == LAST and copy < copies:
        return Event(change, alike.of(number, MIDDLE), copy + 1, segment.phase)
    if layer is None and not last:
        return None  # it is dropped once, by whoever comes last
    return Event(change, number, 0, segment.phase)


def _outside(log, segment, change, number, copies) -> list[Event]:
    """An event elsewhere: a storage of the middle layer is that of the neighbour, or outside of layers that of all."""
    if log.storages[number].layer != MIDDLE:
        return [Event(change, number, 0, segment.phase)]
    which = {FIRST: [1], LAST: [copies]}.get(segment.layer, range(1, copies + 1))
    return [Event(change, number, copy, segment.phase) for copy in which]


class _Alike:
    """Storages of the first and the last layer, and their counterparts in the middle one."""

    def __init__(self, segments: list[Segment]):
        self.made: dict[int, list[list[tuple[int, int]]]] = defaultdict(list)
        self.place: dict[int, tuple[int, int]] = {}
        for segment in segments:
            if segment.layer is None:
                continue
            stretch = [(number, change) for change, number in segment.events if change > 0]
            for at, (number, _) in enumerate(stretch):
                self.place[number] = (len(self.made[segment.layer]), at)
            self.made[segment.layer].append(stretch)

    def of(self, number: int, layer: int) -> int:
        stretch, at = self.place[number]
        try:
            return self.made[layer][stretch][at][0]
        except IndexError:
            raise LayersDiffer("the traced decoder layers are not alike") from None


def _check(log: AllocationLog, out: list[Event], layers: int) -> None:
    """Nothing is dropped twice, and nothing outlives the step that did not outlive it in the trace."""
    alive: set[tuple[int, int]] = set()
    for event in out:
        key = event.storage, event.copy
        if (event.change > 0) == (key in alive):
            raise LayersDiffer("the traced decoder layers are not alike")
        alive ^= {key}
    dropped = {number for segment in log.segments for change, number in segment.events if change < 0}
    if any(number in dropped for number, _ in alive):
        raise LayersDiffer("the traced decoder layers are not alike")


def as_traced(log: AllocationLog) -> list[Event]:
    """The events of a trace in full depth."""
    return [Event(change, number, 0, part.phase) for part in log.segments for change, number in part.events]


def flops(log: AllocationLog, layers: int, phases: tuple[str, ...]) -> float:
    """Floating point operations of these phases at `layers` decoder layers, from a trace of three or of all of them."""
    traced = {layer for _, layer in log.flops if layer is not None}
    repeated = layers - TRACED_LAYERS + 1 if len(traced) == TRACED_LAYERS else 1
    return sum(count * (repeated if layer == MIDDLE else 1) for (phase, layer), count in log.flops.items()
               if phase in phases)  # fmt: skip
