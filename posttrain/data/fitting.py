"""
Fitting: from shares and counts to how many records each source, language and number of turns gives.

The shares that are asked for are margins of one table, source x language x turns, and the counts that are there bound
its cells. Survey statistics adjusts tables to margins by raking (Deming and Stephan 1940, Annals of Mathematical
Statistics 11, 427-444); it needs margins that can all hold, and here they seldom can. So they have an order:

1. the totals of `mix` and of `replay`: what the shares allow and what is there;
2. the share of Chinese, as near to what is asked as 1 allows; 3. that of several turns, as near as 1 and 2 allow
   (the least and the most that can be reached, by linear programs);
4. the sources, max-min fair by weight: no source could have more but for one that has less for its weight. Where only
   counts are in the way this is filling: a source that has too little gives all it has, the others share what it lacks
   by their weights;
5. within the sources their languages and turns, max-min fair by what is there.

Max-min fair numbers are found by progressive filling (Bertsekas and Gallager, Data Networks, 1992, section 6.5.2). They
are unique, so nothing hangs on a solver's choice.
"""

from typing import NamedTuple

import numpy as np

LEAST = 1e-6  # weights below this part of the whole count as this where one is compared with another
SLACK = 1e-5  # records: what is reached is held but for the solver's tolerance


class Unreachable(Exception):
    """Not even one record can be taken with all shares kept."""


class Shares(NamedTuple):
    """What is asked for."""

    weights: np.ndarray
    """Share of the result per source: those of the mix sum to 1 - replay, those of replay to `replay`."""
    is_replay: np.ndarray
    """Which of the sources are replay."""
    replay: float
    """Share of the result."""
    chinese: float | None
    multi_turn: float | None
    most: int
    """Records at most."""


def fitted(shares: Shares, there: np.ndarray, exact: bool = False, enough: bool = False) -> np.ndarray:
    """Real numbers per (source, zh | not zh, one | several turns), at most `there`; their sum is whole.

    An axis of length 1 is one that no share is asked of. exact: the largest total at which all shares hold
    (Unreachable where that is below 1) instead of filling up. enough: as if there were enough of all there is any of.
    """
    caps = np.where((shares.weights > 0)[:, None, None], there, 0).astype(float)
    caps = np.where(caps > 0, shares.most, 0.0) if enough else caps
    of_source, simple = caps.sum(axis=(1, 2)), caps.shape[1:] == (1, 1)
    if exact:
        total = _largest(shares, caps)
        if total < 1:
            raise Unreachable
        parts = ((1 - shares.replay) * total, shares.replay * total)
    else:
        parts = _part_totals(shares, of_source)
    if sum(parts) == 0:
        return np.zeros(caps.shape)
    asked = np.zeros(len(caps))
    for which, total, share in ((~shares.is_replay, parts[0], 1 - shares.replay),
                                (shares.is_replay, parts[1], shares.replay)):  # fmt: skip
        asked[which] = shares.weights[which] / (share or 1) * total
        if simple:
            caps[which, 0, 0] = _filled(shares.weights[which], of_source[which], total)
    return caps if simple else _adjusted(shares, caps, there, parts, asked, exact)


def rounded(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers, each the floor or the ceiling of its real one; the sum of any run of neighbours is less than 1
    from the real one (the differences of the rounded running sum, in millionths so that whole numbers stay)."""
    running = np.cumsum(np.rint(np.asarray(numbers) * 1e6).astype(np.int64))
    return np.diff((running + 500_000) // 1_000_000, prepend=0)


def spread(number: int, there: np.ndarray) -> np.ndarray:
    """`number` records over the cells of `there` in proportion to what each has, at least one from each that has any
    where there is room for that. Never more than a cell has, unless `number` is more than there is in all."""
    flat = there.ravel()
    least = (flat > 0).astype(np.int64)
    least = least if least.sum() <= number else np.zeros_like(least)
    rest = flat - least if (flat - least).any() else flat
    return (least + rounded((number - least.sum()) * rest / (rest.sum() or 1))).reshape(there.shape)


def _part_totals(shares: Shares, of_source: np.ndarray) -> tuple[float, float]:
    """Records of mix and of replay. Replay follows the mix: a small mix is not filled up with replay."""
    mix, replay = (float(of_source[which].sum()) for which in (~shares.is_replay, shares.is_replay))
    from_mix = min(mix, shares.most * (1 - shares.replay))
    from_replay = float(np.rint(min(replay, from_mix * shares.replay / (1 - shares.replay))))
    return min(mix, shares.most - from_replay), from_replay


def _filled(weights: np.ndarray, caps: np.ndarray, room: float) -> np.ndarray:
    """`room` shared out by weight; who has less than its share gives all, the others share what it lacks."""
    taken, short = np.zeros(len(caps)), (caps > 0) & (weights > 0)
    while short.any():
        level = room / weights[short].sum()
        full = short & (caps <= weights * level)
        if not full.any():
            taken[short] = weights[short] * level
            break
        taken[full] = caps[full]
        room -= caps[full].sum()
        short &= ~full
    return taken


def _largest(shares: Shares, caps: np.ndarray) -> int:
    """The largest total at which every share holds."""
    wanted = shares.weights > 0
    if caps.shape[1:] == (1, 1):
        total = min((caps[wanted, 0, 0] / shares.weights[wanted]).min(initial=np.inf), shares.most)
    else:
        rows, goals, cap, _ = _margins(shares, caps)
        rows = np.vstack([rows[2:], np.arange(len(caps))[wanted, None] == np.nonzero(caps)[0]]).astype(float)
        goals = np.append(goals, shares.weights[wanted])
        bounds = [*((0, most) for most in cap), (0, shares.most)]
        cost = np.append(np.zeros(len(cap)), -1.0)
        total = -_solved(cost, np.column_stack([rows, -goals]), np.zeros(len(rows)), bounds).fun
    return int(total + 1e-6)


def _margins(shares: Shares, caps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Over the cells that have anything: rows that sum mix, replay, Chinese and several turns, the shares asked of the
    last two (only those that are asked), the cells' bounds, and their sources."""
    source, group, turns = np.nonzero(caps)
    rows, goals = [~shares.is_replay[source], shares.is_replay[source]], []
    for share, row in ((shares.chinese, group == 0), (shares.multi_turn, turns == 1)):
        if share is not None:
            rows.append(row)
            goals.append(share)
    return np.array(rows, float), np.array(goals), caps[source, group, turns], source


def _adjusted(shares: Shares, caps: np.ndarray, there: np.ndarray, parts: tuple[float, float], asked: np.ndarray,
              exact: bool) -> np.ndarray:  # fmt: skip
    """Aims 2 to 5."""
    rows, goals, cap, source = _margins(shares, caps)
    total, sums, bounds = sum(parts), list(parts), [(0, most) for most in cap]
    for number, goal in enumerate(goals, start=2):
        reach = [sign * _solved(sign * rows[number], rows[:number], sums, bounds).fun for sign in (1, -1)]
        low, high = min(reach) + SLACK, max(reach) - SLACK  # not quite to the end, where rounding leaves no solution
        sums.append(float(np.clip(goal * total, low, high)) if low < high else sum(reach) / 2)
    present = np.unique(source)
    by_source, wanted = (present[:, None] == source).astype(float), np.maximum(asked[present], LEAST * total)
    of_source = asked[present] if exact else by_source @ _fair(by_source, wanted, rows, sums, bounds)
    more = (by_source, of_source - SLACK)
    has = there[np.nonzero(caps)].astype(float)
    likely = np.maximum(asked[source] * has / (by_source.T @ (by_source @ has)), LEAST * total)
    taken = np.zeros(caps.shape)
    taken[np.nonzero(caps)] = np.clip(_fair(np.eye(len(cap)), likely, rows, sums, bounds, more), 0, cap)
    return taken


def _fair(sets: np.ndarray, weights: np.ndarray, rows: np.ndarray, sums: list[float], bounds: list,
          least: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:  # fmt: skip
    """The cells for which sets @ cells is max-min fair by weight, with rows @ cells == sums and, of `least`,
    least[0] @ cells >= least[1].

    All sets rise together, each by its weight, until some can rise no further: those whose constraint has a price in
    the linear program. They stay, the others go on."""
    floor, rising = np.zeros(len(sets)), np.ones(len(sets), bool)
    others, reached = least or (np.zeros((0, sets.shape[1])), np.zeros(0))
    others = np.column_stack([-others, np.zeros(len(others))])
    equal = np.column_stack([rows, np.zeros(len(rows))])
    while rising.any():
        more = np.column_stack([-sets, np.where(rising, weights, 0)])
        cost = np.append(np.zeros(sets.shape[1]), -1.0)
        found = _solved(cost, equal, sums, [*bounds, (0, None)], np.vstack([more, others]), -np.append(floor, reached))
        price = np.where(rising, -found.ineqlin.marginals[: len(sets)] * weights, 0)  # their sum is 1
        stays = price > min(1e-6, price.max() / 2)
        floor[stays] = np.maximum(weights[stays] * found.x[-1] - SLACK, 0)
        rising &= ~stays
    return found.x[:-1]


def _solved(cost, rows, sums, bounds, more=None, upper=None):
    """scipy's linear program; that there is no solution is a fault of ours."""
    from scipy.optimize import linprog  # 0.4 s, needed only where a share of a language or of turns is asked for

    found = linprog(cost, A_ub=more, b_ub=upper, A_eq=rows, b_eq=sums, bounds=bounds)
    if found.status:
        raise RuntimeError(f"fitting the shares: {found.message}")
    return found
