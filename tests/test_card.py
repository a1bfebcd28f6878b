"""The data card, what is published, and the report's section on data: every number and every file in them is real."""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import run_command, write_rows

from posttrain.data import card, measures, published, telling
from posttrain.data.catalogue import Entry, Source
from posttrain.data.columns import COLUMNS
from posttrain.data_blocks import Rules
from posttrain.report import dataset, figures, lineage, render
from posttrain.runs import read_json
from posttrain.stages import Report

EVIL = "</details> ``` | <script>alert(1)</script>"


def source(key: str, licence: str | None = None, hub: str | None = None) -> Source:
    entry = Entry(kind="sft", licence=licence, hub=hub) if licence else None
    return Source(key, entry, 1.0, Path(key), [], Rules())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two sources of conversations with one fault each, and pairs, through the real command."""
    place = tmp_path_factory.mktemp("card")
    rows = [{"instruction": f"第{i}个问题是什么意思，请说一说？", "output": f"第{i}个的意思是{i}加{i * 7}。"}
            for i in range(120)]
    rows += [rows[0], {"instruction": "短", "output": "好"}, {"instruction": f"{EVIL}空", "output": ""},
             {"instruction": f"{EVIL}第零个", "output": "抱歉，我无法回答这个问题。" + "长" * 5000}]  # fmt: skip
    write_rows(place / "raw/我的/a.jsonl", rows)
    write_rows(place / "raw/english/b.jsonl", [
        {"instruction": f"What is the number {i} good for, {EVIL}?", "output": f"It is good for counting to {i}."}
        for i in range(60)
    ])  # fmt: skip
    write_rows(place / "raw/pairs/c.jsonl", [
        {"question": f"{i}加一等于几呢？", "response_chosen": f"等于{i + 1}。", "response_rejected": "不知道。"}
        for i in range(50)
    ])  # fmt: skip
    catalogue = {"english": {"kind": "sft", "licence": "MIT", "hub": "some/english", "rules": {"max_chars": 900}}}
    (place / "sets.yaml").write_text(yaml.safe_dump(catalogue), encoding="utf-8")
    config = {
        "raw_dir": f"{place}/raw", "output_dir": f"{place}/proc", "hub": "none", "workers": 1, "max_bad_rows": 0.05,
        "catalogue": f"{place}/sets.yaml", "sft": {"mix": {"我的": 1, "english": 1}, "max_samples": 100},
        "pref": {"mix": {"pairs": 1}},
    }  # fmt: skip
    (place / "data.yaml").write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")
    done = run_command("-m", "scripts.prepare_data", "--config", f"{place}/data.yaml")
    assert done.returncode == 0, done.stderr
    return place / "proc"


def results(built: Path, kind: str) -> dict:
    return read_json(built / f"{kind}_manifest.json")["results"]


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table of a card, as rows of cells without the line below the head."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(cells(line))
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


# ------------------------------------------------------------------ the Markdown card


def test_every_count_of_the_manifest_stands_in_the_card(built):
    its, text = results(built, "sft"), (built / "sft_card.md").read_text(encoding="utf-8")
    found = tables(text)
    assert all(len(row) == len(table[0]) for table in found for row in table), "a table whose rows differ in length"
    by_head = {tuple(table[0][:2]): table[1:] for table in found}
    dropped = {row[0].strip("`"): [int(n.replace(",", "")) for n in row[1:]] for row in by_head["reason", "`我的`"]}
    assert dropped == {reason: [*(its["sources"][key]["dropped"].get(reason, 0) for key in its["sources"]), total]
                       for reason, total in its["dropped"].items()}  # fmt: skip
    assert {"too_short", "too_long", "exact_duplicate", "empty_turn", "quota"} <= set(dropped)
    for reason in dropped:
        assert re.search(rf"^- .*`{reason}`.*: .{{20}}", text, re.M), f"what {reason} means is not said"
    steps = {row[0].strip("`"): [int(n.replace(",", "")) for n in row[1:7]] for row in by_head["source", "rows"]}
    for key, account in its["sources"].items():
        rows, read, usable, clean, different, kept = steps[key]
        assert (rows, read, kept) == (account["rows"], account["read"], account["kept"])
        assert read >= usable >= clean >= different >= kept and clean == account["available"]
    assert steps["all"][5] == its["kept"] == 100
    assert steps["我的"] == [124, 124, 123, 121, 120, its["sources"]["我的"]["kept"]]


def test_licences_config_rules_and_hashes_are_in_the_card(built):
    text = (built / "sft_card.md").read_text(encoding="utf-8")
    assert "| `english` | some/english | MIT |" in text and "your own files" in text
    config, own = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S))
    manifest = read_json(built / "sft_manifest.json")
    assert config == manifest["config"] and own == {"english": {"max_chars": 900}} == manifest["results"]["rules"]
    for file in ("我的/a.jsonl", "english/b.jsonl"):
        digest = hashlib.sha256((built.parent / "raw" / file).read_bytes()).hexdigest()
        assert f"| `{file}` | `{digest}` |" in text


def test_samples_cannot_break_out(built):
    """What records hold stands in indented blocks and code spans, where Markdown and HTML leave it alone."""
    text = (built / "sft_card.md").read_text(encoding="utf-8")
    assert text.count("<details>") == len(re.findall("^</details>", text, re.M))
    evil = [line for line in text.splitlines() if "<script>" in re.sub("^`.*?`$", "", line)]
    assert evil and all(line.startswith("    ") for line in evil)
    assert "kept (3)" in text and "dropped: too_short (1)" in text


def test_half_a_character_in_a_sample_is_written_as_its_escape():
    some = [{"source": "a", "place": "x:1", "detail": "\ud83d", "record": telling.readable({"instruction": "\ud83d"})}]
    samples = SimpleNamespace(kept=[], flagged={}, dropped={"empty_turn": some})
    for text in ("\n".join(card.samples_section(samples)), json.dumps(card.gathered(samples), ensure_ascii=False)):
        assert "\\ud83d" in text and text.encode()


# ------------------------------------------------------------------ numbers


def columns(rows: list[tuple[int, int, int, int]]) -> np.ndarray:
    """(source, lang, chars, turns) as the pipeline has them."""
    made = np.zeros(len(rows), COLUMNS)
    for number, name in enumerate(("source", "lang", "chars", "turns")):
        made[name] = [row[number] for row in rows]
    return made


def test_histograms_count_every_record_once_in_its_bin():
    rows = [(0, 1, 8, 1), (0, 1, 11, 1), (0, 2, 12, 3), (1, 1, 5_000_000, 40), (1, 3, 16, 0)]
    found = measures.histograms(columns(rows), tokens=False)
    assert set(found) == {"chars", "turns"}
    chars = found["chars"]
    assert chars["edges"][:3] == [8, 12, 16] and chars["edges"][-1] == max(measures.EDGES)
    assert chars["counts"]["zh"][0] == 2 and chars["counts"]["en"][1] == 1 and chars["counts"]["zh"][-1] == 1
    for histogram in found.values():
        assert sum(map(sum, histogram["counts"].values())) == len(rows)
        assert all(len(counts) == len(histogram["edges"]) for counts in histogram["counts"].values())
    assert found["turns"]["edges"][0] == 0 and found["turns"]["counts"]["zh"][-1] == 1, "40 turns: in the last bin"
    by_source = measures.by_source(columns(rows), [source("a"), source("b"), source("c")])
    assert by_source["a"] == {"records": 3, "languages": {"zh": 2, "en": 1}, "chars": {"p50": 11, "p95": 12},
                              "multi_turn": 0.3333}  # fmt: skip
    assert by_source["c"]["records"] == 0 and measures.histograms(columns([]), True)["tokens"]["edges"] == []
    bars = card.bars(found["chars"])
    assert bars[1].split()[0] == "8-11" and bars[1].split()[-1] == "2"


def test_the_bounds_of_a_rule_are_those_that_stand_after_it():
    rules = Rules(max_chars=99)
    assert telling.bounds_of("too_long", rules, 0.5) == {
        "rules.too_long": "drop", "rules.max_chars": 99, "rules.max_tokens": None}  # fmt: skip
    assert telling.bounds_of("contaminated", rules, 0.7)["decontaminate.min_coverage"] == 0.7
    assert telling.bounds_of("mojibake", rules, 0.5) == {"rules.mojibake": "flag"}
    bounds = set(Rules.model_fields) - set(telling.ACTIONS)
    told = {name.removeprefix("rules.") for reason in telling.ACTIONS for name in telling.bounds_of(reason, rules, 0.5)}
    assert bounds <= told, "a bound that no rule tells"


# ------------------------------------------------------------------ published


@pytest.mark.parametrize("stated, expected", [
    (["MIT", "MIT (unchecked)"], {"license": "mit"}),
    (["MIT", "CC BY-NC 4.0"], {"license": "other", "license_name": "several", "license_details": "MIT; CC BY-NC 4.0"}),
    (["free for research"], {"license": "other", "license_name": "several", "license_details": "free for research"}),
])  # fmt: skip
def test_licences_of_a_mix(stated, expected):
    sources = [source(str(n), text) for n, text in enumerate([*stated, "GPL-3.0"])]
    counts = {**{str(n): {"kept": 5} for n in range(len(stated))}, str(len(stated)): {"kept": 0}}  # the last gave none
    found = published.header("sft", "x", sources, {"kept": 10, "languages": {"zh": 10}, "sources": counts,
                                                   "splits": {"train": 8, "val": 2, "test": 0}})  # fmt: skip
    assert {name: value for name, value in found.items() if name.startswith("license")} == expected
    assert [entry["split"] for entry in found["configs"][0]["data_files"]] == ["train", "validation"]


def test_size_categories():
    sizes = {999: "n<1K", 1000: "1K<n<10K", 9_999: "1K<n<10K", 60_000: "10K<n<100K", 10**11: "100B<n<1T",
             10**12: "n>1T"}  # fmt: skip
    assert {n: published.size_category(n) for n in sizes} == sizes


@pytest.mark.parametrize("kind", ["sft", "pref"])
def test_the_dataset_card_loads_with_datasets(built, tmp_path, kind):
    """As on the hub: README.md beside the files says which file is which side."""
    import datasets

    for file in built.glob(f"{kind}_*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (built / f"{kind}_README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["language"][0] == "zh" and header["license"] == "other" and header["size_categories"] == ["n<1K"]
    loaded = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    splits = results(built, kind)["splits"]
    assert {name: len(rows) for name, rows in loaded.items()} == {
        published.SPLITS[side]: count for side, count in splits.items()}  # fmt: skip
    assert str(built) not in text and "<script>" not in text, "no path of this machine, no record"


@pytest.mark.parametrize("kind", ["sft", "pref"])
def test_croissant_describes_the_files_that_are_there(built, kind):
    """The specification's required properties, hashes, unique ids, references that lead somewhere, columns that exist.
    (mlcroissant 1.1.1 reads every record of what this writes; it is not among the requirements.)"""
    found = read_json(built / f"{kind}_croissant.json")
    required = {"@context", "@type", "conformsTo", "name", "description", "license", "url", "creator", "datePublished",
                "distribution", "recordSet"}  # fmt: skip
    assert required <= set(found) and found["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    files = {entry["@id"]: entry for entry in found["distribution"]}
    for name, entry in files.items():
        data = (built / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["contentSize"] == f"{len(data)} B"
    tops = [field for records in found["recordSet"] for field in records["field"]]
    fields = [field for top in tops for field in top.get("subField", [top])]
    ids = [field["@id"] for field in fields] + list(files) + [records["@id"] for records in found["recordSet"]]
    assert len(ids) == len(set(ids)) and len(files) == 3
    record = json.loads((built / f"{kind}_train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    for field in fields:
        if at := field.get("source"):
            value = record[at["extract"]["column"]]
            assert at["fileObject"]["@id"] in files
            if within := at.get("transform", {}).get("jsonPath"):
                value = value[0] if isinstance(value, list) else value
                assert within.removeprefix("$.") in value
    used = {key for part in (found, *found["recordSet"], *fields) for key in part if not key.startswith("@")}
    ours = {key for key in used if key in ("recordSet", "field", "source", "dataType", "repeated", "subField", "key")}
    assert ours <= set(found["@context"]), "a term of Croissant without its name in the context"


# ------------------------------------------------------------------ the report


def page(built: Path, folder: Path) -> tuple[str, str]:
    found = lineage.Lineage()
    for kind in ("sft", "pref"):
        file = built / f"{kind}_manifest.json"
        found.runs[file] = lineage.FoundRun(file, read_json(file))
    html, markdown, *_ = render.render(found, Report(output_dir=folder, markdown=folder / "report.md"))
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


def test_the_report_shows_the_set(built, tmp_path):
    html, markdown = page(built, tmp_path)
    its = results(built, "sft")
    for reason, count in its["dropped"].items():
        assert re.search(rf"<code>{reason}</code> {count:,}<", html), reason
        assert f"{reason.replace('_', chr(92) + '_')} {its['sources']['我的']['dropped'].get(reason, '')}" in markdown
    for file in read_json(built / "sft_manifest.json")["inputs"].values():
        assert file["sha256"] in html
    assert "some/english" in html and "| english | some/english | MIT |" in markdown and "max_samples: 100" in html
    assert len(re.findall('alt="[^"]+的分布"', html)) == 2 and "舍弃的，" in html and "&lt;script&gt;" in html
    assert "<script" not in html, "what records hold is escaped"


def test_the_bars_of_a_source_fill_their_width():
    account = {"rows": 9, "read": 9, "kept": 2, "dropped": {"quota": 4, "too_long": 2, "exact_duplicate": 1}}
    row = dataset.source_row("a", account, {}, dict.fromkeys(account["dropped"], "#000"))
    assert sum(width for _, _, width, _ in row["bar"]) == pytest.approx(100)
    assert (row["rules"], row["duplicates"], row["chosen"]) == (2, 1, 4)


def test_distributions_are_drawn_for_what_is_there():
    assert figures.distributions({}) is None
    assert figures.distributions({"histograms": {"chars": {"edges": [], "counts": {}}}}) is None
    some = {"edges": [1, 2, 3], "counts": {"zh": [1, 2, 3], "en": [0, 1, 0]}}
    picture, abreast = figures.distributions({"histograms": {"chars": some, "turns": some}})
    assert abreast == 2 and "<svg" in picture and ">records by chars</text>" in picture
    dropped = {f"r{i}": 9 - i for i in range(9)}
    bars = {"languages": {"zh": 6, "en": 1}, "sources": {"a": {"kept": 7}}, "dropped": dropped}
    picture, abreast = figures.distributions(bars, lambda name: {"dropped by reason": "舍弃的原因"}.get(name, name))
    assert abreast == 3 and ">舍弃的原因</text>" in picture and ">others</text>" in picture
