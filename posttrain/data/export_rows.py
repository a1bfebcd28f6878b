"""
Export: records that prepare_data wrote -> rows of Alpaca, ShareGPT or messages, for other trainers.

What an exported row says is read back by to_records() and compared before it is written: a record that a form cannot
hold (tool calls in Alpaca) goes, with the reason, into a file of its own. Beside the rows stands a dataset_info.json,
in which LLaMA-Factory finds each file's columns.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from posttrain.config import Loaded, shown
from posttrain.data.jsonfiles import Fault
from posttrain.data.sources import is_record, to_records
from posttrain.errors import UserFault
from posttrain.records import read_jsonl, write_jsonl
from posttrain.runs import write_json

SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
PARTS = ("messages", "prompt", "chosen", "rejected", "text", "tools")
_OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                "observation_tag": "tool", "system_tag": "system"}  # fmt: skip
_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "system": "system", "history": "history"},
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
    "messages": {"messages": "messages", "tools": "tools"},
}


class Inexpressible(Exception):
    """A record that the form has no place for; the argument is the reason that is counted."""


def export_prepared(loaded: Loaded, form: str) -> dict[str, dict]:
    """prepare_data --export: every train, val and test file of output_dir into output_dir/export_<form>/."""
    directory = loaded.config.output_dir
    names = [f"{kind}_{side}.jsonl" for kind in ("sft", "pref", "text") for side in ("train", "val", "test")]
    found = [directory / name for name in names if (directory / name).is_file()]
    if not found:
        raise UserFault(f"{shown(directory)}: holds no prepared records\n  make them: python -m scripts.prepare_data")
    counts = export_rows(found, form, directory / f"export_{form}")
    for name, count in counts.items():
        left = ", ".join(f"{reason} {number}" for reason, number in count["not_exported"].items())
        print(f"{name}: {count['read']} read, {count['written']} written{f', not exported: {left}' if left else ''}")
    print(f"in {shown(directory / f'export_{form}')}/")
    return counts


def export_rows(paths: list[Path], form: str, out_dir: Path) -> dict[str, dict]:
    """Write each file's records as <name>_<form>.jsonl; those that the form cannot hold as <name>_not_exported.jsonl,
    {reason, record} a line. Returns file name -> {read, written, not_exported: {reason: count}}.

    UserFault: an unknown form, a file that is missing or holds other rows than records, two files of one name.
    """
    if form not in FORMS:
        raise UserFault(f"--export {form}: no such form\n  choices: {', '.join(FORMS)}")
    double = [name for name, count in Counter(path.stem for path in paths).items() if count > 1]
    if double:
        raise UserFault(f"--export: {', '.join(double)}: two files of one name would be written over each other")
    counts, described = {}, {}
    for path in paths:
        if not path.is_file():
            raise UserFault(f"{shown(path)}: no such file\n  make it: python -m scripts.prepare_data")
        out = out_dir / f"{path.stem}_{form}.jsonl"
        count, kind = _export_file(path, form, out)
        counts[path.name] = count
        if kind:
            described[out.stem] = dataset_info(out.name, form, kind)
    write_json(out_dir / "dataset_info.json", described)
    return counts


def _export_file(path: Path, form: str, out: Path) -> tuple[dict, str | None]:
    """(the counts of one file, the kind of its records)."""
    reasons, left, kinds = Counter(), [], []

    def rows():
        for number, record in enumerate(read_jsonl(path), 1):
            kind = kind_of(record)
            if kind is None or kind != (kinds or [kind])[0]:
                raise UserFault(f"{shown(path)}:{number}: not a record like those before it\n  --export takes what "
                                "prepare_data wrote: {sft,pref,text}_{train,val,test}.jsonl")  # fmt: skip
            kinds[:] = [kind]
            try:
                yield exported(record, form)
            except Inexpressible as error:
                reasons[str(error)] += 1
                left.append({"reason": str(error), "record": record})

    written = write_jsonl(out, rows())
    rest = out.with_name(f"{path.stem}_not_exported.jsonl")
    write_jsonl(rest, left) if left else rest.unlink(missing_ok=True)
    counts = {"read": written + len(left), "written": written, "not_exported": dict(reasons.most_common())}
    return counts, kinds[0] if kinds else None


def kind_of(record: Any) -> str | None:
    """sft, pref or text; None of what is no record."""
    return next((kind for kind in ("sft", "pref", "text") if is_record(record, kind)), None)


def exported(record: dict, form: str) -> dict:
    """The row of a record. Inexpressible if the form has no place for all of it."""
    kind = kind_of(record)
    row = {"text": record["text"]} if kind == "text" else FORMS[form](record)
    again = to_records(row, record["source"], kind)
    parts = {name: record[name] for name in PARTS if record.get(name) is not None}
    if len(again) != 1 or isinstance(again[0], Fault) or parts != {n: again[0][n] for n in PARTS if n in again[0]}:
        raise Inexpressible("is_read_back_otherwise")
    return {"id": record["id"], "source": record["source"], **row}


# ------------------------------------------------------------------ forms


def alpaca(record: dict) -> dict:
    """instruction, input, output, with system and history where there are any; of a pair chosen and rejected."""
    asked = record["prompt"] if "prompt" in record else record["messages"][:-1]
    answers = [record["chosen"][0], record["rejected"][0]] if "prompt" in record else record["messages"][-1:]
    _refuse_tools(record, [*asked, *answers])
    system = [turn["content"] for turn in asked if turn["role"] == "system"]
    said = [turn["content"] for turn in asked if turn["role"] != "system"]
    row = {"instruction": said[-1], "input": ""}
    if "prompt" in record:
        row |= {"chosen": answers[0]["content"], "rejected": answers[1]["content"]}
    else:
        row["output"] = answers[0]["content"]
    row |= {"system": system[0]} if system else {}
    history = [[question, answer] for question, answer in zip(said[:-1:2], said[1:-1:2], strict=True)]
    return row | ({"history": history} if history else {})


def _refuse_tools(record: dict, turns: list[dict]) -> None:
    if any("tool_calls" in turn for turn in turns):
        raise Inexpressible("tool_calls")
    if any(turn["role"] == "tool" for turn in turns):
        raise Inexpressible("tool_turns")
    if record.get("tools"):
        raise Inexpressible("tools")


def sharegpt(record: dict) -> dict:
    """conversations of {from, value}, system, tools as JSON text; a call is a turn of function_call, a result one of
    observation. An assistant's words before a call are a turn of their own."""
    turns = record["prompt"] if "prompt" in record else record["messages"]
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    row: dict[str, Any] = {"conversations": [one for turn in turns if turn["role"] != "system" for one in _said(turn)]}
    for side in ("chosen", "rejected") if "prompt" in record else ():
        said = _said(record[side][0])
        if len(said) != 1:
            raise Inexpressible("words_before_a_call")
        row[side] = said[0]
    row |= {"system": system[0]} if system else {}
    return row | ({"tools": _json([_bare(tool) for tool in record["tools"]])} if record.get("tools") else {})


def _said(turn: dict) -> list[dict]:
    """A turn as one or two of ShareGPT's."""
    calls = [_bare(call) for call in turn.get("tool_calls", [])]
    said = [{"from": SPEAKERS[turn["role"]], "value": turn["content"]}] if turn["content"] or not calls else []
    return said + ([{"from": "function_call", "value": _json(calls[0] if len(calls) == 1 else calls)}] if calls else [])


def _bare(wrapped: dict) -> dict:
    """A function without the wrapper of OpenAI's form, where nothing else stands in that."""
    return wrapped["function"] if wrapped.keys() <= {"type", "function"} else wrapped


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def as_messages(record: dict) -> dict:
    """messages of {role, content, tool_calls?}, and tools; of a pair the prompt as messages, chosen and rejected."""
    tools = {"tools": record["tools"]} if record.get("tools") else {}
    if "prompt" not in record:
        return {"messages": record["messages"], **tools}
    return {"messages": record["prompt"], "chosen": record["chosen"][0], "rejected": record["rejected"][0], **tools}


FORMS = {"alpaca": alpaca, "sharegpt": sharegpt, "messages": as_messages}


def dataset_info(file: str, form: str, kind: str) -> dict:
    """LLaMA-Factory's entry of a file."""
    if kind == "text":
        return {"file_name": file, "columns": {"prompt": "text"}}
    info: dict[str, Any] = {"file_name": file, "columns": dict(_COLUMNS[form])}
    if form != "alpaca":
        info["formatting"] = "sharegpt"
    if form == "messages":
        info["tags"] = _OPENAI_TAGS
    if kind == "pref":
        info["ranking"] = True
        info["columns"] |= {"chosen": "chosen", "rejected": "rejected"}
    elif form == "alpaca":
        info["columns"]["response"] = "output"
    return info
