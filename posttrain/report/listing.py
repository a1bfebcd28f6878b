"""`--runs`: every run under a directory with its knobs and results. `--diff A B`: what two runs differ in."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain.config import in_project, leaves, shown
from posttrain.errors import UserFault
from posttrain.report.content import knobs
from posttrain.report.lineage import FoundRun, search, state_of
from posttrain.report.render import knob
from posttrain.runs import read_json

KNOBS = {"learning rate": "lr", "beta": "beta", "LoRA r": "r", "epochs": "epochs", "steps": "steps", "rows": "rows"}


def list_runs(directory: Path) -> str:
    """A table of all runs under `directory`, the newest last. UserFault if there is none."""
    files = search(directory)
    if not files:
        raise UserFault(
            f"--runs: no run under {shown(directory)}; any stage makes one, e.g. python -m scripts.train_sft"
        )
    lines = [_line(file) for file in sorted(files, key=_time)]
    head = ["run", "stage", "state", *KNOBS.values(), "results", "age"]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *lines]
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def _status_file(file: Path) -> Path:
    return file.with_name(file.name.replace("manifest", "status"))


def _time(file: Path) -> str:
    """ISO time of the manifest, or of the last word of a run without one."""
    return (read_json(file) or {}).get("created") or (read_json(_status_file(file)) or {}).get("time") or ""


def _line(file: Path) -> list[str]:
    manifest, when = read_json(file), _time(file)
    name = FoundRun(file, manifest or {}).name
    if manifest is None:
        status = read_json(_status_file(file)) or {}
        return [name, status.get("stage", "?"), status.get("state", "damaged"), *[""] * len(KNOBS),
                " ".join(state_of(file.parent).split())[:60], age(when)]  # fmt: skip
    values = knobs(FoundRun(file, manifest)) if manifest["stage"].startswith("train_") else {}
    return [name, manifest["stage"], "done", *(knob(values[k]) if k in values else "" for k in KNOBS),
            results_of(manifest), age(when)]  # fmt: skip


def results_of(manifest: dict[str, Any]) -> str:
    """The numbers that one would compare runs by."""
    results, stage = manifest["results"], manifest["stage"]
    if stage == "prepare_data":
        return f"kept {results['kept']} of {results['read']}; train {results['splits']['train']}"
    if stage == "eval_harness":
        scores = [
            f"{t['task']} " + "/".join(f"{t['scores'][m]['value']:.3f}" for m in results["models"])
            for t in results["tasks"]
        ]
        pref = results.get("pref_test")
        scores += ["pref " + "/".join(f"{pref['accuracy'][m]:.3f}" for m in results["models"])] if pref else []
        return "; ".join(scores)
    if stage == "infer_compare":
        groups = results["groups"].items()
        return "; ".join(f"{g} " + "/".join(str(counts[m]["exact"]) for m in results["models"]) for g, counts in groups)
    if stage == "export_lora":
        drift = results.get("merged_vs_adapter") or results["exported_vs_run"]
        return f"{results['mode']}; top-1 {drift['top1']:.3f}, mean logit difference {drift['mean_abs']:.2g}"
    wanted = {"best_eval_loss": "val loss", "last_loss": "loss", "loss": "loss", "eval_rewards/accuracies": "pref acc",
              "eval_rewards/margins": "margin"}  # fmt: skip
    return ", ".join(f"{word} {results[key]:.4g}" for key, word in wanted.items() if results.get(key) is not None)


def age(when: str) -> str:
    """How long ago an ISO time was: 40 s, 12 min, 5 h, 3 d."""
    if not when:
        return ""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def diff(first: str, second: str) -> str:
    """The config keys, inputs and hardware in which two runs differ. UserFault if one is not there."""
    sides = [_comparable(name) for name in (first, second)]
    keys = sorted(key for key in sides[0].keys() | sides[1].keys() if sides[0].get(key) != sides[1].get(key))
    if not keys:
        return f"{first} and {second}: same config, same inputs, same hardware file"
    width = max(map(len, keys))
    cells = [[knob(side[key]) if key in side else "-" for side in sides] for key in keys]
    wide = max(len(row[0]) for row in [*cells, [first]])
    return "\n".join(
        [
            f"{'':<{width}}  {first:<{wide}}  {second}",
            *(f"{key:<{width}}  {a:<{wide}}  {b}" for key, (a, b) in zip(keys, cells, strict=True)),
        ]
    )


def _comparable(name: str) -> dict[str, Any]:
    """Flat config of a run, digests of its inputs, hardware and what it trained on, by key."""
    path = in_project(Path(name))
    file = path if path.suffix == ".json" else path / "manifest.json"
    manifest = read_json(file)
    if manifest is None:
        raise UserFault(
            f"--diff {name}: no finished run there ({state_of(path)})\n  list them: python -m scripts.report --runs"
        )
    flat = {key: value for key, value in leaves(manifest["config"]).items() if key not in ("output_dir", "overwrite")}
    flat = {
        key: shown(value) if isinstance(value, str) and value.startswith("/") else value for key, value in flat.items()
    }
    inputs = {
        f"input {role}": (e.get("sha256") or e.get("fingerprint") or "?")[:12] for role, e in manifest["inputs"].items()
    }
    return {**flat, **inputs, "hardware": manifest["hardware"].get("name"), "stage": manifest["stage"],
            "commit": (manifest["git"]["commit"] or "none")[:10]}  # fmt: skip
