"""
Contamination: which items of a benchmark stand in the training data of the adapter under test, and the score without.

The search is the data stage's own (data/overlap.py); scripts/eval_harness.py hands it in. An adapter's training files
are those of its run and of the runs that it continues; a file that is gone or changed since is named, not passed over.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.config import in_project, shown
from posttrain.evals import answer_sets, harness
from posttrain.evals.answer_sets import Items
from posttrain.runs import read_json, sha256

Search = Callable[[dict[str, list[Any]], list[Path]], dict[str, set[int]]]
DATA = ("train:", "replay:")  # inputs of a training run that are its data


def training_files(manifest: dict[str, Any] | None) -> tuple[list[Path], list[str]]:
    """(files as they were trained on, notes on those that cannot be looked at), of a run and of those it continues."""
    if manifest is None:
        return [], ["it has no manifest, so its training data are not known"]
    files, notes = [], []
    while manifest is not None:
        for name, entry in manifest["inputs"].items():
            if name.startswith(DATA):
                path = in_project(Path(entry["path"]))
                if path.is_file() and sha256(path) == entry["sha256"]:
                    files.append(path)
                else:
                    notes.append(f"{shown(path)} {'has changed' if path.is_file() else 'is gone'} and was not searched")
        before = next((entry for role, entry in manifest["parents"].items() if not role.startswith("data")), None)
        base = manifest.get("base")  # of a run that goes on from a whole model: that model's run
        below = Path(before["path"]) if before else Path(base["path"]) / "manifest.json" if base else None
        manifest = read_json(in_project(below)) if below else None
    return list(dict.fromkeys(files)), notes


def benchmark_rows(output_dir: Path, model: str, leaves: list[str], answered: dict[str, Items]) -> dict[str, list[Any]]:
    """Task -> its items as rows of text, in the order in which they are scored: lm-eval's documents, as it sampled
    them, and the prompts of answer sets."""
    rows = {}
    for leaf in leaves:
        documents = {}
        with open(output_dir / "samples" / model / f"{leaf}.jsonl", encoding="utf-8") as lines:
            for sample in map(json.loads, lines):
                documents.setdefault(sample["doc_id"], sample["doc"])
        rows[leaf] = list(documents.values())
    for name, items in answered.items():
        rows[name] = [{"question": prompt[-1]["content"], "answer": right[0]}
                      for prompt, right in zip(items.prompts, items.references, strict=True)]  # fmt: skip
    return rows


def contamination(manifests: dict[str, dict | None], rows: dict[str, list[Any]], search: Search) -> dict[str, Any]:
    """{model: {"files", "notes", "items": {task: [places found]}}} of each adapter. One search per set of files."""
    searched: dict[tuple[Path, ...], dict[str, set[int]]] = {}
    result = {}
    for model, manifest in manifests.items():
        files, notes = training_files(manifest)
        if files and tuple(files) not in searched:
            searched[tuple(files)] = search(rows, files)
        found = searched.get(tuple(files), {})
        result[model] = {"files": [shown(file) for file in files], "notes": notes,
                         "items": {task: sorted(places) for task, places in found.items() if places}}  # fmt: skip
    return result


def add_clean_scores(table: list[dict], asked: dict[str, list[str]], scores: dict[str, dict[str, dict]],
                     answered: dict[str, Items], found: dict[str, Any]) -> None:  # fmt: skip
    """Beside each score of a contaminated task the one over its other items: {"clean": {"value", "n"}}; value is None
    where nothing is left, or where the score is no mean over items."""
    for row in table:
        leaves = asked.get(row["task"], [row["task"]])
        for model, score in row["scores"].items():
            places = found.get(model, {}).get("items", {})
            if not any(places.get(leaf) for leaf in leaves):
                continue
            values = []
            for leaf in leaves:
                own = _item_values(scores[model][leaf], answered.get(leaf), row["metric"])
                if own is None:
                    values = None
                    break
                bad = set(places.get(leaf, ()))
                values += [value for place, value in enumerate(own) if place not in bad]
            score["clean"] = {"value": sum(values) / len(values) if values else None,
                              "n": len(values) if values is not None else None}  # fmt: skip


def _item_values(score: dict[str, Any], items: Items | None, metric: str) -> list[float] | None:
    """The number of each item, or None for a metric that is no mean over items."""
    if items is not None and metric in score:  # BERTScore, measured apart
        return score[metric]
    if items is not None:
        return answer_sets.item_scores(items, [answer["text"] for answer in score["answers"]]).get(metric)
    return next((values for key, values in score["items"].items() if harness.metric_name(key) == metric), None)


def lines(table: list[dict], found: dict[str, Any]) -> list[str]:
    """For the page: what was searched, what was found, and the score without it."""
    said = []
    for model, facts in found.items():
        said += [f"contamination: {model}: {note}" for note in facts["notes"]]
        if facts["files"] and not facts["items"]:
            said.append(f"contamination: no item stands in {model}'s training data ({', '.join(facts['files'])})")
    for row in table:
        for model, score in row["scores"].items():
            if clean := score.get("clean"):
                without = "no score without them" if clean["value"] is None else \
                    f"{clean['value']:.4f} on the other {clean['n']}"  # fmt: skip
                said.append(f"contamination: items of {row['task']} stand in {model}'s training data: {row['metric']} "
                            f"{score['value']:.4f}, {without}")  # fmt: skip
    return said
