"""The report on runs made by hand: what is followed, checked, counted, escaped, and named as missing."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import run_command, write_rows

from posttrain.report import checklist, content, figures, forecasts, lineage, listing, render, words
from posttrain.runs import describe_file, sha256
from posttrain.stages import Report

EVIL = '<script>alert("x")</script> | *a* `b`'


def write_run(folder: Path, stage: str, kind: str, results: dict, *, parents=(), inputs=None, outputs=(), prefix="",
              created="2026-11-20T10:00:00+00:00", **more) -> Path:  # fmt: skip
    """A finished run as runs.Run.finish writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    lineage_of = {}
    for role, parent in dict(parents).items():
        file = parent if parent.is_file() else parent / "manifest.json"
        lineage_of[role] = {"path": str(file), "sha256": sha256(file)}
    manifest = {
        "stage": stage, "kind": kind, "created": created, "seconds": 2.5, "resumed": False, "parents": lineage_of,
        "inputs": inputs or {}, "outputs": [describe_file(path) for path in outputs], "results": results, "config": {},
        "hardware": {"name": "cpu"}, "git": {"commit": "c0ffee" * 6, "dirty": False}, "versions": {"torch": "2.13.0"},
        "machine": {"host": "box", "platform": "Linux", "cpus": 2, "card": None, "vram_gib": None}, **more,
    }  # fmt: skip
    (folder / f"{prefix}manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    return folder


def adapter(folder: Path, stage: str, created: str, parents: dict, **config) -> Path:
    weights = folder / "adapter_model.safetensors"
    folder.mkdir(parents=True)
    weights.write_bytes(stage.encode())
    write_rows(folder / "metrics.jsonl", [
        {"step": 5, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0}, {"step": 10, "eval_loss": 1.5},
        {"step": 10, "loss": 1.2, "learning_rate": 5e-4, "grad_norm": 0.8},
    ])  # fmt: skip
    results = {"steps": 10, "kept": "best", "kept_step": 10, "first_loss": 2.0, "last_loss": 1.2, "best_eval_loss": 1.5}
    return write_run(
        folder,
        stage,
        "adapter",
        results,
        parents=parents,
        outputs=[weights],
        created=created,
        base={"id": "tiny/base", "path": "tiny/base", "fingerprint": "0" * 64},
        lora={"r": 8, "alpha": 16, "dropout": 0.0},
        schedule={"epochs": 2.0, "steps": 10, "rows_per_step": 4},
        precision="torch.float32",
        seeds={"seed": 42},
        data={
            "train_rows": 20,
            "trained_tokens": 300,
            "fates": {"kept": 20, "no_trained_token": 3},
            "notes": ["a note"],
        },
        peak_memory={"rss_gib": 0.5},
        config={"trainer": {"learning_rate": 1e-3, "max_length": 64}, **config},
    )


def news() -> dict:
    """A row of an answer set: a score on 0 to 100 with its signature, and one without contaminated items."""
    return {
        "task": "news", "metric": "bleu4", "n": 4, "n_shot": None, "signature": "sacrebleu:2|tok:zh|corpus|0-100",
        "scores": {"base": {"value": 0.5, "low": 0.1, "high": 0.9}, "sft": {"value": 0.75, "low": 0.1, "high": 0.9},
                   "align": {"value": 0.25, "low": 0.0, "high": 1.0, "clean": {"value": 0.125, "n": 3}}},
        "differences": {},
    }  # fmt: skip


def beside(models: list[str]) -> dict:
    """What stands beside the tables of an evaluation."""
    facts = {"classes": ["财经", "体育"], "confusion": [[2, 0, 1], [0, 1, 0]], "mean_tokens": 3.0}
    return {
        "answers": {"news": {model: facts for model in models}},
        "gates": [{"gate": "news/bleu4", "min": 0.5, "max": None, "signature": "s",
                   "models": {"sft": {"value": 0.75, "passed": True}, "align": {"value": 0.25, "passed": False}}}],
        "contamination": {"align": {"files": ["x.jsonl"], "notes": ["y.jsonl is gone"], "items": {"news": [1]}}},
    }  # fmt: skip


def panel_of(model: str) -> dict:
    """Facts of one model on the panel."""
    return {"n": 30, "format_correct": 12 if model == "base" else 27, "low": 0.3, "high": 0.97,
            "mean_characters": 120.0, "topics": {"写作": [3, 9], EVIL: [9, 21]}, "repetition": 0.04,
            "failures": {"format": 3}}  # fmt: skip


@pytest.fixture
def outputs(tmp_path):
    """data -> sft -> align, an evaluation and a comparison of both."""
    raw = write_rows(tmp_path / "raw.jsonl", [{"a": 1}])
    source = {"rows": 4, "read": 4, "kept": 3, "dropped": {"too_short": 1}}
    data = write_run(
        tmp_path / "proc", "prepare_data", "data",
        {"kind": "sft", "read": 4, "kept": 3, "dropped": {"too_short": 1}, "splits": {"train": 1, "val": 1, "test": 1},
         "sources": {"own": source}, "languages": {"zh": 3}, "chars": {"total": 90, "p50": 30, "p95": 40, "max": 40}},
        inputs={"raw": describe_file(raw)}, prefix="sft_", created="2026-11-20T09:00:00+00:00",
    )  # fmt: skip
    sft = adapter(tmp_path / "sft", "train_sft", "2026-11-20T10:00:00+00:00", {"data": data / "sft_manifest.json"})
    align = adapter(tmp_path / "align", "train_orpo", "2026-11-20T11:00:00+00:00", {"sft": sft}, beta=0.2)
    models, both = ["base", "sft", "align"], {"sft": sft, "align": align}
    task = {
        "task": "quiz",
        "metric": "acc",
        "n": 40,
        "n_shot": 0,
        "scores": {
            m: {"value": v, "low": v - 0.1, "high": v + 0.1} for m, v in zip(models, (0.5, 0.75, 0.35), strict=True)
        },
        "differences": {
            "sft": {"value": 0.25, "low": 0.1, "high": 0.4, "p": 0.04, "p_holm": 0.08, "flag": None},
            "align": {"value": -0.15, "low": -0.2, "high": -0.1, "p": 1e-5, "p_holm": 2e-5, "flag": "drop"},
        },
    }
    pref = {
        "rows": 9,
        "accuracy": dict.fromkeys(models, 0.5),
        "margin": dict.fromkeys(models, 1.25),
        "intervals": {kind: dict.fromkeys(models, [0.4, 0.6]) for kind in ("accuracy", "margin")},
        "differences": {},
    }
    write_run(
        tmp_path / "eval",
        "eval_harness",
        "eval",
        {"models": models, "tasks": [task, news()], "sft_test": None, "pref_test": pref, **beside(models)},
        parents=both,
        created="2026-11-20T12:00:00+00:00",
    )
    prompts = write_rows(tmp_path / "prompts.jsonl", [
        {"id": "1", "prompt": "一？", "answer": "一。", "group": "seen", "meta": {"format": ".。"}},
        {"id": "2", "prompt": EVIL, "answer": "二。", "group": "seen", "meta": {"format": ".。"}},
        {"id": "3", "prompt": "闲聊", "group": "open"},
    ])  # fmt: skip
    texts = {"base": ("一。", EVIL, "嗯"), "sft": ("一。", "三。", "好"), "align": ("一。", "二。", "好")}
    rows = [
        {
            "id": str(i + 1),
            "group": "open" if i == 2 else "seen",
            "prompt": [{"role": "user", "content": ("一？", EVIL, "闲聊")[i]}],
            "expected": (("一。", "二。", None)[i]),
            "answers": {m: {"text": texts[m][i], "tokens": 2, "stopped": m != "base", "seconds": 0.1} for m in models},
        }
        for i in range(3)
    ]
    answers = write_rows(tmp_path / "compare/answers.jsonl", rows)
    groups = {
        "seen": {
            m: {"n": 2, "expected": 2, "exact": e, "stopped": 0 if m == "base" else 2}
            for m, e in zip(models, (1, 1, 2), strict=True)
        },
        "open": {m: {"n": 1, "expected": 0, "exact": None, "stopped": int(m != "base")} for m in models},
    }
    write_run(
        tmp_path / "compare",
        "infer_compare",
        "compare",
        {"models": models, "groups": groups, "panel": {m: panel_of(m) for m in models}},
        parents=both,
        inputs={"prompts": describe_file(prompts)},
        outputs=[answers],
        created="2026-11-20T13:00:00+00:00",
    )
    return tmp_path


def collected(outputs: Path, *names: str) -> lineage.Lineage:
    return lineage.collect([outputs / name for name in names or ("eval", "compare")])


def files(outputs: Path, **config) -> tuple[str, str]:
    folder = outputs / "report"
    folder.mkdir(exist_ok=True)
    config = Report(output_dir=folder, markdown=folder / "report.md", **config)
    html, markdown, *_ = render.render(collected(outputs), config)
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


# ------------------------------------------------------------------ lineage


def test_parents_are_followed_and_everything_matches(outputs):
    found = collected(outputs)
    assert [run.stage for run in found.runs.values()] == [
        "prepare_data",
        "train_sft",
        "train_orpo",
        "eval_harness",
        "infer_compare",
    ]
    assert not found.missing and not found.broken and len(found.checks) > 8


def test_a_changed_and_a_lost_file_are_told(outputs):
    (outputs / "raw.jsonl").write_text("{}\n")
    (outputs / "sft/adapter_model.safetensors").unlink()
    found = collected(outputs)
    assert {(Path(c.path).name, c.state) for c in found.broken} == {
        ("raw.jsonl", "changed"),
        ("adapter_model.safetensors", "gone"),
    }
    html = files(outputs)[0]
    assert "2 个文件与记录不符" in html and "全部核对过" not in html


def test_a_parent_that_was_run_again_is_told(outputs):
    manifest = outputs / "sft/manifest.json"
    manifest.write_text(manifest.read_text().replace('"seconds": 2.5', '"seconds": 3.5'))
    broken = collected(outputs).broken
    assert {c.role for c in broken} == {"parent sft"} and {c.state for c in broken} == {"changed"}


def test_a_parent_that_made_the_same_files_again_is_not_a_fault(outputs):
    weights = outputs / "sft/adapter_model.safetensors"
    write_run(outputs / "new", "export_lora", "adapter_export", {}, parents={"adapter": outputs / "sft"},
              inputs={"adapter": describe_file(weights)})  # fmt: skip
    manifest = outputs / "sft/manifest.json"
    manifest.write_text(manifest.read_text().replace('"seconds": 2.5', '"seconds": 3.5'))
    found = collected(outputs, "new")
    assert not found.broken and [c.state for c in found.checks if c.role == "parent adapter"] == ["remade"]


def test_missing_and_unfinished_runs_are_named(outputs):
    status = {
        "stage": "export_lora",
        "state": "failed",
        "time": "2026-11-20T10:00:00+00:00",
        "message": "no space\nmore",
    }
    (outputs / "merged").mkdir()
    (outputs / "merged/status.json").write_text(json.dumps(status))
    (outputs / "proc/sft_manifest.json").unlink()
    missing = "\n".join(map(str, collected(outputs, "eval", "merged", "nowhere").missing))
    assert "failed since" in missing and "no space" in missing and "more" not in missing
    assert "nowhere: not there (asked for by the config)" in missing
    assert re.search(r"proc: not there \(named by .*sft\)", missing)


def test_a_model_directory_is_checked_by_its_fingerprint(outputs, tmp_path):
    from posttrain.runs import fingerprint

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    entry = {"base": {"id": "base", "path": str(base), "fingerprint": fingerprint(base)}}
    write_run(outputs / "sft2", "train_sft", "adapter", {}, inputs=entry)
    assert [c.state for c in collected(outputs, "sft2").checks] == ["ok"]
    (base / "config.json").write_text('{"other": 1}')
    assert [c.state for c in collected(outputs, "sft2").checks] == ["changed"]


# ------------------------------------------------------------------ numbers


def test_the_numbers_are_those_of_the_manifests(outputs):
    found = collected(outputs)
    columns = content.columns_of(found)
    assert [column.label for column in columns] == ["Base", "SFT", "ORPO"]
    rows = {(row.name, row.measure): row for row in content.summary_rows(found)}
    keys = [column.key for column in columns]

    def values(*key):
        return [rows[key].cells[k].value for k in keys]

    assert values("seen", "exact match") == [0.5, 0.5, 1.0]
    assert values("all prompts", "ended by itself") == [0, 1, 1]
    assert values("all prompts", "format and end right") == [0, 1, 1]  # the base's "一。" did not end
    assert rows["all prompts", "format and end right"].n == 2
    assert values("quiz", "acc") == [0.5, 0.75, 0.35]
    assert rows["quiz", "acc"].best == {keys[1]} and rows["quiz", "acc"].cells[keys[2]].drop
    one_of_two = rows["seen", "exact match"].cells[keys[0]]
    assert one_of_two.interval == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert not rows["pref_test", "preference accuracy"].best, "all the same: nobody is best"
    assert ("open", "exact match") not in rows
    top = [row.measure for row in content.headline(list(rows.values()))]
    assert top == ["exact match", "format and end right", "preference accuracy"]


def test_two_runs_of_one_stage_are_told_apart(outputs):
    other = adapter(outputs / "align_b", "train_orpo", "2026-11-20T11:30:00+00:00", {"sft": outputs / "sft"})
    results = {"models": ["one", "two"], "groups": {}}
    write_run(
        outputs / "compare2", "infer_compare", "compare", results, parents={"one": outputs / "align", "two": other}
    )
    assert [c.label for c in content.columns_of(collected(outputs, "compare2"))] == ["ORPO align", "ORPO align_b"]


def test_knobs_are_written_as_people_write_them():
    written = {2e-4: "2e-4", 1.5e-4: "1.5e-4", 0.05: "0.05", 0.0: "0", 12345: "12,345", True: "on", "nf4": "nf4"}
    assert {value: render.knob(value) for value in written} == written


# ------------------------------------------------------------------ files


def test_what_stands_beside_the_tables(outputs):
    html, markdown = files(outputs)
    assert "去掉训练数据里出现过的题目" in html and "0.1250" in html and "y.jsonl is gone" in html
    assert "sacrebleu:2|tok:zh" in html and "未达标" in html and "27/30" in html
    assert "0.750" in html and "75.0%" in html, "BLEU of 0.75 is no share, an accuracy of 0.75 is"
    assert "人工打分：未测" in html and "人工打分：未测" in markdown and "| 财经 | 2 | 0 | 1 |" in markdown
    scores = {"models": {"sft": {"n": 8, "mean": 3.25, "low": 3.0, "high": 3.5, "failures": {"verbose": 2}}},
              "differences": [{"ours": "align", "theirs": "sft", "n": 8, "value": 1.5, "low": 1.0, "high": 2.0,
                               "p_holm": 0.01}]}  # fmt: skip
    (outputs / "compare/scores.json").write_text(json.dumps(scores), encoding="utf-8")
    html, markdown = files(outputs)
    assert "align − sft：+1.50 [+1.00, +2.00]" in html and "3.25 / 5" in markdown


def test_the_page_is_self_contained_and_text_is_escaped(outputs):
    html, markdown = files(outputs)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r'(?:src|href)="(?!data:image/svg\+xml;base64,|#)', html), "something is loaded from elsewhere"
    assert "@import" not in html and "url(" not in html and "http" not in re.sub(
        r"base64,[\w+/=]+|http://www.w3.org/2000/svg", "", html)  # fmt: skip
    assert html.count("data:image/svg+xml;base64,") == 3, "a picture of the data, and curves of two trainings"
    assert "<script" not in markdown and "\\| \\*a\\* \\`b\\`" in markdown


def test_every_section_says_what_it_has(outputs):
    html, markdown = files(outputs, title="我的报告", notes=["一句话"], captions={"seen": "见过的"})
    for text in (
        "我的报告",
        "一句话",
        "见过的",
        "too_short 1",
        "no_trained_token",
        "a note",
        "c0ffeec0ff",
        "tiny/base",
        "低于基座",
    ):
        assert text in html, text
    for text in ("我的报告", "见过的", "| own | 4 | 4 | 3 | too\\_short 1 |", "没有找到导出的运行"):
        assert text in markdown, text
    assert "没有找到导出的运行" in html


def test_tables_of_the_markdown_hold_together(outputs):
    widths = set()
    for line in files(outputs)[1].splitlines():
        if line.startswith("|"):
            widths.add(len(re.findall(r"(?<!\\)\|", line)))
        elif widths:
            assert len(widths) == 1
            widths = set()


def test_samples_are_the_first_ones(outputs):
    found = collected(outputs)
    assert [len(g["rows"]) for g in content.samples(found, Report(num_samples=1))] == [1, 1]
    assert content.samples(found, Report(num_samples=0))[0]["rows"] == []
    given = {a["key"].rpartition("/")[2]: a["right"] for a in content.samples(found, Report())[0]["rows"][1]["answers"]}
    assert given == {"base": False, "sft": False, "align": True}


def test_curves_show_what_was_logged():
    assert figures.curves([], None) is None
    assert figures.curves([{"step": 1, "epoch": 5}], None) is None
    picture, abreast = figures.curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], 2, {"loss": "损失"}.get)
    assert "<svg" in picture and ">损失</text>" in picture and abreast == 1
    pairs = [
        {"step": s, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4, "rewards/accuracies": 0.5} for s in (1, 2)
    ]
    assert figures.curves(pairs, None)[1] == 3


# ------------------------------------------------------------------ the command


def config_of(outputs: Path, *names: str) -> Path:
    path = outputs / "report.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "runs": [str(outputs / name) for name in names],
                "output_dir": str(outputs / "report"),
                "markdown": str(outputs / "paper/paper.md"),
                "outputs_dir": str(outputs),
            }
        )
    )
    return path


def test_the_command_makes_both_files_once(outputs):
    config = str(config_of(outputs, "eval", "compare", "gone"))
    done = run_command("-m", "scripts.report", "--config", config)
    assert done.returncode == 0, done.stderr
    assert "exact match" in done.stdout and "missing:" in done.stdout
    assert (outputs / "report/report.html").is_file() and (outputs / "paper/paper.md").is_file()
    assert "nothing to do" in run_command("-m", "scripts.report", "--config", config).stdout
    (outputs / "raw.jsonl").write_text("{}\n")
    assert "changed: " in run_command("-m", "scripts.report", "--config", config).stdout


def test_without_any_run_it_says_so(outputs):
    config = str(config_of(outputs, "gone"))
    done = run_command("-m", "scripts.report", "--config", config)
    assert done.returncode == 2 and "is a finished run" in done.stderr and "Traceback" not in done.stderr
    assert run_command("-m", "scripts.report", "--config", config, "--dry-run").returncode == 0


def test_a_record_of_an_older_version_is_told(outputs):
    file = outputs / "eval/manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["results"]["pref_test"]["intervals"]
    file.write_text(json.dumps(manifest))
    done = run_command("-m", "scripts.report", "--config", str(config_of(outputs, "eval")))
    assert done.returncode == 2 and "has no 'intervals'" in done.stderr and "--verify names it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["[]", "{}", "{\"stage\": \"train_sft\"}", "\x00", "null"])
def test_a_damaged_manifest_is_named(outputs, text):
    (outputs / "sft/manifest.json").write_text(text)
    found = collected(outputs, "align", "sft")
    assert "sft: damaged (named by" in str(found.missing[0])
    assert [run.stage for run in found.runs.values()] == ["train_orpo"]
    line = next(line for line in listing.list_runs(outputs).splitlines() if "/sft " in line)
    assert line.split()[1:3] == ["?", "damaged"]


def test_all_runs_are_listed_with_their_knobs(outputs):
    (outputs / "broken").mkdir()
    (outputs / "broken/status.json").write_text(
        '{"stage": "train_dpo", "state": "interrupted", "time": "2026-11-20T14:00:00+00:00"}'
    )
    text = listing.list_runs(outputs)
    line = next(line for line in text.splitlines() if "/align " in line)
    assert line.split()[1:8] == ["train_orpo", "done", "1e-3", "0.2", "8", "2", "10"]
    assert "quiz 0.500/0.750/0.350" in text and "interrupted" in text and "kept 3 of 4" in text
    done = run_command("-m", "scripts.report", "--config", str(config_of(outputs, "eval")), "--runs")
    assert done.returncode == 0 and "train_orpo" in done.stdout
    empty = outputs / "empty"
    done = run_command("-m", "scripts.report", "--runs", "--set", f"outputs_dir={empty}")
    assert done.returncode == 2 and "no run under" in done.stderr


def test_a_diff_names_what_differs(outputs):
    done = run_command("-m", "scripts.report", "--diff", str(outputs / "sft"), str(outputs / "align"))
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert ["beta", "-", "0.2"] in rows and ["stage", "train_sft", "train_orpo"] in rows
    assert not any(row[0] == "trainer.learning_rate" for row in rows)
    write_rows(outputs / "sft/metrics.jsonl", [{"step": 1, "loss": 1.0}])
    other = adapter(outputs / "sft_b", "train_sft", "2026-11-20T15:00:00+00:00", {})
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["results"]["best_eval_loss"], manifest["versions"]["torch"] = 1.25, "2.14.0"
    (other / "manifest.json").write_text(json.dumps(manifest))
    told = listing.diff(str(outputs / "sft"), str(other)).splitlines()
    assert [line.split() for line in told[1:]] == [["versions"], ["torch", "2.13.0", "2.14.0"], ["results"],
                                                   ["best_eval_loss", "1.5", "1.25", "-0.25"]]  # fmt: skip
    assert "same results" in listing.diff(str(other), str(other))
    assert "it holds" in run_command("-m", "scripts.report", "--diff", str(outputs / "proc"), str(other)).stderr
    assert "kept" in listing.diff(str(outputs / "proc/sft"), str(other))
    done = run_command("-m", "scripts.report", "--diff", str(outputs / "sft"), str(outputs / "nowhere"))
    assert done.returncode == 2 and "no finished run there" in done.stderr


# ------------------------------------------------------------------ symptoms


def answers_of(**texts: list[str]) -> list[dict]:
    """Rows of answers.jsonl: a text per model and prompt; one that ends in … was cut."""
    asked = [{"role": "user", "content": "请介绍一下北京的秋天"}]
    return [
        {"id": str(i), "group": "all", "expected": None, "prompt": asked,
         "answers": {m: {"text": some[i], "stopped": not some[i].endswith("…")} for m, some in texts.items()}}
        for i in range(10)
    ]  # fmt: skip


PLAIN = [f"北京的秋天天高气爽，适合登山，第{i}天去香山看红叶最好。" for i in range(10)]
SHOWN = {
    "Babbles past the end": [text + "…" for text in PLAIN],
    "Repeats itself": [text + "好的好的" * 30 for text in PLAIN],
    "Refuses too much": ["抱歉，我无法回答这个问题。"] * 10,
    "Answers in English": ["Autumn in Beijing is clear and cool."] * 10,
    "Too long": [text * 1 + "".join(chr(0x4E00 + 7 * i + j) for j in range(40)) for i, text in enumerate(PLAIN)],
    "Too short": ["好。"] * 10,
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_symptom_is_named_from_the_answers(name, tmp_path):
    from posttrain.report.symptoms import of_answers

    parents = {"sft": {"path": "outputs/sft/manifest.json"}, "dpo": {"path": "outputs/dpo/manifest.json"}}
    run = lineage.FoundRun(tmp_path / "manifest.json", {"parents": parents})
    label = {"base": "Base", "outputs/sft": "SFT", "outputs/dpo": "DPO"}
    write_rows(tmp_path / "answers.jsonl", answers_of(base=PLAIN, sft=PLAIN, dpo=SHOWN[name]))
    found = of_answers(run, label)
    assert [(s.name, s.who) for s in found if s.name == name] == [(name, "DPO")]
    assert not any(s.who == "SFT" for s in found)
    write_rows(tmp_path / "answers.jsonl", answers_of(base=SHOWN[name], sft=PLAIN, dpo=PLAIN))
    assert of_answers(run, label) == []


@pytest.mark.parametrize(("losses", "validated", "names"), [
    ([2.0, 1.5, 1.2, 1.0, 0.9], [1.2, 1.1, 1.0], []),
    ([2.0, 1.5, 1.2, 1.0, 0.9], [1.2, 1.0, 1.1], ["Validation loss rising"]),
    ([0.693, 0.692, 0.694, 0.693, 0.693], [], ["Loss flat"]),
    ([2.0, 0.5, 0.1, 0.01, 0.001], [], ["Loss 0"]),
    ([2.0, float("nan")], [], ["Loss NaN"]),
])  # fmt: skip
def test_a_symptom_is_named_from_the_curves(losses, validated, names):
    from posttrain.report.symptoms import of_metrics

    lines = [{"loss": loss} for loss in losses] + [{"eval_loss": loss} for loss in validated]
    assert [symptom.name for symptom in of_metrics("SFT", lines)] == names


def test_symptoms_stand_in_the_report_and_in_the_docs(outputs):
    """A drop that the evaluation flags is named on the page, and every name is a heading of docs/symptoms.md."""
    from posttrain.config import ROOT
    from posttrain.report import symptoms
    from posttrain.report.symptoms import Symptom

    html, markdown = files(outputs)
    assert "丢了原有的能力" in html and "docs/symptoms.md#lost-its-general-skill" in markdown
    assert "Lost its general skill" in files(outputs, language="en")[0]
    headings = [line[3:] for line in (ROOT / "docs/symptoms.md").read_text().splitlines() if line.startswith("## ")]
    source = (ROOT / "posttrain/report/symptoms.py").read_text()
    named = re.findall(r'Symptom\("([^"]+)"', source)
    named += re.findall(r"Symptom\(\n?\s*\"([^\"]+)\"", source)
    named += [*symptoms.OF_RATES.values(), "Lost its general skill"]
    assert set(named) == set(headings) == set(words.SYMPTOMS) and len(headings) == 12
    assert Symptom("Loss 0", "", "").anchor == "loss-0"


@pytest.mark.parametrize(("measure", "name"), [
    ("over_refusal", "Refuses too much"), ("jailbreak_rate", "Gives in to harmful requests"),
    ("acc", "Lost its general skill"),
])  # fmt: skip
def test_a_rate_of_a_safety_test_is_no_skill(measure, name):
    from posttrain.report import risks
    from posttrain.report.symptoms import of_task

    row = content.Row("safety_own", measure, 200, "%", "lower", {"x": content.Cell(0.5, None, 0.4, None, 0.01, True)})
    assert [symptom.name for symptom in of_task(row, {})] == [name]
    lost = next(line for line in risks.risks(lineage.Lineage(), [row]) if line.asked[1].startswith("no skill"))
    assert lost.state == ("no" if measure == "acc" else "not measured")


@pytest.mark.parametrize("dead", (False, True))
def test_the_safety_of_a_dead_model_is_not_measured(outputs, dead):
    from posttrain.report import risks

    file = outputs / "eval/manifest.json"
    manifest = json.loads(file.read_text())
    models = {"base": {"dead": False}, "sft": {"dead": dead}}
    manifest["results"]["safety"] = {"files": {"safety_own": {"models": models}}}
    file.write_text(json.dumps(manifest))
    line = next(line for line in risks.risks(collected(outputs), []) if line.asked[1].startswith("behaviour"))
    assert line.state == ("not measured" if dead else "yes") and ("of sft can be judged" in line.found[1]) == dead


def test_words_that_were_not_looked_for_are_not_measured(outputs):
    from posttrain.report import risks

    def state(**config) -> str:
        file = outputs / "proc/sft_manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"config": config}))
        return next(line.state for line in risks.risks(collected(outputs), []) if "listed" in line.asked[1])

    assert state() == state(rules={"keywords": "keep"}, keywords={"a": "x.txt"}) == "not measured"
    assert state(rules={"keywords": "flag"}, keywords={"a": "x.txt"}) == state(blacklist=["x"]) == "yes"


def test_lists_that_changed_are_not_fetched(outputs):
    file = outputs / "proc/sft_manifest.json"
    manifest = json.loads(file.read_text())
    manifest["inputs"] = {"rules/words.txt": manifest["inputs"]["raw"]}
    file.write_text(json.dumps(manifest))
    (outputs / "raw.jsonl").write_text("{}\n")
    line = checklist.raw_files(collected(outputs))
    assert line.state == "no" and line.command.startswith("python -m scripts.prepare_data --config")


def test_markdown_stays_text_and_loads_no_picture():
    cell = render.markdown_cell("a\x00b\x1b[31m ![x](http://tracker/a.png)")
    assert "\x00" not in cell and "\x1b" not in cell and "](" not in cell and "tracker" in cell


def test_forecast_and_fact_stand_side_by_side():
    peak = {"rss_gib": 2.0, "allocated_gib": 6.2, "reserved_gib": 6.9, "context_gib": 0.31}
    manifest = {
        "forecast": {"total_gib": 7.0, "allocated_gib": 6.1, "reserved_gib": 6.6}, "peak_memory": peak,
        "time": {"forecast": {"seconds": [3000, 9000]}, "train_seconds": 3600.0}, "resumed": False,
        "config": {"price_per_hour": 1.5},
    }  # fmt: skip

    def rows(**changes) -> dict[str, tuple]:
        found = forecasts.compared(lineage.FoundRun(Path("x/manifest.json"), manifest | changes))
        return {row.measure: (row.forecast, row.fact, row.difference) for row in found}

    on_card = rows()
    assert on_card["tensors"] == ("6.10 GiB", "6.20 GiB", "+1.6%")
    assert on_card["card"] == ("7.00 GiB", "7.21 GiB", "+3.0%")
    assert on_card["time"] == ("50 min – 2.5 h", "60 min", "within")
    assert on_card["cost"] == ("1.25 – 3.75", "1.50", "within")
    assert rows(resumed=True)["time"][1] == "not measured"
    on_cpu = rows(peak_memory={"rss_gib": 2.1}, forecast={"not_made": "short"}, time={})
    assert on_cpu["process"] == ("not forecast", "2.10 GiB", "")
    assert on_cpu["time"][:2] == ("not forecast", "not measured")
    del manifest["forecast"]
    assert rows() == {}, "an older run says nothing"


def test_remedies_name_keys_that_exist():
    """Every `key: value` and --set key=value of docs/symptoms.md is a key of some stage."""
    from posttrain.config import ROOT, schema_keys
    from posttrain.stages import STAGES

    page = (ROOT / "docs/symptoms.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*): [^`]+`", page)) | set(re.findall(r"--set \"?([a-z_.]+)=", page))
    known = {key for stage in STAGES.values() for key in schema_keys(stage)} | {"temperature", "tokens_per_step"}
    assert len(named) > 20 and named <= known, named - known


# ------------------------------------------------------------------ two languages

CHINESE = re.compile("[\u3001-\u303f\u4e00-\u9fff\uff00-\uff3b]")


@pytest.mark.parametrize("name", sorted(path.name for path in render.TEMPLATES.glob("*.jinja")))
def test_every_sentence_of_a_template_stands_in_both_languages(name):
    text = re.sub(r"{#.*?#}", "", (render.TEMPLATES / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    said = re.findall(r't\("((?:[^"\\]|\\.)*)",\s*"((?:[^"\\]|\\.)*)"', text)
    assert not [pair for pair in said if CHINESE.search(pair[1])]
    places = re.compile(r"%[.\d]*[sdfg]")
    assert not [pair for pair in said if places.findall(pair[0]) != places.findall(pair[1])], "as many numbers in both"
    rest = re.sub(r't\("(?:[^"\\]|\\.)*",\s*"(?:[^"\\]|\\.)*"', "", text)
    assert not CHINESE.search(rest), CHINESE.search(rest)


def test_every_name_has_both_words():
    for table in render.TABLES.values():
        for name, (chinese, english) in table.items():
            assert chinese and english and not CHINESE.search(english), name


def test_the_page_speaks_one_language(outputs):
    chinese, english = "不等于没有风险", "does not mean that there is no risk"
    for language, tag, said, unsaid in (("zh", "zh-CN", chinese, english), ("en", "en", english, chinese)):
        html, markdown = files(outputs, language=language)
        assert f'<html lang="{tag}">' in html
        for text in (html, markdown):
            assert said in text and unsaid not in text


# ------------------------------------------------------------------ checklist, chain, commands


def lines_of(found: lineage.Lineage) -> dict[str, tuple]:
    return {line.asked[1]: (line.state, line.found[1], line.command) for line in checklist.checklist(found)}


def test_the_checklist_is_filled_in_from_the_files(outputs):
    lines, raw = lines_of(collected(outputs)), "raw files are there, with sizes and hashes"
    assert lines[raw][:2] == ("yes", "files: 1, 9 B in all, every SHA-256 as recorded")
    assert lines["every split of sft is there"][0] == "yes"
    assert lines["the validation loss of SFT is stable"][0] == "not measured"
    assert "--set trainer.save_steps=2" in lines["the validation loss of SFT is stable"][2]
    assert lines["evaluations are complete"][:2] == ("yes", "3 models × 2 tasks")
    assert lines["sample prompts are answered in format"][:2] == ("yes", "align: 27 of 30 (90 % asked)")
    assert lines["the export was reloaded and checked"][0] == "not measured"
    assert lines["the code is committed, one set of versions"][0] == "yes"
    (outputs / "raw.jsonl").unlink()
    manifest = outputs / "proc/sft_manifest.json"
    manifest.write_text(manifest.read_text().replace('"val": 1', '"val": 0'))
    adapter(outputs / "dpo", "train_dpo", "2026-11-20T11:40:00+00:00", {"sft": outputs / "sft"})
    lines = lines_of(collected(outputs, "eval", "compare", "dpo"))
    assert lines[raw][0] == "no"
    assert lines["every split of sft is there"][0] == "no"
    state, found, command = lines["evaluations are complete"]
    assert state == "no" and found.endswith("dpo") and "peft_adapter=[" in command
    assert {line[0] for line in lines_of(lineage.Lineage()).values()} <= {"not measured", "no", "yes"}


@pytest.mark.parametrize(("losses", "stable"), [
    ([3.0, 2.0, 1.5, 1.2, 1.01, 1.0, 1.0, 0.99, 0.99], True),
    ([3.0, 2.0, 1.5, 1.0, 1.01, 1.02, 1.03, 1.03, 1.04], False),  # it turned up
    ([3.0, 2.7, 2.4, 2.1, 1.8, 1.5], False),  # it still falls
    ([1.0, 1.0, 1.0], True),
])  # fmt: skip
def test_a_validation_loss_is_stable_by_the_rule(losses, stable):
    assert checklist.settled(losses)[0] is stable


def test_a_preference_loss_that_does_not_fall_is_told(outputs):
    metrics = outputs / "align/metrics.jsonl"
    write_rows(metrics, [{"step": i, "loss": loss} for i, loss in enumerate([0.7, 0.6, 0.6, 0.5, 0.5])])
    assert lines_of(collected(outputs))["the preference loss of ORPO falls"][0] == "yes"
    write_rows(metrics, [{"step": i, "loss": loss} for i, loss in enumerate([0.5, 0.6, 0.6, 0.5, 0.7])])
    assert lines_of(collected(outputs))["the preference loss of ORPO falls"][0] == "no"


def test_the_chain_has_a_box_a_run_and_arrows_from_the_nearest(outputs):
    from posttrain.report import chain

    found = collected(outputs)
    boxes = {Path(box.name).name: box for box in chain.boxes_of(found) if not box.is_bend}
    above = {name: sorted(Path(other.name).name for other in box.above) for name, box in boxes.items()}
    assert above["eval"] == above["compare"] == ["align"] and above["align"] == ["sft"], above
    (outputs / "sft/adapter_model.safetensors").write_bytes(b"other")
    picture = chain.picture(collected(outputs), "en", 2)
    assert picture.count("<rect") == 6 and "supervised fine-tuning" in picture and chain.BAD in picture
    assert chain.BAD not in chain.picture(found, "en", 4)


def test_commands_and_digests_to_make_it_again(outputs):
    from posttrain.report import reproduce

    (outputs / "proc/sft_config.yaml").write_text("stage: sft\n")
    found = collected(outputs)
    commands = reproduce.commands(found)
    assert commands[0] == f"python -m scripts.prepare_data --config {outputs}/proc/sft_config.yaml"
    assert len(commands) == 5 and "as typed then" in commands[1]
    points = {Path(entry["path"]).name: entry for entry in reproduce.starting_points(found)}
    assert set(points) == {"raw.jsonl", "prompts.jsonl"}
    assert points["raw.jsonl"]["digest"] == sha256(outputs / "raw.jsonl")
    assert "torch==2.13.0" in reproduce.packages(found)
    write_run(outputs / "merged", "export_lora", "model", {}, parents={"adapter": outputs / "sft"},
              created="2026-11-20T16:00:00+00:00",
              config={"mode": "merged", "output_dir": str(outputs / "merged"), "dtype": None})  # fmt: skip
    (outputs / "sft/config.yaml").write_text("stage: sft\n")
    command = reproduce.commands(collected(outputs, "merged"))[-1]
    assert command == (f"python -m scripts.export_lora --config {outputs}/sft/config.yaml --set export.mode=merged "
                       f"--set export.output_dir={outputs}/merged")  # fmt: skip


def test_what_is_not_known_is_not_measured(tmp_path):
    """A report of a run without data, evaluation, answers, curves or export."""
    write_run(tmp_path / "sft", "train_sft", "adapter", {})
    found = lineage.collect([tmp_path / "sft"])
    for language, word in (("zh", "未测"), ("en", "not measured")):
        config = Report(output_dir=tmp_path, markdown=tmp_path / "report.md", language=language)
        for path in render.render(found, config)[:2]:
            assert path.read_text(encoding="utf-8").lower().count(word) >= 8, path


def test_a_report_changed_by_hand_is_set_aside(outputs):
    config = str(config_of(outputs, "eval"))
    assert run_command("-m", "scripts.report", "--config", config).returncode == 0
    paper = outputs / "paper/paper.md"
    assert list((outputs / "paper/paper_files").glob("*.svg"))
    paper.write_text("my own words", encoding="utf-8")
    told = run_command("-m", "scripts.report", "--config", config, "--set", "language=en", "--dry-run").stdout
    assert "was changed by hand; it will be set aside" in told
    done = run_command("-m", "scripts.report", "--config", config, "--set", "language=en")
    assert done.returncode == 0 and "it is set aside as" in done.stdout
    aside = [path for path in (outputs / "paper").glob("paper.*.md")]
    assert [path.read_text(encoding="utf-8") for path in aside] == ["my own words"] and "1. Goal" in paper.read_text()


# ------------------------------------------------------------------ --verify


def test_the_data_are_counted_again_and_the_page_must_be_of_these_manifests(outputs):
    from posttrain.errors import CheckFailed
    from posttrain.report.verify import page, verify

    rows = [{"id": str(i), "source": "own", "messages": [{"role": "user", "content": "问"}],
             "meta": {"lang": "zh", "chars": chars}} for i, chars in enumerate((20, 30, 40))]  # fmt: skip
    for split, row in zip(("train", "val", "test"), rows, strict=True):
        write_rows(outputs / f"proc/sft_{split}.jsonl", [row])
    assert any("proc/sft: " in line and "10 numbers" in line for line in verify(collected(outputs, "sft"), {}))
    write_rows(outputs / "proc/sft_val.jsonl", [rows[1] | {"meta": {"lang": "en", "chars": 31}}])
    with pytest.raises(CheckFailed, match="records in zh is recorded as 3, the files say 2") as told:
        verify(collected(outputs, "sft"), {})
    assert "chars total is recorded as 90, the files say 91" in str(told.value)

    config = str(config_of(outputs, "sft"))
    assert run_command("-m", "scripts.report", "--config", config).returncode == 0
    report = outputs / "report"
    assert page(report, collected(outputs, "sft"))[0] == []
    (outputs / "paper/paper.md").write_text("mine")
    assert "paper.md was changed by hand" in page(report, collected(outputs, "sft"))[1][0]
    html = report / "report.html"
    html.write_text(html.read_text(encoding="utf-8").replace("c0ffee", "c0ffef"), encoding="utf-8")
    assert "report.html was changed by hand" in page(report, collected(outputs, "sft"))[0][0]
    manifest = outputs / "sft/manifest.json"
    manifest.write_text(manifest.read_text().replace('"first_loss": 2.0', '"first_loss": 1.9'))
    faults = "\n".join(page(report, collected(outputs, "sft"))[0])
    assert "was as it is now; make the report again" in faults
