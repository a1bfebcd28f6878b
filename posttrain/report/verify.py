"""`--verify`: every recorded file against its digest, and every recorded number against the files it came from."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain.config import in_project
from posttrain.errors import CheckFailed
from posttrain.records import count_lines
from posttrain.report.content import metrics
from posttrain.report.lineage import FoundRun, Lineage

Number = tuple[str, float, float | None]
Numbers = Callable[[Path, dict[str, Any]], Iterator[Number]]
CLOSE = 1e-6  # relative: recorded numbers went through JSON, some through rounding to six digits


def verify(lineage: Lineage, of_stage: dict[str, Numbers]) -> list[str]:
    """A line per run: numbers recomputed, numbers that cannot be. CheckFailed with every file and number that drifted.

    of_stage: stage -> (directory, manifest) -> numbers; scripts/report.py brings those of evaluations.
    """
    said = []
    faults = [f"{check.run}: {check.path} ({check.role}) is {check.state}" for check in lineage.broken]
    for run in lineage.runs.values():
        numbers = of_stage.get(run.stage) or (training if run.stage.startswith("train_") else None)
        if run.stage == "prepare_data":
            numbers = data
        if numbers is None:
            said.append(f"{run.name}: {run.stage} records no number that comes from its files")
            continue
        try:
            found = list(numbers(run.dir, run.manifest))
        except (OSError, KeyError, ValueError, TypeError) as error:  # files that are gone, cut off or edited
            faults.append(f"{run.name}: its numbers cannot be recomputed ({type(error).__name__}: {error})")
            continue
        faults += [f"{run.name}: {name} is recorded as {before:g}, the files say {now:g}"
                   for name, before, now in found if now is not None and not _same(before, now)]  # fmt: skip
        unknown = sum(now is None for _, _, now in found)
        rest = f", {unknown} cannot be (no mean over items)" if unknown else ""
        said.append(f"{run.name}: {len(found) - unknown} numbers recomputed from its files{rest}")
    if faults:
        raise CheckFailed(f"{len(faults)} do not hold\n  " + "\n  ".join(faults)
                          + "\n  run the stage again (overwrite=true), or restore the files")  # fmt: skip
    return said


def _same(before: float, now: float) -> bool:
    return math.isclose(before, now, rel_tol=CLOSE, abs_tol=CLOSE)


def training(directory: Path, manifest: dict[str, Any]) -> Iterator[Number]:
    """Losses and steps of a training run, from metrics.jsonl."""
    lines, results = metrics(FoundRun(directory / "manifest.json", manifest)), manifest["results"]
    losses = [line["loss"] for line in lines if "loss" in line]
    evals = {line["step"]: line for line in lines if "eval_loss" in line}
    of_kept = evals.get(results.get("kept_step"), {})
    again = {
        "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
        "best_eval_loss": min((line["eval_loss"] for line in evals.values()), default=None),
        **{key: value for key, value in of_kept.items() if key.startswith("eval_rewards")},
    }  # fmt: skip
    for name, value in again.items():
        if value is not None and results.get(name) is not None:
            yield name, results[name], value


def data(directory: Path, manifest: dict[str, Any]) -> Iterator[Number]:
    """Records of each split, from the lines of its file, and the ledger of each source."""
    results, kind = manifest["results"], manifest["results"]["kind"]
    for split, count in results["splits"].items():
        path = directory / f"{kind}_{split}.jsonl"
        yield f"{split} records", count, count_lines(path) if path.is_file() else 0
    dropped = next((in_project(Path(e["path"])) for e in manifest["outputs"] if "_dropped." in e["path"]), None)
    if dropped and dropped.is_file():
        yield "dropped records", results["read"] - results["kept"], _lines_in_zst(dropped)
    for source, ledger in results["sources"].items():
        yield f"{source}: kept", ledger["kept"], ledger["read"] - sum(ledger["dropped"].values())


def _lines_in_zst(path: Path) -> int:
    import io

    import zstandard

    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as reader:
        return sum(1 for line in io.TextIOWrapper(reader, encoding="utf-8") if json.loads(line))
