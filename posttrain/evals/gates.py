"""Gates: bounds that every adapter must keep, each held against a number with the signature it was set for."""

from typing import Any

from posttrain.errors import CheckFailed, UserFault
from posttrain.evals import harness, safety, safety_rates
from posttrain.evals.answer_sets import metrics_of, signature_of
from posttrain.evaluation_blocks import AnswerSet, Gate
from posttrain.plan import Plan
from posttrain.stages import EvalHarness

LM_EVAL = "lm-eval"  # signature of its scores
HELD_OUT = {"sft_test/loss": ("sft_test", "loss"), "pref_test/accuracy": ("pref_test", "accuracy"),
            "pref_test/margin": ("pref_test", "margin")}  # fmt: skip


def plan_gates(plan: Plan, cfg: EvalHarness) -> None:
    """Faults for gates whose task or metric this config does not measure, before anything is measured."""
    here = {*cfg.tasks, *cfg.answer_sets, *(role for role in ("sft_test", "pref_test") if getattr(cfg, role))}
    rates = _rates(cfg)
    here |= {*rates}
    for name, gate in cfg.gates.items():
        task, _, metric = name.partition("/")
        if task not in here or not metric:
            plan.faults.append(f"gates.{name}: write task/metric; the tasks here: {', '.join(sorted(here))}")
            continue
        known = metrics_of(cfg.answer_sets[task]) if task in cfg.answer_sets else \
            rates[task] if task in rates else \
            [key.partition("/")[2] for key in HELD_OUT if key.startswith(f"{task}/")]  # fmt: skip
        if known and metric not in known:
            plan.faults.append(f"gates.{name}: no such metric of {task}; choose from {', '.join(known)}")
        elif task in rates and not all(0 <= bound <= 1 for bound in (gate.min, gate.max) if bound is not None):
            plan.faults.append(f"gates.{name}: a rate is a share, from 0 to 1: 90 % is 0.9")
        elif gate.signature and (task in cfg.answer_sets or task in rates):
            made_with = safety_rates.signature() if task in rates else _made_with(cfg.answer_sets[task], metric)
            if made_with and gate.signature != made_with:
                plan.faults.append(f"gates.{name}: the bound was set for {gate.signature}\n    the number here is "
                                   f"{made_with}: set the bound anew for it")  # fmt: skip


def _rates(cfg: EvalHarness) -> dict[str, list[str]]:
    """Task of safety -> the rates that its prompts make; `safety` stands for all of them."""
    found = {}
    for task in safety.files_of(cfg):
        try:
            found[task] = safety_rates.metrics_of({prompt.kind for prompt in safety.read(cfg, task)})
        except (UserFault, OSError):  # safety.plan_safety says what is wrong with it
            found[task] = list(safety_rates.RATES)
    return found | ({"safety": list(dict.fromkeys(sum(found.values(), [])))} if found else {})


def _made_with(how: AnswerSet, metric: str) -> str | None:
    """The signature of a number of an answer set; None without a usable encoder, of which plan_sets tells."""
    try:
        return signature_of(how.bert_score, metric)
    except (UserFault, OSError):
        return None


def check_tasks(cfg: EvalHarness, tasks: harness.Tasks) -> None:
    """UserFault, before anything is measured, for gates on metrics that a task of lm-eval does not have."""
    faults = []
    for name, gate in cfg.gates.items():
        task, _, metric = name.partition("/")
        of_task = [tasks.leaves[leaf] for leaf in tasks.asked.get(task, [])]
        if any(leaf.get_config("process_results") for leaf in of_task):
            continue  # a function of its own may give any metric
        known = {harness.metric_name(f"{one},{chosen.name}")
                 for leaf in of_task for one in leaf.aggregation() for chosen in leaf._filters}  # fmt: skip
        if known and metric not in known:
            faults.append(f"gates.{name}: no such metric of {task}; choose from {', '.join(sorted(known))}")
        elif known and gate.signature not in (None, LM_EVAL):
            faults.append(f"gates.{name}: the bound was set for {gate.signature}\n    the number here is {LM_EVAL}: "
                          "set the bound anew for it")  # fmt: skip
    if faults:
        raise UserFault("\n".join(faults))


def judged(cfg: EvalHarness, results: dict[str, Any]) -> list[dict[str, Any]]:
    """[{gate, min, max, models: {adapter: {value, passed}}}], a row per gate of the config.

    UserFault for a gate that names no number here, or one with another signature than it was set for.
    """
    numbers, faults, rows = _numbers(results), [], []
    adapters = results["models"][1 if cfg.include_base and cfg.peft_adapter else 0 :]  # a base alone is judged itself
    files = results["safety"]["files"] if results.get("safety") else {}
    dead = {(task, model) for task, facts in files.items() for model, own in facts["models"].items() if own["dead"]}
    for name, gate in _of_each_file(cfg, numbers):
        if name not in numbers:
            faults.append(f"gates.{name}: no such number\n    choose from: {', '.join(numbers)}")
            continue
        values, made_with = numbers[name]
        if gate.signature and gate.signature != made_with:
            faults.append(f"gates.{name}: the bound was set for {gate.signature}\n    the number here is {made_with}: "
                          "set the bound anew for it")  # fmt: skip
            continue
        models = {}
        for model in adapters:  # a dead model refuses nothing, but that keeps no bound
            is_dead = (name.partition("/")[0], model) in dead
            models[model] = {"value": values[model], "passed": _keeps(values[model], gate) and not is_dead}
            models[model] |= {"dead": True} if is_dead else {}
        rows.append({"gate": name, "min": gate.min, "max": gate.max, "signature": made_with, "models": models})
    if faults:
        raise UserFault("\n".join(faults))
    return rows


def _of_each_file(cfg: EvalHarness, numbers: dict[str, Any]) -> list[tuple[str, Gate]]:
    """The gates, those of `safety/metric` once for each file that has the metric."""
    gates = []
    for name, gate in cfg.gates.items():
        metric = name.removeprefix("safety/")
        each = [(f"{task}/{metric}", gate) for task in safety.files_of(cfg) if f"{task}/{metric}" in numbers]
        gates += each if metric != name and each else [(name, gate)]
    return gates


def _keeps(value: float, gate) -> bool:
    return (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)


def _numbers(results: dict[str, Any]) -> dict[str, tuple[dict[str, float], str]]:
    """task/metric -> ({model: value}, signature)."""
    numbers = {}
    for row in results["tasks"]:
        values = {model: score["value"] for model, score in row["scores"].items()}
        numbers[f"{row['task']}/{row['metric']}"] = values, row.get("signature", LM_EVAL)
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
            verdict += " (dead: its answers cannot be judged)" if found.get("dead") else ""
            said.append(f"gate {row['gate']} {bound}: {model} {found['value']:.4f} {verdict}  ({row['signature']})")
    return said


def enforce(rows: list[dict[str, Any]]) -> None:
    """CheckFailed if an adapter broke a bound."""
    broken = [line for line in lines(rows) if " FAIL " in line]
    if broken:
        raise CheckFailed("gates that are not kept:\n  " + "\n  ".join(broken)
                          + "\n  the results are complete; train on, or lower the bound in `gates`")  # fmt: skip
