"""What a plan shows of the rows of a training run: fates, how answers end, and one row as it is trained."""

from collections import Counter

from posttrain import chat, token_view
from posttrain.plan import Plan
from posttrain.training import Start
from posttrain.training_data import Rows

LOST = ("longer_than_max_length", "no_trained_token", "template_without_tools", "refused_by_template")


def show_rows(plan: Plan, kind: str, start: Start, rows: Rows) -> None:
    """Fill the sections data, sampling and example."""
    read = sum(rows.fates.values())
    plan.fact("data", f"{read} records: " + ", ".join(f"{reason} {n}" for reason, n in sorted(rows.fates.items())))
    plan.fact("data", f"{rows.tokens} tokens, {rows.trained_tokens} trained; {len(rows.val)} rows validate")
    if kind != "text":
        plan.fact("data", answers_line(start.tokenizer, rows.train, rows.fates))
    for note in rows.notes:
        plan.fact("sampling", note)
    injects = f"; it says unasked: {start.template.injects!r}" if start.template.injects else ""
    plan.fact("example", f"template: {start.template.name}{injects}; trained tokens stand between 【 and 】")
    if rows.train:
        plan.facts["example"] += _example(start.tokenizer, rows.train[0], plan.config.show_tokens)


def answers_line(tokenizer, rows: list[dict], fates: Counter) -> str:
    """How many answers are cut, lack their end or are lost whole: counted in the rows that a trainer gets."""
    lacking = token_view.answers_without_end(rows, tokenizer.eos_token_id)
    lost = ", ".join(f"{fates[reason]} {reason}" for reason in LOST if fates[reason])
    turns = fates["kept_without_oldest_turns"]
    return (f"answers: {lacking} cut or without their end token {tokenizer.eos_token}; lost whole: {lost or 0}"
            + (f"; {turns} conversations without their oldest turns" if turns else ""))  # fmt: skip


def _example(tokenizer, row: dict, limit: int) -> list[str]:
    """A row as text with marks, then token by token: of a packed row its first conversation, of a pair both answers."""
    if "chosen_ids" not in row:
        end = row["seq_lengths"][0] if "seq_lengths" in row else len(row["input_ids"])
        return _row_lines(tokenizer, row["input_ids"][:end], row["labels"][:end], limit)
    lines, unlearned = [], [chat.IGNORED] * len(row["prompt_ids"])
    for side in ("chosen", "rejected"):
        lines += [f"-- {side} --"]
        lines += _row_lines(tokenizer, row["prompt_ids"] + row[f"{side}_ids"], unlearned + row[f"{side}_ids"],
                            limit // 2)  # fmt: skip
    return lines


def _row_lines(tokenizer, ids: list[int], labels: list[int], limit: int) -> list[str]:
    lines = _shortened(token_view.marked(tokenizer, ids, labels)).splitlines()
    if limit:
        shown = "" if len(ids) <= limit else f", {limit} of {len(ids)} shown (--set show_tokens={len(ids)}: all)"
        lines += [f"token by token, * trained{shown}"]
        lines += token_view.token_lines(tokenizer, ids, labels, limit)
    return lines


def _shortened(text: str, limit: int = 1200) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n ... {len(text) - limit} characters ...\n{text[-limit // 2 :]}"
