"""Gates: bounds that every adapter must keep, each held against a number with the signature it was set for."""

from typing import Any

from posttrain.errors import CheckFailed, UserFault
from posttrain.evals.answer_sets import METRICS
from posttrain.evals.generation import signature
from posttrain.plan import Plan
from posttrain.stages import EvalHarness

HELD_OUT = {"sft_test/loss": ("sft_test", "loss"), "pref_test/accuracy": ("pref_test", "accuracy"),
            "pref_test/margin": ("pref_test", "margin")}  # fmt: skip


def plan_gates(plan: Plan, cfg: EvalHarness) -> None:
    """Faults for gates whose task or metric this config does not measure, before anything is measured."""
    here = {*cfg.tasks, *cfg.answer_sets, *(role for role in ("sft_test", "pref_test") if getattr(cfg, role))}
    for name, gate in cfg.gates.items():
        task, _, metric = name.partition("/")
        if task not in here or not metric:
            plan.faults.append(f"gates.{name}: write task/metric; the tasks here: {', '.join(sorted(here))}")
            continue
        known = METRICS[cfg.answer_sets[task].kind] if task in cfg.answer_sets else \
            [key.partition("/")[2] for key in HELD_OUT if key.startswith(f"{task}/")]  # fmt: skip
        if known and metric not in known:
            plan.faults.append(f"gates.{name}: no such metric of {task}; choose from {', '.join(known)}")
        elif gate.signature and task in cfg.answer_sets and gate.signature != signature(metric):
            plan.faults.append(f"gates.{name}: the bound was set for {gate.signature}\n    the number here is "
                               f"{signature(metric)}: set the bound anew for it")  # fmt: skip


def judged(cfg: EvalHarness, results: dict[str, Any]) -> list[dict[str, Any]]:
    """[{gate, min, max, models: {adapter: {value, passed}}}], a row per gate of the config.

    UserFault for a gate that names no number here, or one with another signature than it was set for.
    """
    numbers, faults, rows = _numbers(results), [], []
    adapters = results["models"][1 if cfg.include_base else 0 :]
    for name, gate in cfg.gates.items():
        if name not in numbers:
            faults.append(f"gates.{name}: no such number\n    choose from: {', '.join(numbers)}")
            continue
        values, made_with = numbers[name]
        if gate.signature and gate.signature != made_with:
            faults.append(f"gates.{name}: the bound was set for {gate.signature}\n    the number here is {made_with}: "
                          "set the bound anew for it")  # fmt: skip
            continue
        models = {model: {"value": values[model], "passed": _keeps(values[model], gate)} for model in adapters}
        rows.append({"gate": name, "min": gate.min, "max": gate.max, "signature": made_with, "models": models})
    if faults:
        raise UserFault("\n".join(faults))
    return rows


def _keeps(value: float, gate) -> bool:
    return (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)


def _numbers(results: dict[str, Any]) -> dict[str, tuple[dict[str, float], str]]:
    """task/metric -> ({model: value}, signature)."""
    numbers = {}
    for row in results["tasks"]:
        values = {model: score["value"] for model, score in row["scores"].items()}
        numbers[f"{row['task']}/{row['metric']}"] = values, row.get("signature", "lm-eval")
    for name, (role, kind) in HELD_OUT.items():
        if results.get(role):
            numbers[name] = results[role][kind], "posttrain|answer tokens"
    return numbers


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A pass or fail line per gate and adapter."""
    said = []
    for row in rows:
        bound = " and ".join(f"{sign} {row[key]:g}" for key, sign in (("min", ">="), ("max", "<="))
                             if row[key] is not None)  # fmt: skip
        for model, found in row["models"].items():
            verdict = "pass" if found["passed"] else "FAIL"
            said.append(f"gate {row['gate']} {bound}: {model} {found['value']:.4f} {verdict}  ({row['signature']})")
    return said


def enforce(rows: list[dict[str, Any]]) -> None:
    """CheckFailed if an adapter broke a bound."""
    broken = [line for line in lines(rows) if " FAIL " in line]
    if broken:
        raise CheckFailed("gates that are not kept:\n  " + "\n  ".join(broken)
                          + "\n  the results are complete; train on, or lower the bound in `gates`")  # fmt: skip
