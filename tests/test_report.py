"""The report on runs made by hand: what is followed, checked, counted, escaped, and named as missing."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import run_command, write_rows

from posttrain.report import content, figures, lineage, listing, render
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


@pytest.fixture
def outputs(tmp_path):
    """data -> sft -> align, an evaluation and a comparison of both."""
    raw = write_rows(tmp_path / "raw.jsonl", [{"a": 1}])
    source = {"rows": 4, "read": 4, "kept": 3, "dropped": {"too_short": 1}}
    data = write_run(
        tmp_path / "proc", "prepare_data", "data",
        {"kind": "sft", "read": 4, "kept": 3, "dropped": {"too_short": 1}, "splits": {"train": 1, "val": 1, "test": 1},
         "sources": {"own": source}, "languages": {"zh": 3}, "chars": {"total": 90, "p50": 30, "p95": 40, "max": 44}},
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
        {"models": models, "tasks": [task], "sft_test": None, "pref_test": pref},
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
        {"models": models, "groups": groups},
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
    html, markdown = render.render(collected(outputs), Report(**config), folder)
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
    missing = "\n".join(collected(outputs, "eval", "merged", "nowhere").missing)
    assert "failed since" in missing and "no space" in missing and "more" not in missing
    assert "nowhere: not there (asked for by the config)" in missing
    assert re.search(r"proc: not there \(a parent of .*sft\)", missing)


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


def test_the_page_is_self_contained_and_text_is_escaped(outputs):
    html, markdown = files(outputs)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r'(?:src|href)="(?!data:image/svg\+xml;base64,|#)', html), "something is loaded from elsewhere"
    assert "@import" not in html and "url(" not in html and "http" not in re.sub(r"base64,[\w+/=]+", "", html)
    assert html.count("data:image/svg+xml;base64,") == 2
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
    assert figures.curves([{"step": 1, "tokens_per_second": 5}], None) is None
    picture, abreast = figures.curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], kept_step=2)
    assert picture.startswith("data:image/svg+xml;base64,") and abreast == 1
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
    assert (outputs / "report/report.html").is_file() and (outputs / "report/report.md").is_file()
    assert "nothing to do" in run_command("-m", "scripts.report", "--config", config).stdout
    (outputs / "raw.jsonl").write_text("{}\n")
    assert "changed: " in run_command("-m", "scripts.report", "--config", config).stdout


def test_without_any_run_it_says_so(outputs):
    config = str(config_of(outputs, "gone"))
    done = run_command("-m", "scripts.report", "--config", config)
    assert done.returncode == 2 and "is a finished run" in done.stderr and "Traceback" not in done.stderr
    assert run_command("-m", "scripts.report", "--config", config, "--dry-run").returncode == 0


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
    done = run_command("-m", "scripts.report", "--diff", str(outputs / "sft"), str(outputs / "nowhere"))
    assert done.returncode == 2 and "no finished run there" in done.stderr
