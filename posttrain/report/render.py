"""The two files: one content, two jinja2 templates. All text of models and data is escaped."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from posttrain.config import shown
from posttrain.report import content, dataset, evaluation, forecasts
from posttrain.report.content import BASE, Cell, Column, Row
from posttrain.report.figures import curves
from posttrain.report.lineage import FoundRun, Lineage
from posttrain.report.symptoms import symptoms
from posttrain.stages import Report

TEMPLATES = Path(__file__).parent
# The measures in Chinese; names of tasks, groups, reasons and knobs stay as they stand in the files.
CHINESE = {
    "exact match": "与标准答案一致",
    "ended by itself": "自行收尾",
    "format and end right": "格式与收尾都对",
    "loss per answer token": "每个答案 token 的损失",
    "preference accuracy": "偏好判断正确率",
    "preference margin": "偏好间隔",
    "acc": "选择题正确率",
    "acc_norm": "选择题正确率（按长度归一）",
    "exact_match": "逐字一致",
    "accuracy": "分类正确率",
    "macro_f1": "宏平均 F1",
    "bleu4": "BLEU-4（0–100）",
    "rouge_l_char": "ROUGE-L，按字（0–100）",
    "rouge_l_jieba": "ROUGE-L，按词（0–100）",
    "chrf": "chrF（0–100）",
    "em": "抽取式问答：完全一致",
    "f1": "抽取式问答：F1",
}
CAPTIONS = {"all prompts": "全部提示", "sft_test": "留出的对话", "pref_test": "留出的偏好对"}
MEASURES = {"tensors": "显存：张量", "allocator": "显存：分配器占住", "card": "显存：整卡", "process": "内存：进程峰值",
            "time": "训练用时", "cost": "费用"}  # fmt: skip
VERDICTS = {"within": "在预测之内", "above": "比预测慢", "below": "比预测快", "not measured": "未测得",
            "not forecast": "未预测"}
KINDS = {
    "prepare_data": "数据",
    "train_cpt": "继续预训练",
    "train_sft": "监督微调",
    "train_orpo": "偏好对齐",
    "train_dpo": "偏好对齐",
    "make_demo": "基座",
    "eval_harness": "评测",
    "infer_compare": "对比",
    "export_lora": "导出",
}


def number(value: float | None, unit: str = "number") -> str:
    """A value as a person reads it: 87.5%, 0.412, +3.2."""
    if value is None:
        return "–"
    if unit == "%":
        return f"{100 * value:.1f}%"
    return f"{value:.{digits(value)}f}"


def digits(value: float) -> int:
    """Decimals that a value and its error are shown with."""
    return 3 if abs(value) < 100 else 1


def interval(cell: Cell, unit: str) -> str:
    """The 95 % interval: [33.1, 55.0] in points where the value is a share."""
    return _between(cell.interval, unit, cell.value, "")


def change(cell: Cell, unit: str) -> str:
    """The difference to the base with its interval, and the chance of one as large if there were none."""
    if cell.difference is None:
        return ""
    scale, places = (100, 1) if unit == "%" else (1, digits(cell.value))
    spread = _between(cell.difference_interval, unit, cell.value, "+")
    chance = "" if cell.p is None else f", p {cell.p:.3f}" if cell.p >= 0.001 else ", p <0.001"
    return f"{scale * cell.difference:+.{places}f} {spread}{chance}".replace(" ,", ",").strip()


def _between(bounds: tuple[float, float] | None, unit: str, value: float, sign: str) -> str:
    if bounds is None:
        return ""
    scale, places = (100, 1) if unit == "%" else (1, digits(value))
    return f"[{', '.join(f'{scale * bound:{sign}.{places}f}' for bound in bounds)}]"


def knob(value: Any) -> str:
    """A knob's value: 0.0002 as 2e-4, 12345 as 12,345."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        if 0 < abs(value) < 1e-2:
            mantissa, _, exponent = f"{value:.3e}".partition("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def context(lineage: Lineage, config: Report) -> dict[str, Any]:
    """Everything that the templates show."""
    rows, columns = content.summary_rows(lineage), content.columns_of(lineage)
    trainings = [_training(run) for stage in ("make_demo", *content.STAGE_LABELS) for run in lineage.of(stage)]
    ancestor = next((run for run in lineage.runs.values() if "base" in run.manifest), None)
    return {
        "config": config,
        "columns": columns,
        "rows": rows,
        "headline": content.headline(rows),
        "evaluations": evaluation.evaluations(lineage),
        "panels": evaluation.panels(lineage),
        "symptoms": symptoms(lineage, columns, rows),
        "lineage": lineage,
        "base_id": ancestor.manifest["base"]["id"] if ancestor else None,
        "trainings": trainings,
        "data": [dataset.described(run) for run in lineage.of("prepare_data")],
        "samples": content.samples(lineage, config),
        "labels": {column.key: column.label for column in columns},
        "exports": lineage.of("export_lora"),
        "chinese": CHINESE,
        "captions": CAPTIONS | config.captions,
        "kinds": KINDS,
        "measures": MEASURES,
        "verdicts": VERDICTS,
        "base_key": BASE,
        "seconds": sum(run.manifest["seconds"] for run in lineage.runs.values()),
        "newest": max((run.manifest["created"] for run in lineage.runs.values()), default=None),
        "common": _common(lineage),
        "bar": bar,
        "number": number,
        "interval": interval,
        "change": change,
        "knob": knob,
        "shown": shown,
    }


def _training(run: FoundRun) -> dict[str, Any]:
    lines, manifest = content.metrics(run), run.manifest
    fates = manifest.get("data", {}).get("fates", {})
    return {
        "run": run, "label": content.STAGE_LABELS.get(run.stage, "Base"), "knobs": content.knobs(run),
        "outcome": content.outcome(run), "compared": forecasts.compared(run), "not_made": _not_made(run),
        "figure": curves(lines, manifest["results"].get("kept_step")),
        "notes": manifest.get("data", {}).get("notes", []),
        "dropped": {reason: count for reason, count in fates.items() if not reason.startswith("kept")},
    }  # fmt: skip


def _not_made(run: FoundRun) -> str:
    """Why there is no forecast of the memory of a run; "" where there is one."""
    return (run.manifest.get("forecast") or {}).get("not_made", "")


def bar(row: Row, cell: Cell) -> float:
    """Length of a bar in percent: shares of the whole, other measures of the largest."""
    if row.unit == "%":
        return 100 * cell.value
    largest = max(abs(c.value) for c in row.cells.values()) or 1
    return 100 * abs(cell.value) / largest


def _common(lineage: Lineage) -> dict[str, list[str]]:
    """Commits, machines and versions over all runs: one entry each where all agree."""
    facts: dict[str, list[str]] = {"commit": [], "machine": [], "versions": []}
    for run in lineage.runs.values():
        manifest = run.manifest
        git, machine = manifest["git"], manifest["machine"]
        facts["commit"].append(f"{(git['commit'] or 'none')[:10]}{' + uncommitted changes' if git['dirty'] else ''}")
        card = f"{machine['card']} ({machine['vram_gib']} GiB)" if machine["card"] else "no GPU"
        facts["machine"].append(f"{machine['host']}: {machine['platform']}, {machine['cpus']} CPUs, {card}")
        facts["versions"].append(", ".join(f"{name} {v}" for name, v in manifest["versions"].items() if v))
    return {name: list(dict.fromkeys(values)) for name, values in facts.items()}


def render(lineage: Lineage, config: Report, folder: Path) -> list[Path]:
    """Write report.html and report.md into `folder`."""
    shared = context(lineage, config)
    files = []
    for name, escaped in (("report.html", True), ("report.md", False)):
        jinja = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=escaped, undefined=StrictUndefined,
                            trim_blocks=True, lstrip_blocks=True)  # fmt: skip
        jinja.filters["md"] = markdown_cell
        path = folder / name
        path.write_text(jinja.get_template(f"{name}.jinja").render(shared), encoding="utf-8")
        files.append(path)
    return files


def markdown_cell(text: Any) -> str:
    """Text that stays inside a cell of a Markdown table, and that Markdown and HTML leave alone."""
    text = str(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(text.replace("`", "\\`").replace("*", "\\*").replace("_", "\\_").split())


def terminal_table(rows: list[Row], columns: list[Column]) -> str:
    """The before/after table for the end of a run."""
    lines = [["", "", "n", *(column.label for column in columns)]]
    for row in rows:
        cells = [row.cells.get(column.key) for column in columns]
        lines.append([row.name, row.measure, str(row.n), *(number(c.value, row.unit) if c else "" for c in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        " ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w + 1) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([text[0], "─" * len(text[0]), *text[1:]])
