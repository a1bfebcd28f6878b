"""The panel: checks by code, failures that code can see, the blind sheet there and back, the command."""

import csv
import json
import subprocess
import sys
from functools import partial

import pytest
import yaml
from conftest import make_adapter, run_here

from posttrain.config import ROOT
from posttrain.errors import UserFault
from posttrain.evals import compare, panel
from posttrain.runs import read_json
from posttrain.stages import InferCompare
from scripts import infer_compare

GOOD = {
    "json-1": '{"name": "王小雨", "age": 12, "city": "成都"}', "turns-1": "2", "turns-4": "apple, grape, orange",
    "list-2": "- 拿出旧书\n- 分类\n- 放回\n- 检查", "turns-5": "蛋挞\n绿豆糕\n水果杯",
    "list-1": "1. 生菜\n2. 小葱\n3. 香菜\n4. 辣椒\n5. 番茄",
    "qa-3": "春节：饺子\n端午：粽子\n中秋：月饼", "qa-6": "事到临头才匆忙准备。",
    "list-3": "| 水果 | 颜色 |\n|---|---|\n| 苹果 | 红 |\n| 香蕉 | 黄 |\n| 葡萄 | 紫 |",
}  # fmt: skip


def test_the_panel_is_whole():
    rows, notes = compare.read_prompts(ROOT / "configs/panel.yaml")
    assert len(rows) == 30 == len({row["id"] for row in rows}) and not notes
    topics = {"常识问答", "多轮对话", "记叙文", "说明文", "议论文", "结构化输出", "中小学讲解"}
    assert {row["group"] for row in rows} == topics
    assert all(row["checks"] for row in rows) and {name for row in rows for name in row["checks"]} == set(panel.CHECKS)
    of = {row["id"]: row["checks"] for row in rows}
    for name, answer in GOOD.items():
        assert panel.broken(answer, of[name]) == [], name
        assert panel.broken("我不太清楚你在说什么。" * 40, of[name]), name
    for checks in of.values():
        assert panel.broken("", checks) or set(checks) <= {"excludes"}


@pytest.mark.parametrize(
    ("answer", "checks", "found"),
    [
        ('```json\n{"a": 1}\n```', {"json_keys": ["a"]}, []), ('好的：{"a": 1}', {"json_keys": ["a"]}, ["json_keys"]),
        ("[1]", {"json_keys": ["a"]}, ["json_keys"]), ("[" * 100_000, {"json_keys": ["a"]}, ["json_keys"]),
        ("一、甲\n（2）乙\n• 丙\n完", {"items": 3}, []), ("甲\n\n乙", {"lines": 2}, []),
        ("短", {"min_chars": 2, "max_chars": 9}, ["min_chars"]), ("有香蕉", {"excludes": ["香蕉"]}, ["excludes"]),
        ("GRAPE", {"includes": ["grape"]}, []), ("12晚", {"regex": "\\d+"}, ["regex"]),
    ],
)  # fmt: skip
def test_checks(answer, checks, found):
    assert panel.broken(answer, checks) == found


@pytest.mark.parametrize(
    ("text", "stopped", "failure"),
    [
        ("", True, "empty"), ("抱歉，我无法回答这个问题。", True, "refusal"), ("好的好的" * 30, True, "repetition"),
        ("The nights are three in total, as you asked.", True, "other_language"), ("一共住三晚", False, "verbose"),
        ("一共住" + "".join(map(chr, range(0x4E00, 0x4E40))), True, "verbose"), ("一共住三个晚上", True, "format"),
        ("三晚", True, ""),
    ],
)  # fmt: skip
def test_failures_that_code_can_see(text, stopped, failure):
    row = {"prompt": [{"role": "user", "content": "住几晚？"}], "checks": {"max_chars": 5}}
    assert panel.failure({"text": text, "stopped": stopped}, row) == failure


def test_faulty_checks_are_named(tmp_path):
    bad = [{"prompt": "问", "checks": {"linez": 2}}, {"prompt": "问", "checks": {"items": "3"}},
           {"prompt": "问", "checks": {"regex": "("}}, {"prompt": "问", "checks": {"includes": [24]}},
           "问"]  # fmt: skip
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(bad, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserFault) as fault:
        compare.read_prompts(tmp_path / "p.yaml")
    text = str(fault.value)
    assert "5 unusable" in text and "checks.linez: unknown" in text
    assert "expected int" in text and "quote numbers" in text


# ------------------------------------------------------------------ the sheet


def answered() -> list[dict]:
    texts = {"base": "=1+1", "SFT": "二", "ORPO": "等于二"}
    return [{"id": f"p{i}", "group": "算术", "prompt": [{"role": "user", "content": f"{i}+1"}], "expected": None,
             "checks": {"max_chars": 9},
             "answers": {m: {"text": t, "tokens": 1, "stopped": True, "seconds": 0.1} for m, t in texts.items()}}
            for i in range(8)]  # fmt: skip


def fill(sheet, scores: dict[str, int], failure: str = "") -> None:
    """Score the sheet as a person would, by what the answers say."""
    rows = list(csv.DictReader(sheet.read_text(encoding="utf-8-sig").splitlines()))
    for row in rows:
        row["adherence"], row["failure_type"] = scores[row["answer"]], failure
    with open(sheet, "w", encoding="gb18030", newline="") as out:  # as Excel in China saves it
        writer = csv.DictWriter(out, panel.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def test_the_sheet_is_blind_and_comes_back(tmp_path):
    rows = answered()
    sheet = panel.write_sheet(tmp_path, rows, ["base", "SFT", "ORPO"], 42)
    text = sheet.read_text(encoding="utf-8-sig")
    assert "SFT" not in text and "ORPO" not in text and "'=1+1" in text
    first = [row["answer"] for row in csv.DictReader(text.splitlines())][::3]
    assert len(set(first)) > 1, "the models stand in another order for each prompt"
    fill(sheet, {"'=1+1": 0, "二": 3, "等于二": 5})
    found = panel.score(sheet)
    assert {m: s["mean"] for m, s in found["models"].items()} == {"base": 0, "SFT": 3, "ORPO": 5}
    pair = next(d for d in found["differences"] if (d["ours"], d["theirs"]) == ("ORPO", "SFT"))
    assert pair["value"] == 2 and pair["n"] == 8 and pair["p"] < 0.01
    assert read_json(tmp_path / "scores.json") == json.loads(json.dumps(found))
    assert "ORPO - SFT: +2.00" in "\n".join(panel.score_lines(found))
    with pytest.raises(UserFault, match="scores stand in it already"):
        panel.write_sheet(tmp_path, rows, ["base", "SFT", "ORPO"], 42)


def test_a_sheet_is_read_whatever_characters_its_answers_hold(tmp_path):
    rows = answered()
    for text in ("one\u2028two", "\x0b", "\x85,", "a\rb\nc"):
        rows[0]["answers"]["SFT"]["text"] = text
        sheet = panel.write_sheet(tmp_path, rows, ["base", "SFT", "ORPO"], 42)
        with pytest.raises(UserFault, match="no row has a score"):
            panel.score(sheet)


def test_a_sheet_filled_in_wrongly_is_told_line_by_line(tmp_path):
    sheet = panel.write_sheet(tmp_path, answered(), ["base", "SFT", "ORPO"], 42)
    with pytest.raises(UserFault, match="no row has a score"):
        panel.score(sheet)
    fill(sheet, {"'=1+1": 7, "二": 3, "等于二": 5}, failure="boring")
    with pytest.raises(UserFault, match="24 rows cannot be read") as fault:
        panel.score(sheet)
    assert "write 0 to 5" in str(fault.value) and "choose from off_topic" in str(fault.value)
    (tmp_path / "sheet_key.json").unlink()
    with pytest.raises(UserFault, match="sheet_key.json"):
        panel.score(sheet)


def test_the_command(base, tmp_path):
    values = {"hardware": "cpu", "output_dir": str(tmp_path / "out"), "prompts": str(ROOT / "configs/panel.yaml"),
              "adapters": {"SFT": str(make_adapter(base, tmp_path / "one", 1))}, "sheet": True,
              "generation": {"max_new_tokens": 4, "temperature": 0}}  # fmt: skip
    (tmp_path / "panel.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    plan, main = partial(infer_compare.plan, chat=None), partial(infer_compare.main, chat=None)
    done = run_here(InferCompare, plan, main, "--config", str(tmp_path / "panel.yaml"))
    assert done.returncode == 0, done.stderr
    assert "SFT: format right" in done.stdout and "--score" in done.stdout
    found = read_json(tmp_path / "out/manifest.json")["results"]["panel"]
    assert found["SFT"]["n"] == 30 and sum(counts[1] for counts in found["SFT"]["topics"].values()) == 30
    sheet = tmp_path / "out/sheet.csv"
    assert len(list(csv.DictReader(sheet.read_text(encoding="utf-8-sig").splitlines()))) >= 60
    command = [sys.executable, "-m", "scripts.infer_compare", "--score", str(sheet)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 2 and "no row has a score" in told.stderr and "Traceback" not in told.stderr
