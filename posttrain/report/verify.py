"""`--verify`: every recorded file against its digest, and every recorded number against the files it came from.

Covered: losses and peak memory of trainings; records, languages, lengths, histograms, sources and reasons of the data
(recount.py); scores, intervals, differences, p-values, confusions and gates of evaluations; counts, speeds, latencies
and panels of comparisons; the drift of an export against its bound; and the page: it must be the one that these
manifests give. Curves are drawn from metrics.jsonl itself, whose digest is checked.

Not covered, because no file holds what they came from: seconds, parameters, steps and trained tokens of a training, its
forecast, the drifts of an export (both models would have to run again), repairs, conflicts and token counts of the
data, and the scores without contaminated items. Latencies are means of recorded times; nobody can measure those again.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain.config import in_project, shown
from posttrain.errors import CheckFailed
from posttrain.report.content import metrics
from posttrain.report.lineage import FoundRun, Lineage, manifest_of
from posttrain.report.recount import data
from posttrain.runs import sha256

Number = tuple[str, float, float | None]
Numbers = Callable[[Path, dict[str, Any]], Iterator[Number]]
LISTED = 60  # faults in a message
CLOSE = 1e-6  # relative: recorded numbers went through JSON, some through rounding to six digits


def verify(lineage: Lineage, of_stage: dict[str, Numbers], report: Path | None = None) -> list[str]:
    """A line per run: numbers recomputed, numbers that cannot be. CheckFailed with every file and number that drifted.

    of_stage: stage -> (directory, manifest) -> numbers; scripts/report.py brings those of evaluations.
    report: the directory of the page, or None.
    """
    faults, said = page(report, lineage) if report else ([], [])
    faults += [f"{check.run}: {check.path} ({check.role}) is {check.state}" for check in lineage.broken]
    for run in lineage.runs.values():
        numbers = of_stage.get(run.stage) or (training if run.stage.startswith("train_") else None)
        if run.stage in OF_STAGE:
            numbers = OF_STAGE[run.stage]
        if numbers is None:
            said.append(f"{run.name}: {run.stage} records no number that comes from its files")
            continue
        found: list[Number] = []
        try:
            found.extend(number for number in numbers(run.dir, run.manifest) if number[1] is not None)
        except (OSError, KeyError, ValueError, TypeError, ZeroDivisionError) as error:  # files gone, cut off or edited
            faults.append(f"{run.name}: its numbers cannot be recomputed ({type(error).__name__}: {error})")
        faults += [f"{run.name}: {name} is recorded as {before:g}, the files say {now:g}"
                   for name, before, now in found if now is not None and not _same(before, now)]  # fmt: skip
        unknown = sum(now is None for _, _, now in found)
        rest = f", {unknown} cannot be (no mean over items)" if unknown else ""
        said.append(f"{run.name}: {len(found) - unknown} numbers recomputed from its files{rest}")
    if faults:
        more = [f"... and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
        raise CheckFailed(f"{len(faults)} do not hold\n  " + "\n  ".join(faults[:LISTED] + more)
                          + "\n  run the stage again (overwrite=true), or restore the files")  # fmt: skip
    return said


def _same(before: float, now: float) -> bool:
    return math.isclose(before, now, rel_tol=CLOSE, abs_tol=CLOSE)


def training(directory: Path, manifest: dict[str, Any]) -> Iterator[Number]:
    """Losses and peak memory of a training run, from metrics.jsonl. The peak may lie after the last line: it is held to
    be no less than the largest one logged."""
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
    for name, peak in (manifest.get("peak_memory") or {}).items():
        logged = max((line[name] for line in lines if line.get(name) is not None), default=None)
        if logged is not None:
            yield f"peak {name}", peak, max(peak, logged)


def export(directory: Path, manifest: dict[str, Any]) -> Iterator[Number]:
    """The drifts of an export within the bounds that it recorded: where one is outside, the bound is what it should
    be."""
    results = manifest["results"]
    drifts = {"": results.get("merged_vs_adapter") or results.get("exported_vs_run"),
              "quantised: ": results.get("quantized_vs_merged"), "GGUF: ": results.get("gguf_vs_merged")}  # fmt: skip
    for (of, drift), key in zip(drifts.items(), ("bound", "bound_of_quantized", "bound_of_gguf"), strict=True):
        bound = results.get(key)
        if drift and bound:
            yield f"{of}mean logit difference", drift["mean_abs"], min(drift["mean_abs"], bound["mean_abs"])
            yield f"{of}same likeliest token", drift["top1"], max(drift["top1"], bound["top1"])


OF_STAGE: dict[str, Numbers] = {"prepare_data": data, "export_lora": export}


def page(directory: Path, lineage: Lineage) -> tuple[list[str], list[str]]:
    """(faults, notes) of the page in a report's directory: it must be made from the manifests as they are now, and not
    be changed since. The Markdown form is the student's to change: that is said, and no fault."""
    manifest = manifest_of(directory / "manifest.json")
    if manifest is None:
        return [], [f"{shown(directory)}: there is no report yet"]
    faults, notes = [], []
    recorded = {entry["path"]: entry["sha256"] for entry in manifest["inputs"].values()}
    for run in lineage.runs.values():
        if recorded.get(shown(run.file)) != sha256(run.file):
            faults.append(f"{shown(directory)}: made before {run.name} was as it is now; make the report again")
    for entry in manifest["outputs"]:
        path = in_project(Path(entry["path"]))
        if not path.is_file() or sha256(path) != entry["sha256"]:
            what = "is gone" if not path.is_file() else "was changed by hand"
            (notes if path.suffix == ".md" else faults).append(f"{entry['path']} {what}")
    return faults, notes or [f"{shown(directory)}: the page is the one that these manifests give"]
