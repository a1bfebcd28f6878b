"""
Prompts with right answers, for a model to answer freely: read from local files, scored, compared item by item.

Three kinds: text (BLEU-4, ROUGE-L, chrF), classification (accuracy, macro-F1, confusion matrix) and extractive_qa
(exact match and F1 as CMRC 2018 defines them). BERTScore beside them where the config names an encoder.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import instructions, significance
from posttrain.config import shown
from posttrain.errors import UserFault, faults_in
from posttrain.evals import generation
from posttrain.evaluation_blocks import AnswerSet, BertScore
from posttrain.plan import Plan
from posttrain.records import fault_in_turns, json_object, lines_of, record_id, text_of
from posttrain.stages import EvalHarness
from posttrain.text import has_lone_surrogate

METRICS = {
    "text": ("bleu4", "rouge_l_char", "rouge_l_jieba", "chrf"),
    "classification": ("accuracy", "macro_f1"),
    "extractive_qa": ("em", "f1"),
}
BERTSCORE = "bertscore"
SPLITS = {"rouge_l_char": generation.characters, "rouge_l_jieba": generation.words}


@dataclass
class Items:
    """The items of one set. prompts: messages; references: the answers that count as right, at least one each."""

    name: str
    kind: str
    ids: list[str]
    prompts: list[list[dict]]
    references: list[list[str]]
    classes: list[str]
    bert_score: BertScore | None = None


def metrics_of(how: AnswerSet) -> tuple[str, ...]:
    """The metrics of a set."""
    return METRICS[how.kind] + ((BERTSCORE,) if how.bert_score else ())


def signature_of(bert_score: BertScore | None, metric: str) -> str:
    """What a number of a set is made with."""
    if metric != BERTSCORE:
        return generation.signature(metric)
    from posttrain.evals import bert_score as of_bert

    return of_bert.signature(bert_score)


def plan_sets(plan: Plan, cfg: EvalHarness, models: int) -> None:
    """State the answer sets in a plan. Faults for unusable files, and for names that a task has already."""
    for name, how in cfg.answer_sets.items():
        if name in cfg.tasks or "/" in name or name in ("sft_test", "pref_test"):
            plan.faults.append(f"answer_sets.{name}: choose another name: a task has it already, or it holds a '/'")
        elif plan.need(f"answer set {name}", how.file, otherwise=f"Or leave it out: --set answer_sets.{name}=null"):
            try:
                items = read(name, how, cfg.seed)
                _check_encoder(how)
            except UserFault as fault:
                plan.faults.append(str(fault))
                continue
            classes = f", {len(items.classes)} classes" if items.classes else ""
            count = len(items.ids)
            plan.fact("data", f"{name}: {count} items ({how.kind}{classes}), {count * models} answers of "
                              f"{how.max_new_tokens} tokens at most")  # fmt: skip
            if how.bert_score:
                plan.fact("data", f"{name}: BERTScore by {shown(how.bert_score.model)}, with its own weights in memory "
                                  "after the last model")  # fmt: skip


def _check_encoder(how: AnswerSet) -> None:
    if how.bert_score:
        from posttrain.evals import bert_score

        bert_score.check(how.bert_score)


# ------------------------------------------------------------------ reading


def read(name: str, how: AnswerSet, seed: int) -> Items:
    """The items of a set, a seeded draw of how.limit of them. UserFault with every unusable row of the file."""
    rows = list(_rows(how.file))
    classes = _classes(how, rows) if how.kind == "classification" else []
    ids, prompts, references, faults = [], [], [], []
    for place, row in rows:
        for item in _items(row, how, classes):
            if isinstance(item, str):
                faults.append(f"{shown(how.file)}:{place}: {item}")
                continue
            prompt, right = item
            if has_lone_surrogate(json.dumps([prompt, right], ensure_ascii=False)):
                faults.append(f"{shown(how.file)}:{place}: holds half of a character (a lone surrogate)")
                continue
            ids.append(record_id(name, [prompt, right, len(ids)]))
            prompts.append(prompt)
            references.append(right)
    if faults:
        raise faults_in(f"answer_sets.{name}: {len(faults)} unusable rows", faults)
    if not ids:
        raise UserFault(f"answer_sets.{name}: {shown(how.file)} holds no item")
    chosen = range(len(ids))
    if how.limit and how.limit < len(ids):
        chosen = sorted(random.Random(seed).sample(chosen, how.limit))
    columns = ([column[i] for i in chosen] for column in (ids, prompts, references))
    return Items(name, how.kind, *columns, classes, how.bert_score)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line or place, row or what is wrong with it): JSONL, a JSON list, SQuAD's {"data": [...]}, or lines of text and
    class by a tab."""
    if path.suffix == ".jsonl":
        yield from ((number, json_object(line)) for number, line in enumerate(lines_of(path), 1) if line)
    elif path.suffix == ".json":
        try:
            content = json.loads(text_of(path))
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserFault(f"{shown(path)}: not JSON ({error})") from None
        content = content.get("data", content) if isinstance(content, dict) else content
        if not isinstance(content, list):
            raise UserFault(f"{shown(path)}: expected a list of rows, or SQuAD's {{\"data\": [...]}}")
        yield from enumerate(content, 1)
    elif path.suffix in (".txt", ".tsv"):
        for number, line in enumerate(lines_of(path), 1):
            if line:
                one, _, label = line.rpartition("\t")
                yield number, {"text": one.strip(), "label": label.strip()}
    else:
        raise UserFault(f"{shown(path)}: expected .jsonl, .json, .txt or .tsv")


def _classes(how: AnswerSet, rows: list[tuple[int, Any]]) -> list[str]:
    """The config's classes, else those of a class.txt beside the file, else the answers that occur."""
    if how.classes:
        return how.classes
    beside = how.file.parent / "class.txt"
    if beside.is_file():
        return [line for line in lines_of(beside) if line]
    found = {str(row.get("label", row.get("answer", ""))).strip() for _, row in rows if isinstance(row, dict)}
    return sorted(found - {""})


def _items(row: Any, how: AnswerSet, classes: list[str]) -> Iterator[tuple[list[dict], list[str]] | str]:
    """(prompt, references) of a row, or why it is none."""
    if not isinstance(row, dict):
        yield row if isinstance(row, str) else "not a JSON object"
    elif how.kind == "classification" and "text" in row:
        yield _labelled(row, classes)
    elif how.kind == "extractive_qa" and ("paragraphs" in row or "qas" in row or "context" in row):
        yield from _read_questions(row)
    else:
        yield _asked(row, how.kind, classes)


def _asked(row: dict, kind: str, classes: list[str]) -> tuple[list[dict], list[str]] | str:
    """{"prompt": text or messages, "answer": text or texts}, or {"messages"} whose last turn is the answer."""
    messages = row.get("messages")
    if isinstance(messages, list) and messages:
        if fault := fault_in_turns(messages, ends_in="assistant"):
            return fault.replace("_", " ")
        prompt, right = messages[:-1], [messages[-1]["content"]]
    else:
        prompt, right = row.get("prompt"), row.get("answer")
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        right = [right] if isinstance(right, str) else right
        if fault := fault_in_turns(prompt, ends_in="user"):
            return f"prompt: {fault.replace('_', ' ')} (keys there: {', '.join(row) or 'none'})"
    if not isinstance(right, list) or not right or not all(isinstance(one, str) and one.strip() for one in right):
        return f"answer: not a text, nor a list of texts (keys there: {', '.join(row)})"
    if kind == "classification" and right[0].strip() not in classes:
        return f"the answer {right[0][:40]!r} is not one of the classes {', '.join(classes)}"
    return prompt, [one.strip() for one in right] if kind == "classification" else right


def _labelled(row: dict, classes: list[str]) -> tuple[list[dict], list[str]] | str:
    """A text and its class, by name or by number from 0: asked in the words that prepare_data trains with."""
    text, label = row["text"], str(row.get("label", "")).strip()
    if not isinstance(text, str) or not text.strip():
        return "text: empty, or not a text"
    if label not in classes and label.isdecimal() and int(label) < len(classes):
        label = classes[int(label)]
    if label not in classes:
        return f"the label {label[:40]!r} is not one of the {len(classes)} classes {', '.join(classes)}"
    return [{"role": "user", "content": instructions.choose(text.strip(), classes)}], [label]


def _read_questions(row: dict) -> Iterator[tuple[list[dict], list[str]] | str]:
    """The questions of a SQuAD article, of one of its paragraphs, or of a flat row; a reference for every answer."""
    if isinstance(row.get("paragraphs"), list):
        for paragraph in row["paragraphs"]:
            yield from _read_questions(paragraph if isinstance(paragraph, dict) else {"qas": None})
        return
    context = row.get("context", row.get("context_text"))
    for one in row.get("qas", [row]) or [None]:
        one = one if isinstance(one, dict) else {}
        question, answers = one.get("question", one.get("query_text")), one.get("answers")
        answers = answers.get("text") if isinstance(answers, dict) else answers
        right = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers or []]
        right = list(dict.fromkeys(answer for answer in right if isinstance(answer, str) and answer.strip()))
        if isinstance(context, str) and isinstance(question, str) and right:
            yield [{"role": "user", "content": instructions.read(context.strip(), question.strip())}], right
        else:
            yield f"no context, question or answer (keys there: {', '.join(one) or 'none'})"


# ------------------------------------------------------------------ scoring


def item_scores(items: Items, answers: list[str]) -> dict[str, list[float]]:
    """The metrics that are means over items: metric -> a value for each item."""
    scores: dict[str, list[float]] = {}
    for metric in METRICS[items.kind]:
        if metric in SPLITS:
            scores[metric] = generation.rouge_items(answers, items.references, SPLITS[metric])
        elif metric in ("em", "f1"):
            of = generation.qa_exact if metric == "em" else generation.qa_f1
            scores[metric] = [of(said, right) for said, right in zip(answers, items.references, strict=True)]
        elif metric == "accuracy":
            labels = zip(parsed(items, answers), items.references, strict=True)
            scores[metric] = [float(said == right[0]) for said, right in labels]
    return scores


def parsed(items: Items, answers: list[str]) -> list[str | None]:
    """The class that each answer names, or None."""
    return [generation.parse_label(answer, items.classes) for answer in answers]


def rows(items: Items, answers: dict[str, list[str]], seed: int,
         similar: dict[str, list[float]] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """A row of the table per metric. answers: model -> its answer to every item; the first model is compared with.
    similar: model -> BERTScore of every item, where an encoder has measured it."""
    of_items = {model: item_scores(items, said) for model, said in answers.items()}
    table = [_mean_row(items, metric, {m: scores[metric] for m, scores in of_items.items()}, seed)
             if metric in next(iter(of_items.values())) else _corpus_row(items, metric, answers, seed)
             for metric in METRICS[items.kind]]  # fmt: skip
    return table + ([_mean_row(items, BERTSCORE, similar, seed)] if similar else [])


def _mean_row(items: Items, metric: str, values: dict[str, list[float]], seed: int) -> dict[str, Any]:
    scores, differences, first = {}, {}, next(iter(values))
    for model, own in values.items():
        low, high = significance.mean_interval(own) or (None, None)
        scores[model] = {"value": sum(own) / len(own), "low": low, "high": high}
        if model != first:
            differences[model] = significance.paired(own, values[first], seed)
    return _row(items, metric, scores, differences)


def _corpus_row(items: Items, metric: str, answers: dict[str, list[str]], seed: int) -> dict[str, Any]:
    """A score that follows from counts over all answers: resampled with the same items for every model."""
    scores, differences, resampled, first = {}, {}, {}, next(iter(answers))
    for model, said in answers.items():
        of = _corpus_metric(items, metric, said)
        everything = list(range(len(said)))
        resampled[model] = generation.bootstrap(of, len(said), seed)
        low, high = generation.interval_of(resampled[model])
        scores[model] = {"value": of(everything), "low": low, "high": high}
        if model != first:
            value = scores[model]["value"] - scores[first]["value"]
            differences[model] = generation.difference_of(resampled[model], resampled[first], value)
    return _row(items, metric, scores, differences)


def _corpus_metric(items: Items, metric: str, answers: list[str]):
    """(places of items) -> the metric over them."""
    if metric == "macro_f1":
        said, gold = parsed(items, answers), [right[0] for right in items.references]
        return lambda drawn: generation.macro_f1(
            generation.confusion([said[i] for i in drawn], [gold[i] for i in drawn], items.classes)
        )
    stats = generation.corpus_stats(metric, answers, items.references)
    return lambda drawn: generation.corpus_score(metric, stats[drawn])


def score_of(items: Items, metric: str, answers: list[str]) -> float:
    """One metric over all answers."""
    of_items = item_scores(items, answers)
    if metric in of_items:
        return sum(of_items[metric]) / len(answers)
    return _corpus_metric(items, metric, answers)(list(range(len(answers))))


def _row(items: Items, metric: str, scores: dict, differences: dict) -> dict[str, Any]:
    """As harness makes them for lm-eval's tasks, with the signature of the number."""
    differences = {model: found | {"p_holm": None, "flag": None} for model, found in differences.items()}
    return {"task": items.name, "metric": metric, "n": len(items.ids), "n_shot": None, "higher_is_better": True,
            "scores": scores, "differences": differences, "signature": signature_of(items.bert_score, metric),
            **({"classes": items.classes} if items.classes else {})}  # fmt: skip


def facts(items: Items, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What else is to be known of one model's answers: cost, length, how many were empty or could not be read."""
    texts = [answer["text"] for answer in answers]
    tokens, seconds = sum(a["tokens"] for a in answers), sum(a["seconds"] for a in answers)
    found: dict[str, Any] = {
        "empty": sum(not text.strip() for text in texts), "ended": sum(a["stopped"] for a in answers),
        "mean_characters": sum(map(len, texts)) / len(texts), "mean_tokens": tokens / len(texts),
        "tokens_per_second": tokens / seconds if seconds else None, "seconds": round(seconds, 3),
    }  # fmt: skip
    if items.kind == "classification":
        said = parsed(items, texts)
        table = generation.confusion(said, [right[0] for right in items.references], items.classes)
        found |= {"unparseable": said.count(None), "classes": items.classes, "confusion": table.tolist()}
    return found
