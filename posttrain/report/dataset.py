"""The report's section on data: from the manifests of prepare_data and the samples beside them."""

import json
from typing import Any

import yaml

from posttrain.report.figures import LANGUAGES, distributions
from posttrain.report.lineage import FoundRun

LABELS = {"sft": "对话", "pref": "偏好对", "text": "纯文本"}
UNITS = {"chars": "字符", "tokens": "token", "turns": "轮"}
DUPLICATES = ("exact_duplicate", "near_duplicate")
CHOSEN = ("quota", "post_limit")
# Colours of the drop reasons in the order of how many they are over the whole set; the rest is grey.
TONES = ("#2f6db5", "#d1622b", "#4a8c6a", "#8a63b0", "#c9a227", "#3a9aa8", "#b3475f", "#7a6a58")
REST = "#b9c4cf"
GLOSS = {
    "quota": "配比外", "post_limit": "同帖过多", "exact_duplicate": "完全重复", "near_duplicate": "近似重复",
    "repeated_answer": "回答雷同", "repeated_opening": "开头雷同", "contaminated": "含评测题", "too_short": "过短",
    "too_long": "过长", "other_language": "其他语言", "odd_symbols": "符号过多", "repetition": "自我重复",
    "mojibake": "乱码", "keywords": "敏感词", "blacklist": "黑名单", "pii": "个人信息", "refusal": "拒答套话",
    "answer_language": "回答语言不符", "vague_reference": "所指不在", "time_bound": "随时间而变",
    "self_contradiction": "自相矛盾", "ungrounded_number": "数字无出处", "empty_turn": "空话轮",
    "roles_out_of_order": "角色次序错", "last_turn_is_not_assistant": "不以回答结尾", "equal_scores": "分数相同",
    "lower_ranked_answer": "排名较低的回答", "question_without_answer": "无回答的提问",
    "chosen_equals_rejected": "两个回答相同", "differs_before_last_turn": "上文已不同", "not_json": "不是 JSON",
}  # fmt: skip
"""Reasons and rules in Chinese; others stand under their name alone."""
CONFLICTS = {
    "questions_with_different_answers": "个问题有不止一种回答",
    "pairs_preferred_both_ways": "对回答在两处以相反的次序被偏好",
}


def described(run: FoundRun) -> dict[str, Any]:
    """What the templates show of one set. A manifest of an older run lacks some of it, which is then left out."""
    results = run.manifest["results"]
    tones = {reason: TONES[place] if place < len(TONES) else REST for place, reason in enumerate(results["dropped"])}
    sources = [source_row(key, account, results, tones) for key, account in results["sources"].items()]
    return {
        "run": run, "results": results, "label": LABELS[results["kind"]], "units": UNITS, "tones": tones,
        "languages": [(name, n, LANGUAGES[name]) for name, n in results["languages"].items()],
        "figure": distributions(results.get("histograms", {})), "sources": sources, "samples": samples(run),
        "conflicts": {CONFLICTS.get(name, name): n for name, n in results.get("conflicts", {}).items() if n},
        "flagged": results.get("flagged", {}),
        "shares": shares(results), "gloss": GLOSS, "mix_rows": results.get("mix", {}).get("rows", []),
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


def licences(run: FoundRun) -> dict[str, dict[str, str]]:
    """Source -> hub id, licence and limits as the catalogue had them when the set was made."""
    catalogue = run.manifest.get("identity", {}).get("catalogue", {})
    own = {"hub": "", "licence": "自己的文件", "limits": ""}
    return {key: {name: (catalogue[key] or {}).get(name) or "–" for name in own} if catalogue.get(key) else own
            for key in run.manifest["results"]["sources"]}  # fmt: skip


def config_text(run: FoundRun) -> str:
    """The whole config, and the rules that single sources have of their own, as YAML."""
    config, rules = run.manifest["config"], run.manifest["results"].get("rules", {})
    parts = [config, *([{"rules of single sources": rules}] if rules else [])]
    return "\n".join(yaml.safe_dump(part, allow_unicode=True, sort_keys=False) for part in parts if part)


def shares(results: dict) -> list[tuple[str, float | None, float, float]]:
    """(name, asked, available, taken) of the shares of the mix that say something."""
    names = {"chinese": "中文", "multi_turn": "多轮", "replay": "回放"}
    found = [(names[name], share["asked"], share["available"], share["taken"])
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
