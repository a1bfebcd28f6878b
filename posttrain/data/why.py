"""`prepare_data --why`: the story of one record, told from the files of the finished sets."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from posttrain.config import Loaded, in_project, shown
from posttrain.data.rules import RULES, View
from posttrain.data.split import SIDES
from posttrain.data.telling import (
    abreast,
    bounds_of,
    exact_meaning,
    meaning,
    place_of,
    side_by_side,
    told,
    turns,
    wrapped,
)
from posttrain.data_blocks import Rules
from posttrain.errors import UserFault
from posttrain.runs import read_json
from posttrain.text import folded_text, key_text
from posttrain.words import Words, keyword_topics, load_list

COLUMNS = 112
LISTED = 20
NEAR = 5
SHINGLE = 5
_ID_IN_LINE = re.compile(rb'"id":"([0-9a-f]{16})","source"')


class Found(NamedTuple):
    """A record, or a row that gave none, where it stands now."""

    kind: str
    """sft, pref or text."""
    file: Path
    """Of the prepared set."""
    number: int
    """Its line there, from 1."""
    side: str | None
    """train, val or test; None: dropped."""
    entry: dict
    """reason, detail, source, file, line, record; of a kept one the last four."""

    @property
    def record(self) -> Any:
        return self.entry["record"]

    @property
    def id(self) -> str:
        """Ours; "" for a raw row."""
        return record_id(self.record)

    @property
    def fate(self) -> str:
        return f"kept ({self.side})" if self.side else f"dropped: {self.entry['reason']}"


def tell(loaded: Loaded, what: str) -> str:
    """The story of the record with an id, an id that begins so, or of a row of a raw file (`file:row`, from 1).

    UserFault: no finished set, nothing found, or too many.
    """
    directory, what = loaded.config.output_dir, what.strip()
    manifests = {kind: manifest for kind in ("sft", "pref", "text")
                 if (manifest := read_json(directory / f"{kind}_manifest.json"))}  # fmt: skip
    if not manifests:
        raise UserFault(f"--why {what}: no finished set in {shown(directory)}/\n"
                        f"  next: python -m scripts.prepare_data --config {shown(loaded.path)}")  # fmt: skip
    by_place = re.fullmatch(r"(.+):(\d+)", what)
    if by_place:
        found = list(at_place(directory, manifests, by_place[1], int(by_place[2])))
    elif re.fullmatch(r"[0-9a-f]{4,16}", what):
        found = list(with_id(directory, manifests, what))
    else:
        raise UserFault(f"--why {what}: {HOW}")
    if not found:
        raise UserFault(nothing(directory, manifests, what, by_place))
    if len({one.id or id(one) for one in found}) > 1 and not by_place or len(found) > LISTED:
        listed = [f"  {one.id or '-':<18}{one.kind:<6}{one.fate:<30}{place_of(one.entry)}" for one in found[:LISTED]]
        more = [f"  and {len(found) - LISTED} more"] if len(found) > LISTED else []
        return "\n".join([f"{len(found)} records and rows fit `{what}`; give more of the id:", *listed, *more])
    stories = [story(one, directory, manifests[one.kind]) for one in found]
    return "\n\n".join("\n".join(lines) for lines in stories)


HOW = ("give an id (16 of 0-9 and a-f, or its first 4 or more; `id` in the prepared files), or a raw file and a row "
       "from 1, e.g. rows.jsonl:17")  # fmt: skip

MOVED = {
    "moved_to_fill_a_side": "moved there, because the side would have been empty",
    "moved_with_their_cluster": "moved there, to stand on one side with what it shares a question or a text with",
}

# ------------------------------------------------------------------ finding


def lines_of(directory: Path, kind: str) -> Iterator[tuple[Path, str | None, Iterator[bytes]]]:
    """(file, side or None, its lines) of every file of a set."""
    for side in SIDES:
        path = directory / f"{kind}_{side}.jsonl"
        with open(path, "rb") as lines:
            yield path, side, lines
    path = directory / f"{kind}_dropped.jsonl.zst"
    with open(path, "rb") as packed:  # one frame per block of the run
        yield path, None, io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(
            packed, read_across_frames=True), 1 << 20)  # fmt: skip


def holding(directory: Path, kinds: Any, *needles: bytes) -> Iterator[Found]:
    """Every record whose line holds one of these bytes. Lines are parsed only then."""
    for kind in kinds:
        for path, side, lines in lines_of(directory, kind):
            for number, line in enumerate(lines, 1):
                if any(needle in line for needle in needles):
                    entry = json.loads(line)
                    if side:
                        meta = entry["meta"]
                        entry = {"source": entry["source"], "file": meta["file"], "line": meta["line"], "record": entry}
                    yield Found(kind, path, number, side, entry)


def record_id(record: Any) -> str:
    """The id of one of our records; "" of anything else."""
    own = isinstance(record, dict) and isinstance(record.get("meta"), dict) and "source" in record
    return record["id"] if own and isinstance(record.get("id"), str) else ""


def with_id(directory: Path, kinds: Any, prefix: str) -> Iterator[Found]:
    """The records whose id begins so. Several may have one id: equal rows of one source, of which one is kept."""
    return (one for one in holding(directory, kinds, f'"id":"{prefix}'.encode()) if one.id.startswith(prefix))


def at_place(directory: Path, kinds: Any, file: str, row: int) -> Iterator[Found]:
    """What was made of a row. A file is named by its path, or by the end of it."""
    wanted = shown(in_project(Path(file)))
    for one in holding(directory, kinds, f'"line":{row},'.encode(), f'"line":{row}}}'.encode()):
        its = one.entry["file"]
        if one.entry["line"] == row and (its == wanted or f"/{its}".endswith(f"/{file}")):
            yield one


def nothing(directory: Path, manifests: dict, what: str, by_place: re.Match | None) -> str:
    """The message where nothing was found: how ids look, and what is near."""
    told = [f"--why {what}: no record of {', '.join(manifests)} in {shown(directory)}/"]
    if by_place:
        files = sorted({entry["path"] for manifest in manifests.values() for name, entry in manifest["inputs"].items()
                        if not name.startswith("rules/")})  # fmt: skip
        named = [path for path in files if f"/{path}".endswith(f"/{by_place[1]}")]
        told += [f"  {named[0]} was read; no record stands under row {by_place[2]}. Rows count from 1; a conversation "
                 "of a message tree stands under its first message's row"] if named else [
                 "  files that were read: " + ", ".join(files[:NEAR])
                 + (f" and {len(files) - NEAR} more" if len(files) > NEAR else "")]  # fmt: skip
        return "\n".join(told)
    ids = {match[1].decode() for kind in manifests for _, _, lines in lines_of(directory, kind) for line in lines
           if (match := _ID_IN_LINE.search(line))}  # fmt: skip

    def likeness(other: str) -> tuple[int, int]:
        same = [a == b for a, b in zip(what, other, strict=False)]
        return -sum(same), -(same + [False]).index(False)

    near = sorted(ids, key=likeness)[:NEAR]
    return "\n".join([*told, f"  {HOW}", f"  the nearest of {len(ids)} ids: {', '.join(near)}"])


# ------------------------------------------------------------------ telling


def story(one: Found, directory: Path, manifest: dict) -> list[str]:
    """One record's story, as lines."""
    entry, results, config = one.entry, manifest["results"], manifest["config"]
    rules = Rules.model_validate(config["rules"] | results.get("rules", {}).get(entry["source"], {}))
    coverage = config["decontaminate"]["min_coverage"]
    head = f"{one.id or 'a raw row'}: " + (f"kept, {one.side}" if one.side else f"dropped, {entry['reason']}")
    lines = [head, fact("made of", f"{entry['source']}, {place_of(entry)}"),
             fact("now in", f"{shown(one.file)}, line {one.number} ({one.kind})")]  # fmt: skip
    for key, why in MOVED.items():
        lines += [fact("its side", why)] if one.side and one.id in results[key] else []
    copies = entry.get("reason") in ("exact_duplicate", "near_duplicate")
    if not one.side:
        detail = f"it repeats {entry['detail'].removeprefix('of ')}" if copies else entry["detail"]
        lines += [fact("because", detail)] if detail else []
        lines += rule_lines(entry["reason"], rules, coverage)
    meta = one.record["meta"] if one.id else {}
    if "lang" in meta:
        lines.append(fact("language", f"{meta['lang']}, {meta['chars']} characters"))
    lines += [fact("repaired", ", ".join(meta["repairs"]))] if meta.get("repairs") else []
    for flag in meta.get("flags", ()):
        detail = found_again(flag, one.record, rules, config)
        lines += [fact("flagged", flag + (f" ({detail})" if detail else "")), *rule_lines(flag, rules, coverage)]
    if other := stays(one, directory) if copies else None:
        return [*lines, "", *compared(one, other, rules)]
    return [*lines, "", *told(one.record, COLUMNS)]


def fact(name: str, value: str) -> str:
    first, *more = wrapped(str(value), COLUMNS - 14)
    return "\n".join([f"  {name:<12}{first}", *(f"{'':<14}{line}" for line in more)])


def rule_lines(reason: str, rules: Rules, coverage: float) -> list[str]:
    """What a rule means, and its bounds as they were in force for the source."""
    lines = [fact("that means", meaning(reason))]
    if exact := exact_meaning(reason):
        lines.append(fact("exactly", exact))
    if bounds := bounds_of(reason, rules, coverage):
        lines.append(fact("in force", ", ".join(f"{name}={json.dumps(value)}" for name, value in bounds.items())))
    return lines


def found_again(flag: str, record: dict, rules: Rules, config: dict) -> str:
    """What a rule finds in the record as it stands: flags are stored by name alone. "" for rules over many records."""
    said = turns(record)
    if flag == "keywords":
        from posttrain.data.pipeline import word_lists
        from posttrain.stages import PrepareData

        listed = [(word, topic) for topic, path in word_lists(PrepareData.model_validate(config)) if path.is_file()
                  for word in load_list(path)]  # fmt: skip
        words = Words([word for word, _ in listed])
        topics = keyword_topics("\n".join(text for _, text in said), words, [topic for _, topic in listed])
        return "; ".join(f"{topic}: {', '.join(words)}" for topic, words in topics.items())
    rule = next((rule for rule in RULES if rule.name == flag), None)
    view = View([who for who, _ in said], [folded_text(text) for _, text in said], record)
    return (rule.finds(view, rules) or "") if rule else ""


def stays(one: Found, directory: Path) -> Found | None:
    """The record that a duplicate is a duplicate of."""
    first = one.entry["detail"].removeprefix("of ")
    others = [other for other in with_id(directory, [one.kind], first)
              if (other.file, other.number) != (one.file, one.number)]  # fmt: skip
    return min(others, key=lambda it: (it.side is None, it.entry.get("reason") == "exact_duplicate"), default=None)


def compared(one: Found, other: Found, rules: Rules) -> list[str]:
    """A duplicate and the record that it repeats, abreast."""
    half = COLUMNS // 2 - 2
    score = jaccard(one.record, other.record)
    lines = [f"  the first one of its cluster: {other.fate}, {place_of(other.entry)}",
             f"  Jaccard similarity of their {SHINGLE}-character shingles: {score:.3f}"]  # fmt: skip
    if one.entry["reason"] == "near_duplicate" and score < rules.min_jaccard:
        lines[-1] += f" (under {rules.min_jaccard}: they are linked through others of the cluster)"
    heads = abreast(f"this one, {one.id}", f"the first, {other.id}", half)
    return [*lines, "", heads, *side_by_side(one.record, other.record, half)]


def jaccard(one: dict, other: dict) -> float:
    """Of the sets of shingles of their key texts, as near duplicates are verified."""
    sets = []
    for record in (one, other):
        key = "".join(key_text(text) for _, text in turns(record))
        sets.append({key[at : at + SHINGLE] for at in range(max(1, len(key) - SHINGLE + 1))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])
