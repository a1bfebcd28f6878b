"""
A finished set as others find it: a Hugging Face dataset card and Croissant metadata.

{kind}_README.md becomes README.md of a dataset repository that holds the three JSONL files (docs: hub/datasets-cards);
{kind}_croissant.json follows the Croissant Format Specification 1.0 (docs.mlcommons.org/croissant) and describes the
files beside it by their SHA-256. Neither shows a path of this machine or a sample.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from posttrain.data.catalogue import Source
from posttrain.data.telling import encodable
from posttrain.runs import describe_file, write_json

SPLITS = {"train": "train", "val": "validation", "test": "test"}  # our name -> the hub's
CROISSANT = {"train": "cr:TrainingSplit", "val": "cr:ValidationSplit", "test": "cr:TestSplit"}
# As a catalogue entry states it -> (identifier on the hub, address at spdx.org).
LICENCES = {
    name: (identifier, f"https://spdx.org/licenses/{spdx}.html")
    for name, identifier, spdx in (
        ("Apache-2.0", "apache-2.0", "Apache-2.0"), ("MIT", "mit", "MIT"), ("GPL-3.0", "gpl-3.0", "GPL-3.0-only"),
        ("CC0-1.0", "cc0-1.0", "CC0-1.0"), ("CC BY 4.0", "cc-by-4.0", "CC-BY-4.0"),
        ("CC BY-SA 3.0", "cc-by-sa-3.0", "CC-BY-SA-3.0"), ("CC BY-SA 4.0", "cc-by-sa-4.0", "CC-BY-SA-4.0"),
        ("CC BY-NC 4.0", "cc-by-nc-4.0", "CC-BY-NC-4.0"), ("CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", "CC-BY-NC-SA-4.0"),
        ("ODC-By", "odc-by", "ODC-By-1.0"),
    )
}  # fmt: skip
TAGS = {"sft": ["sft", "chat"], "pref": ["preference", "dpo", "orpo"], "text": ["pretraining"]}
MESSAGES = {"role": "system, user, assistant or tool", "content": "what is said"}
FIELDS = {
    "sft": {"messages": "the conversation, which ends in an assistant turn"},
    "pref": {"prompt": "the conversation up to the last question", "chosen": "the better answer, one assistant turn",
             "rejected": "the worse answer, one assistant turn"},
    "text": {"text": "plain text"},
}  # fmt: skip


def licences(sources: list[Source], results: dict) -> list[str]:
    """As stated, of the sources that gave something; without the mark of what was not checked."""
    stated = [source.entry.licence if source.entry else "not stated" for source in sources
              if results["sources"][source.key]["kept"]]  # fmt: skip
    return list(dict.fromkeys(text.removesuffix("(unchecked)").strip() for text in stated))


def languages(results: dict) -> list[str]:
    """zh and en, where they are 1 % of the set; the larger first."""
    return [name for name, n in results["languages"].items() if name in ("zh", "en") and n >= 0.01 * results["kept"]]


def size_category(records: int) -> str:
    """The hub's: n<1K, 1K<n<10K ... n>1T."""
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = next((number for number in range(len(bounds)) if records < 1000 * 10**number), len(bounds))
    if place in (0, len(bounds)):
        return "n<1K" if place == 0 else "n>1T"
    return f"{bounds[place - 1]}<n<{bounds[place]}"


# ------------------------------------------------------------------ Hugging Face


def header(kind: str, title: str, sources: list[Source], results: dict) -> dict[str, Any]:
    """The YAML header. Sources under one known licence: that one; else `other`, with all of them named."""
    stated = licences(sources, results)
    known = [LICENCES[name][0] for name in stated if name in LICENCES]
    licence: dict[str, Any] = {"license": "other", "license_name": "several", "license_details": "; ".join(stated)}
    if len(known) == len(stated) == 1:
        licence = {"license": known[0]}
    given = [source.entry.hub for source in sources
             if source.entry and source.entry.hub and results["sources"][source.key]["kept"]]  # fmt: skip
    files = [{"split": split, "path": f"{kind}_{side}.jsonl"} for side, split in SPLITS.items()
             if results["splits"][side]]  # fmt: skip
    found = {
        "pretty_name": title, "language": languages(results), **licence,
        "size_categories": [size_category(results["kept"])], "task_categories": ["text-generation"], "tags": TAGS[kind],
        "source_datasets": [f"extended|{hub}" for hub in given],
        "configs": [{"config_name": kind, "default": True, "data_files": files}],
    }  # fmt: skip
    return {name: value for name, value in found.items() if value}


def write_readme(directory: Path, kind: str, title: str, sources: list[Source], results: dict,
                 sections: list[str]) -> Path:  # fmt: skip
    """The dataset card: header, how to load it, and the card's sections without samples and paths."""
    text = yaml.safe_dump(header(kind, title, sources, results), allow_unicode=True, sort_keys=False)
    fields = [f"- `{name}`: {what}" + ("" if name == "text" else "; a list of turns of `role` and `content`")
              for name, what in FIELDS[kind].items()]  # fmt: skip
    lines = ["---", *text.splitlines(), "---", "", f"# {title}", "",
             "```python", "from datasets import load_dataset", "",
             'load_dataset("<where you put it>", split="train")', "```", "",
             *fields, "- `id`: stable, a hash of source and original content; `source`: the key below",
             "- `meta`: `lang` (zh, en, other, none), `chars`, `file` and `line` it was read from, `flags`, `repairs`",
             "", *sections]  # fmt: skip
    path = directory / f"{kind}_README.md"
    path.write_text(encodable("\n".join(lines)), encoding="utf-8")
    return path


# ------------------------------------------------------------------ Croissant

TERMS = """citeAs column equivalentProperty extract field fileObject fileProperty fileSet format includes isLiveDataset
    jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate separator source subField
    transform""".split()
CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/", "conformsTo": "dct:conformsTo", **{term: f"cr:{term}" for term in TERMS},
    "data": {"@id": "cr:data", "@type": "@json"}, "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
}  # fmt: skip
"""The context of the specification's appendix 1, as mlcroissant 1.1 expects it of a 1.0 file."""


def write_croissant(directory: Path, kind: str, title: str, sources: list[Source], results: dict) -> Path:
    """Croissant 1.0: the files with their hashes, and a record set for each side."""
    files = {side: directory / f"{kind}_{side}.jsonl" for side in SPLITS if results["splits"][side]}
    stated = licences(sources, results)
    today = datetime.now(UTC).date().isoformat()
    content = {
        "@context": CONTEXT, "@type": "sc:Dataset", "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"{kind}-{title.lower().replace(' ', '-')}",
        "description": f"{title}: {results['kept']} records, cleaned, freed of duplicates and split by posttrain's "
                       "prepare_data. Sources: " + ", ".join(source_of(source) for source in sources) + ".",
        "license": [LICENCES[name][1] if name in LICENCES else name for name in stated],
        "url": f"{kind}_README.md", "inLanguage": languages(results), "keywords": TAGS[kind], "version": "1.0.0",
        "creator": {"@type": "sc:Organization", "name": "not published yet: put your name here"},
        "datePublished": today, "dateCreated": today,
        "isBasedOn": [f"https://huggingface.co/datasets/{source.entry.hub}" for source in sources
                      if source.entry and source.entry.hub],
        "distribution": [file_object(path) for path in files.values()],
        "recordSet": [splits(files), *(record_set(kind, side, path) for side, path in files.items())],
    }  # fmt: skip
    path = directory / f"{kind}_croissant.json"
    write_json(path, {name: value for name, value in content.items() if value})
    return path


def source_of(source: Source) -> str:
    hub = source.entry and (source.entry.hub or source.entry.modelscope)
    return f"{source.key} ({hub})" if hub else source.key


def file_object(path: Path) -> dict[str, Any]:
    described = describe_file(path)
    return {"@type": "cr:FileObject", "@id": path.name, "name": path.name, "contentUrl": path.name,
            "contentSize": f"{described['bytes']} B", "encodingFormat": "application/jsonlines",
            "sha256": described["sha256"]}  # fmt: skip


def splits(files: dict[str, Path]) -> dict[str, Any]:
    """The enumeration of the sides."""
    fields = [{"@type": "cr:Field", "@id": "splits/name", "dataType": "sc:Text"},
              {"@type": "cr:Field", "@id": "splits/url", "dataType": ["sc:URL", "wd:Q3985153"]}]  # fmt: skip
    return {"@type": "cr:RecordSet", "@id": "splits", "name": "splits", "dataType": "cr:Split",
            "key": {"@id": "splits/name"}, "field": fields,
            "data": [{"splits/name": SPLITS[side], "splits/url": CROISSANT[side]} for side in files]}  # fmt: skip


def record_set(kind: str, side: str, path: Path) -> dict[str, Any]:
    """The records of one side: a field for each column, lists of turns as repeated fields with subfields."""
    name = SPLITS[side]

    def field(place: str, what: str, column: str, within: str = "", kind_of: str = "sc:Text") -> dict[str, Any]:
        source: dict[str, Any] = {"fileObject": {"@id": path.name}, "extract": {"column": column}}
        if within:
            source["transform"] = {"jsonPath": within}
        return {"@type": "cr:Field", "@id": f"{name}/{place}", "name": f"{name}/{place}", "description": what,
                "dataType": kind_of, "source": source}  # fmt: skip

    def turns(column: str, what: str) -> dict[str, Any]:
        parts = [field(f"{column}/{part}", says, column, f"$.{part}") for part, says in MESSAGES.items()]
        return {"@type": "cr:Field", "@id": f"{name}/{column}", "name": f"{name}/{column}", "description": what,
                "repeated": True, "subField": parts}  # fmt: skip

    fields = [field("id", "stable: a hash of source and original content", "id"),
              field("source", "key of the source", "source"),
              *(field(column, what, column) if column == "text" else turns(column, what)
                for column, what in FIELDS[kind].items()),
              field("lang", "zh, en, other or none", "meta", "$.lang"),
              field("chars", "characters", "meta", "$.chars", "sc:Integer")]  # fmt: skip
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "key": {"@id": f"{name}/id"},
            "description": f"{name} side", "field": fields}  # fmt: skip
