"""The catalogue: configs/datasets.yaml, checked, and the sources that a mix names."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from posttrain.config import Block, Loaded, describe_faults, read_yaml, shown
from posttrain.data.files import data_files
from posttrain.data.sources import FORMATS
from posttrain.errors import UserFault
from posttrain.stages import PrepareData, Rules

KINDS = {"sft": "conversations", "pref": "preference pairs", "text": "plain text"}


class RuleBounds(Block):
    """Bounds of the cleaning rules that differ for one set; null takes those of the stage's YAML."""

    min_chars: int | None = None
    """Characters at least."""
    max_chars: int | None = None
    """Characters at most."""
    min_cn_ratio: float | None = None
    """Share of Chinese letters at least."""
    allow_english_fallback: bool | None = None
    """Keep English records."""


class Entry(Block):
    """One set of the catalogue."""

    hub: str | None = None
    """Id on Hugging Face."""
    modelscope: str | None = None
    """Id on ModelScope."""
    revision: str | None = None
    """Commit, tag or branch on Hugging Face; null is the newest."""
    modelscope_revision: str | None = None
    """The same on ModelScope."""
    files: list[str] = []
    """Globs: which files of the repository are data."""
    licence: str = "unknown"
    """As stated by the publisher."""
    limits: str = "unknown"
    """What the licence or the content keeps one from."""
    language: str = "unknown"
    """zh, en, zh+en, multi."""
    kind: Literal["sft", "pref", "text"]
    """Conversations, preference pairs, or plain text."""
    format: str = "auto"
    """A name of sources.FORMATS, tried first; auto recognises each row by its columns."""
    columns: dict[str, str] = {}
    """Our column name -> theirs."""
    options: dict[str, Any] = {}
    """Of the format: paths, prefer, first_label, second_label."""
    rules: RuleBounds = RuleBounds()
    """Bounds that differ for this set."""
    refuse: dict[str, str] = {}
    """Kind -> why the set is not that, and what to take instead."""
    notes: str = ""
    """What a user should know."""


class Source(NamedTuple):
    """One source of a mix: its catalogue entry (None for a directory of one's own), weight, files and bounds."""

    key: str
    entry: Entry | None
    weight: float
    directory: Path
    files: list[Path]
    rules: Rules

    @property
    def options(self) -> dict:
        return self.entry.options if self.entry else {}


def load_catalogue(path: Path) -> dict[str, Entry]:
    """Every entry of the catalogue, all faults of the file in one UserFault."""
    entries, faults = {}, []
    for key, values in read_yaml(path).items():
        try:
            entries[key] = Entry.model_validate(values if isinstance(values, dict) else {})
        except ValidationError as error:
            faults += describe_faults(Entry, path, error, {}).splitlines()[1:-1]
            faults[-1] = f"  {key}.{faults[-1].strip()}"
            continue
        if entries[key].format not in ("auto", *FORMATS):
            known = ", ".join(FORMATS)
            faults.append(f"  {key}.format: unknown format {entries[key].format!r} (choices: auto, {known})")
    if faults:
        raise UserFault(f"{shown(path)}: {len(faults)} faults\n" + "\n".join(faults))
    return entries


def bounds(loaded: Loaded, entry: Entry | None) -> Rules:
    """The cleaning bounds of a source: --set and flags > its catalogue entry > the stage's YAML."""
    typed = {key.removeprefix("rules.") for key, origin in loaded.origins.items()
             if key.startswith("rules.") and origin.startswith(("--set", "command line"))}  # fmt: skip
    given = entry.rules.model_dump(exclude_none=True) if entry else {}
    return loaded.config.rules.model_copy(update={k: v for k, v in given.items() if k not in typed})


def sources_of(loaded: Loaded, kind: str, catalogue: dict[str, Entry]) -> tuple[list[Source], list[str]]:
    """The sources of one mix with a positive weight, in the mix's order, and the faults of the mix."""
    config: PrepareData = loaded.config
    sources, faults = [], []
    for key, weight in getattr(config, kind).mix.items():
        directory, entry = config.raw_dir / key, catalogue.get(key)
        if weight == 0:
            continue
        elif entry is None and not (key and "/" not in key and directory.is_dir()):
            faults.append(unknown_source(key, kind, catalogue, config))
        elif entry is not None and entry.kind != kind:
            faults.append(wrong_kind(key, kind, entry, catalogue))
        else:
            files = data_files(directory, entry.files if entry else []) if directory.is_dir() else []
            sources.append(Source(key, entry, weight, directory, files, bounds(loaded, entry)))
    return sources, faults


def unknown_source(key: str, kind: str, catalogue: dict[str, Entry], config: PrepareData) -> str:
    """Neither in the catalogue nor a directory: what was probably meant, and the choices."""
    own = sorted(p.name for p in config.raw_dir.iterdir() if p.is_dir() and not p.name.startswith(".")
                 and p.name not in (*catalogue, "eval")) if config.raw_dir.is_dir() else []  # fmt: skip
    fitting = [name for name, entry in catalogue.items() if entry.kind == kind]
    close = get_close_matches(key, [*catalogue, *own], 1, 0.6)
    meant = f" -- did you mean '{close[0]}'?" if close else ""
    return (
        f"{kind}.mix.{key}: no such source{meant}"
        f"\n      {KINDS[kind]} in {shown(config.catalogue)}: {', '.join(fitting)}"
        + (f"\n      directories of your own in {shown(config.raw_dir)}: {', '.join(own)}" if own else "")
        + f"\n      or lay your files into {shown(config.raw_dir / key)}/"
    )


def wrong_kind(key: str, kind: str, entry: Entry, catalogue: dict[str, Entry]) -> str:
    """A set asked for as what it is not: the reason and the alternatives."""
    reason = " ".join(entry.refuse.get(kind, f"it holds {KINDS[entry.kind]}, not {KINDS[kind]}").split())
    fitting = ", ".join(name for name, other in catalogue.items() if other.kind == kind)
    return f"{kind}.mix.{key}: refused: {reason}\n      {KINDS[kind]}: {fitting}; or move it to {entry.kind}.mix"


def print_catalogue(loaded: Loaded) -> None:
    """--list: every entry, and the directories in raw_dir that are not in it."""
    config: PrepareData = loaded.config
    catalogue = load_catalogue(config.catalogue)
    for kind, meaning in KINDS.items():
        entries = {key: entry for key, entry in catalogue.items() if entry.kind == kind}
        if entries:
            print(f"\n{meaning} ({kind}.mix)")
        for key, entry in entries.items():
            files = data_files(config.raw_dir / key, entry.files) if (config.raw_dir / key).is_dir() else []
            state = f"{len(files)} files in {shown(config.raw_dir / key)}" if files else "not downloaded"
            print(f"  {key:<24}{entry.language:<8}{entry.licence}  [{state}]")
            print(f"  {'':<24}hub: {entry.hub or '-'}  modelscope: {entry.modelscope or '-'}")
            print(f"  {'':<24}limits: {entry.limits}")
            if entry.notes:
                print(f"  {'':<24}{' '.join(entry.notes.split())}")
            for other, reason in entry.refuse.items():
                print(f"  {'':<24}not for {other}: {' '.join(reason.split())}")
    own = sorted(p.name for p in config.raw_dir.iterdir() if p.is_dir() and p.name not in catalogue
                 and data_files(p)) if config.raw_dir.is_dir() else []  # fmt: skip
    print(f"\ndirectories of your own in {shown(config.raw_dir)}: {', '.join(own) or 'none'}"
          "\nDownload with: python -m scripts.fetch --set datasets=[<key>,...]")  # fmt: skip
