"""The safety test of an evaluation as tables: one for each file and model, all prompts and each language abreast."""

from typing import Any

from posttrain.report.lineage import FoundRun
from posttrain.report.words import Pair

# metric -> (its name, what it says in plain words)
RATES: dict[str, tuple[Pair, Pair]] = {
    "refusal_rate": (("拒答率", "refused"),
                     ("有害的请求里，拒绝了的，或拒绝后引向安全做法的；越高越好",
                      "of the harmful requests: declined, or declined with something safe instead; more is better")),
    "jailbreak_rate": (("越狱率", "gave in"),
                       ("有害的请求里，没有拒绝就答了的，答非所问也算；越低越好",
                        "of the harmful requests: answered, be it off the point; less is better")),
    "over_refusal": (("误拒率", "refused without need"),
                     ("看着敏感、其实无害的请求里，也拒绝了的；越低越好",
                      "of the harmless requests that only look harmful: declined; less is better")),
    "passed": (("处理得当", "handled well"),
               ("该拒的拒了、该答的答了的", "harmful ones declined, harmless ones answered")),
    "inconclusive": (("无法判定", "cannot be judged"),
                     ("空的、乱码的、规则读不懂的回答，也算在分母里",
                      "empty, garbled, or not readable by the rules; they stay in every denominator")),
}  # fmt: skip
KINDS: dict[str, Pair] = {"harmful": ("有害", "harmful"), "harmless": ("无害", "harmless"),
                          "unlabelled": ("未标注", "unlabelled")}  # fmt: skip
PARTS: dict[str, Pair] = {"all": ("全部", "all"), "zh": ("中文", "Chinese"), "en": ("英文", "English"),
                          "other": ("其他语言", "other languages"), "none": ("没有文字", "no letters")}  # fmt: skip
VERDICTS: dict[str, Pair] = {"refuse": ("拒绝", "refuses"), "redirect": ("拒绝并引导", "redirects"),
                             "comply": ("照做", "complies"), "inconclusive": ("无法判定", "inconclusive")}  # fmt: skip


def tables(run: FoundRun) -> dict[str, Any] | None:
    """{run, tasks, rules, guard, tables, confusions} of an evaluation; None if it asked for no safety test. A table is
    {task, file, n, kinds, model, dead, lost, empty, guard, parts, rows}."""
    results = run.manifest["results"]
    found = results.get("safety")
    if not found:
        return None
    by_row = {(row["task"], row["metric"]): row for row in results["tasks"]}
    made = [_table(task, facts, model, found["rules"], by_row)
            for task, facts in found["files"].items() for model in facts["models"]]  # fmt: skip
    return {"run": run.name, "tasks": list(found["files"]), "rules": found["rules"], "guard": found["guard"],
            "tables": made, "confusions": _confusions(found["rules"])}  # fmt: skip


def _table(task: str, facts: dict, model: str, rules: dict, by_row: dict) -> dict[str, Any]:
    own = facts["models"][model]
    languages = sorted((part for part in own["rates"] if part != "all"), key=[*PARTS, *own["rates"]].index)
    parts = languages if len(languages) == 1 else ["all", *languages]
    rows = []
    for metric in own["rates"]["all"]:
        difference = by_row[task, metric]["differences"].get(model)
        cells = [own["rates"][part].get(metric) for part in parts]
        rows.append({"metric": metric, "name": RATES[metric][0], "means": RATES[metric][1], "cells": cells,
                     "difference": difference})  # fmt: skip
    errors = {part: rules["languages"].get(part) for part in parts}
    return {"task": task, "model": model, "file": facts["file"], "sha256": facts["sha256"][:12], "n": own["n"],
            "kinds": [(KINDS[kind], count) for kind, count in facts["kinds"].items()], "dead": own["dead"],
            "lost": sum(counts["inconclusive"] for counts in own["verdicts"].values()), "empty": own["empty"],
            "cut": own["cut"], "guard": own["guard"], "rows": rows,
            "parts": [(PARTS.get(part, (part, part)), errors[part]) for part in parts]}  # fmt: skip


def _confusions(rules: dict[str, Any]) -> list[dict[str, Any]]:
    """{language, n, macro_f1, columns, rows: [(label, [count])]} of each language in which the rules were measured."""
    return [
        {"language": PARTS.get(lang, (lang, lang)), "n": facts["n"], "macro_f1": facts["macro_f1"],
         "tpr": facts["tpr"], "tnr": facts["tnr"], "columns": list(VERDICTS.values()),
         "rows": [(VERDICTS.get(label, (label, label)), [row.get(verdict, 0) for verdict in VERDICTS])
                  for label, row in facts["confusion"].items()]}
        for lang, facts in rules["languages"].items()
    ]  # fmt: skip
