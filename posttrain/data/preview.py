"""The dry run of prepare_data: what is there, what a first record becomes, what would be taken and written."""

import json
from itertools import islice
from pathlib import Path

from posttrain.config import in_project, shown
from posttrain.data import oasst
from posttrain.data.card import load_tokenizer
from posttrain.data.catalogue import KINDS, Source, load_catalogue, sources_of
from posttrain.data.clean import clean
from posttrain.data.files import count_rows, read_rows
from posttrain.data.jsonfiles import Fault
from posttrain.data.reading import Account, items_of
from posttrain.data.sources import conversation_records, detect, to_records
from posttrain.errors import UserFault
from posttrain.hub import host, offline
from posttrain.plan import Plan, who_makes

FIRST_ROWS = 200
READ_WHOLE = 16 << 20  # bytes
EXCERPT = 320


def plan_set(plan: Plan, kind: str) -> None:
    """Add one of the two sets to the plan."""
    config = plan.config
    sources, faults = sources_of(plan.loaded, kind, load_catalogue(config.catalogue))
    plan.faults += faults
    if not sources and not faults:
        plan.faults.append(f"{kind}.mix names no source with a weight above 0 (--list prints them)")
    for source in sources:
        if config.output_dir.resolve().is_relative_to(source.directory.resolve()):
            plan.faults.append(f"output_dir: {shown(config.output_dir)} lies in {shown(source.directory)}, whose files "
                               f"are read as the source {source.key}: choose a directory outside of it")  # fmt: skip
    present = [source for source in sources if source.files]
    for source in sources:
        if source not in present:
            plan_missing(plan, kind, source)
    rows = {source.key: plan_present(plan, kind, source) for source in present}
    if plan.dry_run and sources:
        plan_mix(plan, kind, sources, rows)
    size = sum(file.stat().st_size for source in present for file in source.files)
    for name in ("train.jsonl", "val.jsonl", "test.jsonl", "dropped.jsonl.zst", "manifest.json", "card.md"):
        plan.make(config.output_dir / f"{kind}_{name}")
    # The cleaned records are laid aside on disk until quotas and split are known.
    plan.make(config.output_dir / f".{kind}_clean.jsonl.part", 2 * size, "while it runs")


def plan_tokenizer(plan: Plan) -> None:
    """The tokenizer of the card: a directory, or a hub id that must be in the cache when the stage runs."""
    name = plan.config.tokenizer
    if name is None:
        return
    path, is_hub_id = in_project(Path(name)), name.count("/") == 1 and name[0] not in "/.~"
    if path.exists() or not is_hub_id or who_makes(path, plan.loaded.path.parent, plan.stage):
        if plan.need("tokenizer", path, otherwise="Give a directory, or null to count characters only."):
            try:
                load_tokenizer(name)
            except UserFault as fault:
                plan.faults.append(str(fault))
    else:
        plan.fact("inputs", f"tokenizer: {name} (a hub id: it must be on disk; python -m scripts.fetch gets it)")


def plan_missing(plan: Plan, kind: str, source: Source) -> None:
    """A source without files: made by a stage, downloaded, or a fault."""
    config, entry = plan.config, source.entry
    hub_id = entry and (entry.modelscope if config.hub == "modelscope" else entry.hub)
    role = f"{kind} source {source.key}"
    if plan.dry_run and (maker := who_makes(source.directory, plan.loaded.path.parent, plan.stage)):
        plan.pending.append(f"{role}: {shown(source.directory)}/, made by: {maker}")
    elif hub_id and config.hub != "none" and not offline():
        terms = f"{entry.licence}; {entry.limits}"
        plan.download(f"{role}: {hub_id} from {host(config.hub)} into {shown(source.directory)}/ ({terms})")
    else:
        layable = "json, jsonl, csv, tsv, parquet, plain or packed"
        plan.faults.append(f"{role}: no data files in {shown(source.directory)}/\n"
                           f"      lay its files there ({layable}){_hub_hint(source)}")


def _hub_hint(source: Source) -> str:
    if not source.entry or not source.entry.hub:
        return ""
    return (f"; on Hugging Face it is {source.entry.hub}, and with a network this gets it:"
            f"\n      python -m scripts.fetch --set datasets=[{source.key}]")  # fmt: skip


def plan_present(plan: Plan, kind: str, source: Source) -> int | None:
    """A source with files: counts, its first record, a fault for what would stop the run. Returns the rows if known.

    A small source is read whole, so that its faults are all known; of a large one the first rows are tried.
    """
    size = sum(file.stat().st_size for file in source.files)
    try:
        rows, usable = counted(plan, kind, source, size)
        place, raw, found = first_record(source, kind)
    except UserFault as fault:
        plan.faults.append(str(fault))
        return None
    counts = "rows not counted" if rows is None else f"{rows} rows"
    counts += "" if usable is None else f", {usable} records before cleaning"
    files = f"{len(source.files)} files in {shown(source.directory)}/"
    plan.fact("inputs", f"{kind} {source.key}: {files}, {counts}, {size / 2**20:.1f} MiB")
    if isinstance(found, Fault):
        plan.faults.append(f"{kind} source {source.key}: none of the first rows can be used as {KINDS[kind]}; {place}: "
                           f"{found.reason}: {found.detail[:300]}")  # fmt: skip
    elif plan.dry_run:
        layout = detect(raw, source.entry.format if source.entry else "auto")
        own = "" if source.entry else "; not in the catalogue, recognised by its columns"
        record, reason = clean(found, source.rules)
        plan.fact("example", f"{kind} {source.key}: {place} (layout {layout}{own})")
        plan.fact("example", f"  raw:    {_cut(raw)}")
        plan.fact("example", f"  record: {_cut(record)}{f'  -> dropped: {reason}' if reason else ''}")
    return rows


def counted(plan: Plan, kind: str, source: Source, size: int) -> tuple[int | None, int | None]:
    """(rows, usable records) of a source as far as they are cheap to know; None is not known. Nothing in a real run."""
    if not plan.dry_run:
        return None, None
    if size < READ_WHOLE:
        account = Account()
        items = items_of(source, kind, account, plan.config.max_bad_rows)
        usable = sum(not isinstance(item.result, Fault) for item in items)
        return account.rows, usable
    rows = [count_rows(file) for file in source.files]
    return None if None in rows else sum(rows), None


def first_record(source: Source, kind: str) -> tuple[str, object, dict | Fault]:
    """(place, raw row, record) of the first row that gives a record; of the first faulty row if none of many does."""
    entry, failed, messages = source.entry, None, []
    preferred, columns = (entry.format, entry.columns) if entry else ("auto", {})
    file = source.files[0]
    for line, row in islice(read_rows(file), FIRST_ROWS):
        if kind == "sft" and oasst.is_message(row):
            messages.append((line, row))
            continue
        for item in to_records(row, source.key, kind, preferred, columns, source.options):
            if not isinstance(item, Fault):
                return f"{shown(file)}:{line}", row, item
            failed = failed or (f"{shown(file)}:{line}", row, item)
    if messages:
        items = conversation_records([row for _, row in messages], source.key, source.options)
        none = Fault("no_conversation", "no answered question")
        rows, first = next(((rows, item) for rows, item in items if isinstance(item, dict)), ([0], none))
        line, row = messages[rows[0]]
        return f"{shown(file)}:{line}", row, first
    return failed


def plan_mix(plan: Plan, kind: str, sources: list[Source], rows: dict[str, int | None]) -> None:
    """The sampling plan: shares, quotas, rows there, and the bounds that hold for each source."""
    config = plan.config
    asked, total = getattr(config, kind).max_samples, sum(source.weight for source in sources)
    plan.fact("sampling", f"{kind}: at most {asked} records; where a source has less than its share the others fill")
    for source in sources:
        share, bounds, there = source.weight / total, source.rules, rows.get(source.key)
        languages = f"Chinese >= {bounds.min_cn_ratio}{' or English' if bounds.allow_english_fallback else ''}"
        plan.fact("sampling", f"  {source.key}: share {share:.1%}, quota {round(asked * share)}, rows there: "
                  f"{'unknown' if there is None else there}; {bounds.min_chars}..{bounds.max_chars} characters, "
                  f"{languages}")  # fmt: skip
    shares = " / ".join(f"{part / sum(config.split):.0%}" for part in config.split)
    plan.fact("sampling", f"  split by the hash of the first question, seed {config.seed}: {shares}")


def _cut(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= EXCERPT else text[:EXCERPT] + " ..."
