"""The report's section on data: from the manifests of prepare_data and the samples beside them."""

import json
from typing import Any

import yaml

from posttrain.report.figures import LANGUAGES, Say, distributions
from posttrain.report.lineage import FoundRun

UNITS = ("chars", "tokens", "turns")
DUPLICATES = ("exact_duplicate", "near_duplicate")
CHOSEN = ("quota", "post_limit")
# Colours of the drop reasons in the order of how many they are over the whole set; the rest is grey.
TONES = ("#2f6db5", "#d1622b", "#4a8c6a", "#8a63b0", "#c9a227", "#3a9aa8", "#b3475f", "#7a6a58")
REST = "#b9c4cf"


def described(run: FoundRun, say: Say) -> dict[str, Any]:
    """What the templates show of one set. A manifest of an older run lacks some of it, which is then left out. `say`
    gives the words of the pictures."""
    results = run.manifest["results"]
    tones = {reason: TONES[place] if place < len(TONES) else REST for place, reason in enumerate(results["dropped"])}
    sources = [source_row(key, account, results, tones) for key, account in results["sources"].items()]
    return {
        "run": run, "results": results, "units": [unit for unit in UNITS if results.get(unit)], "tones": tones,
        "languages": [(name, n, LANGUAGES[name]) for name, n in results["languages"].items()],
        "figure": distributions(results, say), "sources": sources, "samples": samples(run),
        "conflicts": {name: n for name, n in results.get("conflicts", {}).items() if n},
        "flagged": results.get("flagged", {}),
        "shares": shares(results), "mix_rows": results.get("mix", {}).get("rows", []),
        "licences": licences(run), "config": config_text(run), "inputs": run.manifest["inputs"],
    }  # fmt: skip


def source_row(key: str, account: dict, results: dict, tones: dict[str, str]) -> dict[str, Any]:
    """One source: its counts, its drop reasons as parts of a bar, languages and lengths of what it gave."""
    dropped = account["dropped"]
    total = sum(dropped.values())
    bar = [(reason, count, 100 * count / total, tones[reason]) for reason, count in dropped.items()] if total else []
    copies, chosen = (sum(dropped.get(reason, 0) for reason in some) for some in (DUPLICATES, CHOSEN))
    its = results.get("by_source", {}).get(key, {})
    chars = its.get("chars", {})
    return {
        "key": key, "rows": account["rows"], "read": account["read"], "kept": account["kept"], "dropped": total,
        "bar": bar, "rules": total - copies - chosen, "duplicates": copies, "chosen": chosen,
        "flagged": account.get("flagged", {}), "repairs": account.get("repairs", {}),
        "chinese": its["languages"].get("zh", 0) / its["records"] if its.get("records") else None,
        "median": chars.get("p50"), "multi_turn": its.get("multi_turn"),
    }  # fmt: skip


def licences(run: FoundRun) -> dict[str, dict[str, str | None] | None]:
    """Source -> hub id, licence and limits as the catalogue had them when the set was made; None for own files."""
    catalogue = run.manifest.get("identity", {}).get("catalogue", {})
    names = ("hub", "licence", "limits")
    return {key: {name: catalogue[key].get(name) for name in names} if catalogue.get(key) else None
            for key in run.manifest["results"]["sources"]}  # fmt: skip


def config_text(run: FoundRun) -> str:
    """The whole config, and the rules that single sources have of their own, as YAML."""
    config, rules = run.manifest["config"], run.manifest["results"].get("rules", {})
    parts = [config, *([{"rules of single sources": rules}] if rules else [])]
    return "\n".join(yaml.safe_dump(part, allow_unicode=True, sort_keys=False) for part in parts if part)


def shares(results: dict) -> list[tuple[str, float | None, float, float]]:
    """(name, asked, available, taken) of the shares of the mix that say something."""
    found = [(name, share["asked"], share["available"], share["taken"])
             for name, share in results.get("mix", {}).get("shares", {}).items()]  # fmt: skip
    return [share for share in found if (share[1] or share[3]) and share[3] is not None]


def samples(run: FoundRun) -> dict[str, list[tuple[str, list[dict]]]]:
    """kept, flagged and dropped -> [(reason, samples)]; {} where the file is gone."""
    file = run.file.with_name(run.file.name.replace("manifest", "samples"))
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return {"kept": [("", found["kept"])] if found["kept"] else [], "flagged": list(found["flagged"].items()),
            "dropped": list(found["dropped"].items())}  # fmt: skip
