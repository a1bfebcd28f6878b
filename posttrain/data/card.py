"""
The data card: what is in a set, where it is from, what was left out and why.

{kind}_card.md is for the people of the project; {kind}_README.md and {kind}_croissant.json are for publishing
(published.py); {kind}_samples.json holds the card's samples for the report.
"""

from pathlib import Path
from typing import Any

import yaml

from posttrain.config import Loaded, in_project, shown
from posttrain.data.catalogue import Source
from posttrain.data.measures import changed_rules, funnel
from posttrain.data.published import write_croissant, write_readme
from posttrain.data.telling import encodable, meaning, place_of, readable, wrapped
from posttrain.errors import UserFault
from posttrain.runs import write_json

TITLES = {"sft": "Conversations for SFT", "pref": "Preference pairs", "text": "Plain text"}
BAR = 40  # characters
LISTED = 1000  # ids in a list of the manifest at most
SAMPLE = 800  # characters


def load_tokenizer(name: str) -> Any:
    """A tokenizer that is on disk already: a directory, or a hub id in the cache. UserFault if it is not."""
    from transformers import AutoTokenizer

    path = in_project(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if path.exists() else name, local_files_only=True)
    except (OSError, ValueError) as error:
        what = "holds no tokenizer" if path.exists() else "is not on disk"
        raise UserFault(f"tokenizer: {name} {what} ({str(error).splitlines()[0]}); "
                        "give a directory, or null for characters only") from None  # fmt: skip
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made by transformers from a config.json alone
        raise UserFault(f"tokenizer: {name} holds no tokenizer (no vocabulary); give a directory, or null for "
                        "characters only")  # fmt: skip
    return tokenizer


# ------------------------------------------------------------------ the cards


def write_cards(directory: Path, kind: str, loaded: Loaded, sources: list[Source], results: dict, samples: Any,
                plan: list[str], inputs: dict[str, dict]) -> list[Path]:  # fmt: skip
    """Write the four files beside the finished sides of a set and return them. `results`: the numbers of the manifest;
    `samples`: pipeline.Samples; `plan`: the mix as lines; `inputs`: what was read, as it stands in the manifest."""
    config = loaded.config
    shared = [
        *sizes(results), *sources_section(sources, results), *steps_section(results, kind),
        *dropped_section(results, kind), *flagged_section(results), *mix_section(results, plan),
        *content_section(results, config), *split_section(results, config),
    ]  # fmt: skip
    lines = [
        f"# {TITLES[kind]}: data card", "",
        f"{results['kept']:,} records from {len(sources)} sources, made by `python -m scripts.prepare_data --config "
        f"{shown(loaded.path)}` with seed {config.seed}. Every number here is in `{kind}_manifest.json`; the story of "
        "one record: `python -m scripts.prepare_data --why <id>`.", "", *shared,
        *samples_section(samples), *config_section(config, sources), *inputs_section(inputs),
    ]  # fmt: skip
    card, kept = directory / f"{kind}_card.md", directory / f"{kind}_samples.json"
    card.write_text(encodable("\n".join(lines)), encoding="utf-8")
    write_json(kept, gathered(samples))
    title = TITLES[kind]
    return [card, kept, write_readme(directory, kind, title, sources, results, shared),
            write_croissant(directory, kind, title, sources, results)]  # fmt: skip


def table(head: list[str], rows: list[list[Any]], words: int = 1) -> list[str]:
    """A Markdown table; the first `words` columns stand to the left, the others are numbers."""
    def cell(value: Any) -> str:
        text = f"{value:,}" if isinstance(value, int) else str(value)
        return " ".join(text.replace("|", "\\|").split())

    line = "|".join(["---"] * words + ["---:"] * (len(head) - words))
    return [f"| {' | '.join(head)} |", f"|{line}|", *(f"| {' | '.join(map(cell, row))} |" for row in rows), ""]


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def sizes(results: dict) -> list[str]:
    kept = results["kept"]
    languages = ", ".join(f"{name} {n:,} ({share(n, kept)})" for name, n in results["languages"].items())
    lines = ["## Sizes", ""] + table(["side", "records", "share"],
                                     [[side, n, share(n, kept)] for side, n in results["splits"].items()])  # fmt: skip
    totals = [f"{results[unit]['total']:,} {unit}" for unit in ("chars", "tokens") if results.get(unit)]
    return [*lines, f"Languages: {languages}. In all {' and '.join(totals)}.", ""]


def sources_section(sources: list[Source], results: dict) -> list[str]:
    """Licences and limits as they were published; what each source gave."""
    described = []
    for source in sources:
        entry = source.entry
        facts = [entry.hub or entry.modelscope or "-", entry.licence, entry.limits] if entry else [
            "-", "your own files", "what you agreed to when you got them"]  # fmt: skip
        described.append([f"`{source.key}`", *facts, results["sources"][source.key]["kept"]])
    return ["## Sources, licences, limits", "",
            "The set is bound by all of these at once. `unchecked`: written down from memory; read the publisher's "
            "card before you publish anything made from it.", "",
            *table(["source", "hub id", "licence", "limits", "records in the set"], described, words=4)]  # fmt: skip


def steps_section(results: dict, kind: str) -> list[str]:
    """The funnel, and what was repaired on the way."""
    steps = funnel(results)
    rows = [[f"`{key}`", *numbers.values(), share(numbers["kept"], numbers["read"])] for key, numbers in steps.items()]
    sums = [sum(numbers[name] for numbers in steps.values()) for name in next(iter(steps.values()))]
    rows += [["all", *sums, share(sums[-1], sums[1])]] if len(rows) > 1 else []
    head = ["source", "rows", "read", "usable", "after rules", "after duplicates", "kept", "kept of read"]
    repairs = [[f"`{key}`", f"`{name}`", number] for key, account in results["sources"].items()
               for name, number in account["repairs"].items()]  # fmt: skip
    return ["## From raw rows to the set", "", *table(head, rows),
            "A row may give several records, and one record may be made of several rows (messages of a tree). *Read* "
            "counts records, and rows that gave none; *usable* the records; *kept* what is left after repeated "
            "answers, post limits and the mix. read = kept + dropped holds for every source, or the run fails; "
            f"{kind}_dropped.jsonl.zst holds every dropped one with its reason.", "",
            *(["Repaired, and kept:", "", *table(["source", "repair", "records"], repairs, 2)] if repairs else []),
            ]  # fmt: skip


def reasons_table(results: dict, name: str, head: str) -> list[str]:
    """Reason (or flag) by source, then what each means."""
    found = {key: account[name] for key, account in results["sources"].items()}
    rows = [[f"`{reason}`", *(found[key].get(reason, 0) for key in found), *([total] if len(found) > 1 else [])]
            for reason, total in results[name].items()]  # fmt: skip
    alike: dict[str, list[str]] = {}
    for reason in results[name]:
        alike.setdefault(meaning(reason), []).append(f"`{reason}`")
    meanings = [f"- {', '.join(reasons)}: {means}" for means, reasons in alike.items()]
    heads = [head, *(f"`{key}`" for key in found), *(["all"] if len(found) > 1 else [])]
    return [*table(heads, rows), *meanings, ""]


def dropped_section(results: dict, kind: str) -> list[str]:
    if not results["dropped"]:
        return ["## What was dropped", "", "Nothing.", ""]
    total = sum(results["dropped"].values())
    return ["## What was dropped", "", f"{total:,} of {results['read']:,} ({share(total, results['read'])}).", "",
            *reasons_table(results, "dropped", "reason")]  # fmt: skip


def flagged_section(results: dict) -> list[str]:
    if not results["flagged"]:
        return []
    return ["## What was flagged and kept", "",
            "Named in the record's `meta.flags`. These rules are guesses: look at the samples before you drop by them "
            "(`rules.<name>: drop`).", "", *reasons_table(results, "flagged", "flag")]  # fmt: skip


def mix_section(results: dict, plan: list[str]) -> list[str]:
    mix = results["mix"]
    return ["## The mix", "", f"At most {mix['max_samples']:,} records; on_shortage: {mix['on_shortage']}. Per source, "
            "language and length: what the shares ask for, what there is after cleaning, what was taken.", "", "```",
            *plan, "```", ""]  # fmt: skip


def content_section(results: dict, config: Any) -> list[str]:
    """Languages per source, lengths and turns."""
    rows = []
    for key, its in results["by_source"].items():
        languages = ", ".join(f"{name} {share(n, its['records'])}" for name, n in its["languages"].items()) or "-"
        rows.append([f"`{key}`", languages, its["records"], its["chars"].get("p50", "-"), its["chars"].get("p95", "-"),
                     f"{its['multi_turn']:.1%}"])  # fmt: skip
    lines = ["## What is in it", ""] + table(
        ["source", "languages", "records", "chars, median", "chars, 95 %", "more than one question"], rows, words=2)
    units = [unit for unit in ("chars", "tokens", "turns") if results.get(unit)]
    lines += table(["", *results["chars"]], [[unit, *results[unit].values()] for unit in units])
    if "tokens" in results:
        lines += [f"Tokens of `{Path(config.tokenizer).name}`, without the chat template's marks.", ""]
    for unit in units:
        lines += [f"Records by {'questions' if unit == 'turns' else unit}:", "", "```",
                  *bars(results["histograms"][unit]), "```", ""]  # fmt: skip
    for name, count in results["conflicts"].items():
        lines += [f"Conflicts, kept: {name.replace('_', ' ')}: {count:,}.", ""]
    return lines


def bars(histogram: dict) -> list[str]:
    """A histogram as text: a line per bin, its languages one after the other in the bar."""
    edges, counts = histogram["edges"], histogram["counts"]
    marks = dict(zip(counts, "█▒░·", strict=False))
    totals = [sum(some) for some in zip(*counts.values(), strict=True)]
    ends = [f"{a}-{b - 1}" if b - 1 > a else str(a) for a, b in zip(edges, edges[1:], strict=False)]
    names = [*ends, f"{edges[-1]} and more"] if edges else []
    wide = max(map(len, names), default=0)
    lines = ["  ".join(f"{mark} {language}" for language, mark in marks.items())]
    for number, (name, total) in enumerate(zip(names, totals, strict=True)):
        bar = "".join(marks[its] * round(BAR * some[number] / max(totals)) for its, some in counts.items())
        lines.append(f"{name:>{wide}}  {bar:<{BAR + 2}}{total:>9,}")
    return lines


def split_section(results: dict, config: Any) -> list[str]:
    def listed(name: str) -> str:
        return f"{len(results[name]):,}" + (" or more" if len(results[name]) == LISTED else "")

    how = "the sides have fixed counts" if config.split_counts else "the side follows from the content alone"
    form = " ".join(type(config).model_fields["text_form"].description.split())
    return ["## Sides and text form", "",
            f"{results['units']:,} units (records that share a first question, or are near duplicates), each on one "
            f"side only; {how}. {listed('moved_with_their_cluster')} records stand elsewhere than by their own "
            f"question, beside what they are alike to; {listed('moved_to_fill_a_side')} were moved to fill an empty "
            "side.", "", f"Text form: `{results['text_form']}`. {form}", ""]  # fmt: skip


# ------------------------------------------------------------------ samples, config, hashes


def gathered(samples: Any) -> dict:
    """The samples as they are shown: kept, dropped by reason, flagged by rule; each {id?, place, detail, record}."""
    kept = [{"source": record["source"], "id": record["id"], "place": place_of(record["meta"]),
             "detail": f"{record['meta']['lang']}, {record['meta']['chars']} characters",
             "record": readable(record, SAMPLE)} for record in samples.kept]  # fmt: skip

    def written(some: list[dict]) -> list[dict]:
        return [{name: encodable(str(value)) for name, value in sample.items()} for sample in some]

    return {"kept": written(kept), **{fate: {reason: written(some) for reason, some in sorted(found.items())}
                                      for fate, found in (("flagged", samples.flagged), ("dropped", samples.dropped))}}


def samples_section(samples: Any) -> list[str]:
    """Folded where Markdown is rendered."""
    found = gathered(samples)
    groups = [("kept", found["kept"])]
    groups += [(f"{fate}: {reason}", some) for fate in ("flagged", "dropped") for reason, some in found[fate].items()]
    lines = ["## Samples", "", "The first ones met, not chosen by hand.", ""]
    for name, some in groups:
        lines += [f"<details><summary>{name} ({len(some)})</summary>", ""]
        for sample in some:
            detail = " ".join(sample["detail"][:200].replace("`", "'").split())
            lines += [f"`{sample['source']}` `{sample['place']}`" + (f" `{detail}`" if detail else ""), ""]
            lines += [f"    {line}".rstrip() for line in wrapped(sample["record"], 100)] + [""]
        lines += ["</details>", ""]
    return lines


def config_section(config: Any, sources: list[Source]) -> list[str]:
    """The whole config, and the rules that sources have of their own."""
    def dumped(values: dict) -> list[str]:
        text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False, default_flow_style=None)
        return ["```yaml", *text.splitlines(), "```", ""]

    lines = ["## Config", "", *dumped(config.model_dump(mode="json"))]
    own = changed_rules(sources, config)
    return [*lines, *(["Rules that are others for single sources:", "", *dumped(own)] if own else [])]


def inputs_section(inputs: dict[str, dict]) -> list[str]:
    rows = [[f"`{name}`", f"`{entry['sha256']}`", entry["bytes"]] for name, entry in inputs.items()]
    return ["## Files read", "", *table(["file", "SHA-256", "bytes"], rows, words=2)]
