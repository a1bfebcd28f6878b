"""
eval_harness beside lm-eval's own command: start-up, the same items, and chance on a random model.

    python -m bench.eval                       # all three, on real records of ../shared/data
    python -m bench.eval --only start          # start, parity, chance
    python -m bench.eval --rounds 5

start: both commands on 2 items of 2 cmmlu subjects, adapter on a tiny random base, in turns; wall and CPU seconds.
parity: both commands on the task files that ours writes; every item's prompt, answer and score compared.
chance: multiple choice by a random Qwen2 (hidden 64, 2 layers, the real vocabulary) against the permutation null of the
right answers, Holm over the tasks (significance.permuted_golds).
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # `python bench/eval.py` works like `-m`

import yaml  # noqa: E402

from posttrain import significance  # noqa: E402
from posttrain.records import read_jsonl, write_jsonl  # noqa: E402
from posttrain.runs import read_json  # noqa: E402

SHARED = ROOT.parent / "shared"
PARTS = ("start", "parity", "chance")
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
       "PYTHONDONTWRITEBYTECODE": ""}  # fmt: skip
SEED, BATCH, CLOSE = 42, 4, 1e-4  # log-likelihoods further apart than CLOSE are a difference
FEWSHOT = 2
CHANCE_ITEMS = 60  # of each task

# ------------------------------------------------------------------ records, laid out as local_tasks expects them


def lay_benchmarks(folder: Path) -> dict[str, list[str]]:
    """Real records under `folder`; {group: tasks}. cmmlu and gsm8k as published; winogrande from MosaicML's layout;
    ceval-valid and hellaswag are not at hand: two cmmlu subjects and winogrande's sentences stand in their layout."""
    for name in ("cmmlu", "gsm8k"):
        (folder / name).symlink_to(SHARED / "data" / name)
    subjects = sorted(path.stem for path in (SHARED / "data/cmmlu/test").glob("*.csv"))
    rows = [_winogrande(row) for row in read_jsonl(SHARED / "data/winogrande_mosaic/winogrande.jsonl")]
    write_jsonl(folder / "winogrande/dev.jsonl", rows)
    endings = [_hellaswag(*pair) for pair in zip(rows, rows[1:], strict=False)]
    write_jsonl(folder / "hellaswag/hellaswag_val.jsonl", endings)
    for subject, theirs in zip(subjects[:2], ("law", "logic"), strict=True):
        _as_ceval(SHARED / f"data/cmmlu/test/{subject}.csv", folder / f"ceval-valid/val/{theirs}_val.csv")
    return {"shots": [f"cmmlu_{subject}" for subject in subjects[:6]] + ["gsm8k"],
            "no shots": ["ceval-valid_law", "ceval-valid_logic", "winogrande", "hellaswag"],
            "chance": [f"cmmlu_{subject}" for subject in subjects] + ["winogrande"]}  # fmt: skip


def _winogrande(row: dict) -> dict:
    """MosaicML's two contexts with one continuation -> the published sentence with a gap and two options."""
    first, second = (text.split(" ") for text in row["context_options"])
    alike = 0
    while alike < min(len(first), len(second)) - 1 and first[alike] == second[alike]:
        alike += 1
    return {"sentence": " ".join([*first[:alike], "_", row["continuation"]]), "option1": " ".join(first[alike:]),
            "option2": " ".join(second[alike:]), "answer": str(row["gold"] + 1)}  # fmt: skip


def _hellaswag(row: dict, other: dict) -> dict:
    before, _, after = row["sentence"].partition("_")
    endings = [option + after for option in (row["option1"], row["option2"], other["option1"], other["option2"])]
    return {"activity_label": "Sentences", "ctx_a": before.strip(), "ctx_b": "", "endings": endings,
            "label": int(row["answer"]) - 1}  # fmt: skip


def _as_ceval(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(source, encoding="utf-8-sig", newline="") as rows, open(place, "w", encoding="utf-8", newline="") as out:
        columns = ("question", "A", "B", "C", "D", "answer")
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        for row in csv.DictReader(rows):
            writer.writerow({name: row[name.capitalize()] for name in columns})


# ------------------------------------------------------------------ the two commands


def timed(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of a command; its output is shown where it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}\n{said[-3000:]}")
    return {"wall": time.perf_counter() - began, "cpu": used.ru_utime + used.ru_stime}


def ours(out: Path, data: Path, tasks: list[str], model: dict, shots: int, limit: int | None) -> list[str]:
    """The command of eval_harness; model: its config keys."""
    config = {"hardware": "cpu", "output_dir": str(out), "data_dir": str(data), "tasks": tasks,
              "num_fewshot": shots, "limit": limit, "batch_size": BATCH, "seed": SEED, "sft_test": None,
              "pref_test": None, **model}  # fmt: skip
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [sys.executable, "-m", "scripts.eval_harness", "--config", str(file)]


def theirs(out: Path, task_files: Path, tasks: list[str], model_args: str, shots: int, limit: int | None) -> list[str]:
    """lm-eval's command on the task files that ours wrote."""
    few = ["--limit", str(limit)] if limit else []
    return [str(Path(sys.executable).with_name("lm-eval")), "run", "--model", "hf", "--model_args", model_args,
            "--device", "cpu", "--include_path", str(task_files), "--tasks", ",".join(tasks),
            "--batch_size", str(BATCH), "--num_fewshot", str(shots), "--apply_chat_template", "--fewshot_as_multiturn",
            "--seed", str(SEED), "--log_samples", "--output_path", str(out), *few]  # fmt: skip


def tiny(work: Path) -> tuple[Path, Path]:
    """(base, adapter) of the tests: two random layers, a vocabulary of 400."""
    sys.path.append(str(ROOT / "tests"))
    from conftest import make_adapter, make_base

    base = make_base(work / "base")
    return base, make_adapter(base, work / "adapter", 1)


# ------------------------------------------------------------------ start


def start(work: Path, data: Path, tasks: list[str], rounds: int) -> None:
    """Prints a table of both commands' seconds, round by round, and the ratio of the medians."""
    base, adapter = tiny(work)
    model = {"peft_adapter": [str(adapter)], "include_base": False}
    timed(ours(work / "first", data, tasks, model, 0, 2))  # writes the task files, and warms the disk for both
    arguments = f"pretrained={base},peft={adapter},dtype=float32"
    seconds: dict[str, list[dict[str, float]]] = {"ours": [], "lm-eval": []}
    print("start-up: 2 items of 2 cmmlu subjects, adapter on a tiny base\nround   ours wall  cpu     lm-eval wall  cpu")
    for number in range(rounds):
        seconds["ours"].append(timed(ours(work / f"start_{number}", data, tasks, model, 0, 2)))
        seconds["lm-eval"].append(timed(theirs(work / f"cli_{number}", work / "first/tasks", tasks, arguments, 0, 2)))
        cells = [f"{seconds[who][-1]['wall']:9.1f} {seconds[who][-1]['cpu']:6.1f}" for who in seconds]
        print(f"{number + 1:5}   {'      '.join(cells)}", flush=True)
    for kind in ("wall", "cpu"):
        mine, other = (statistics.median(one[kind] for one in seconds[who]) for who in seconds)
        print(f"median {kind}: {mine:.1f} s and {other:.1f} s: {mine / other:.2f}", flush=True)


# ------------------------------------------------------------------ parity


def parity(work: Path, data: Path, groups: dict[str, list[str]], limit: int | None) -> int:
    """Prints a table of items that differ between the two commands; the number of them."""
    base, adapter = tiny(work)
    print("parity: task                        items  differing  largest gap of log-likelihoods  score ours   lm-eval")
    bad = 0
    for group, shots in (("shots", FEWSHOT), ("no shots", 0)):
        out, tasks = work / f"parity_{shots}", groups[group]
        model = {"peft_adapter": [str(adapter)], "include_base": False}
        timed(ours(out, data, tasks, model, shots, limit))
        cli = work / f"parity_{shots}_cli"
        timed(theirs(cli, out / "tasks", tasks, f"pretrained={base},peft={adapter},dtype=float32", shots, limit))
        for task in tasks:
            mine = list(read_jsonl(out / f"samples/{adapter.name}/{task}.jsonl"))
            other = list(read_jsonl(next(cli.rglob(f"samples_{task}_*.jsonl"))))
            differing, gap = differences(mine, other)
            scores = [_score(rows) for rows in (mine, other)]
            cells = f"{len(mine):6} {differing:10} {gap:31.1e} {scores[0]:12.4f} {scores[1]:9.4f}"
            print(f"  {task:32} {cells}", flush=True)
            bad += differing + (scores[0] != scores[1])
    return bad


def differences(mine: list[dict], other: list[dict]) -> tuple[int, float]:
    """(items whose prompt, answer or score differ, largest gap of two log-likelihoods). One with no partner differs."""
    key = ("doc_id", "filter")
    partners = {tuple(row[k] for k in key): row for row in other}
    differing, gap = abs(len(mine) - len(other)), 0.0
    for row in mine:
        partner = partners.get(tuple(row[k] for k in key))
        if partner is None:
            differing += 1
            continue
        same = all(row[name] == partner[name] for name in ("doc_hash", "prompt_hash", "target_hash", *row["metrics"]))
        for a, b in zip(row["filtered_resps"], partner["filtered_resps"], strict=True):
            if isinstance(a, list):
                a, b = (float(a[0]), str(a[1])), (float(b[0]), str(b[1]))
                gap = max(gap, abs(a[0] - b[0]))
                same &= abs(a[0] - b[0]) < CLOSE and a[1] == b[1]
            else:
                same &= a == b and row["resps"] == partner["resps"]
        differing += not same
    return differing, gap


def _score(rows: list[dict]) -> float:
    metric = rows[0]["metrics"][0]
    return sum(row[metric] for row in rows) / len(rows)


# ------------------------------------------------------------------ chance


def random_qwen2(path: Path) -> Path:
    """A random Qwen2 of two layers, width 64, with the real tokenizer of ../shared/tokenizers/qwen2."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2")
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=151936, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def chance(work: Path, data: Path, tasks: list[str], limit: int) -> int:
    """Prints a table of accuracy against the permutation null; the number of tasks that are not chance."""
    base = random_qwen2(work / "random")
    out = work / "chance"
    timed(ours(out, data, tasks, {"peft_adapter": [], "base": str(base)}, 0, limit))
    found = {}
    for task in tasks:
        rows = list(read_jsonl(out / f"samples/base/{task}.jsonl"))
        scored = [[float(answer[0]) for answer in row["filtered_resps"]] for row in rows]
        chosen = [max(range(len(values)), key=values.__getitem__) for values in scored]
        golds = [_gold(row) for row in rows]
        right = [int(a == b) for a, b in zip(chosen, golds, strict=True)]
        if right != [int(row["acc"]) for row in rows]:
            sys.exit(f"{task}: the answers chosen here are not those that lm-eval scored")
        found[task] = len(rows), *significance.permuted_golds(chosen, golds)
    adjusted = significance.holm([p for *_, p in found.values()])
    print(f"chance: {'task':38} items  accuracy  expected  p      p (Holm)")
    for (task, (n, share, expected, p)), p_holm in zip(found.items(), adjusted, strict=True):
        print(f"  {task:43} {n:6} {share:9.4f} {expected:9.4f}  {p:.4f} {p_holm:.4f}")
    low = [task for task, p in zip(found, adjusted, strict=True) if p < significance.LEVEL]
    smallest = min(p for *_, p in found.values())
    print(f"{len(found)} tasks, smallest p {smallest:.4f}, after Holm {min(adjusted):.4f}; not chance: "
          f"{', '.join(low) or 'none'}")  # fmt: skip
    results = read_json(out / "results.json")
    print(f"models: {', '.join(results['models'])} ({results['base']['path']})", flush=True)
    return len(low)


def _gold(row: dict) -> int:
    """Place of the right answer; winogrande's target is what both contexts go on with, so its item says."""
    return int(row["doc"]["answer"]) - 1 if "option1" in row["doc"] else int(row["target"])


def main() -> int:
    """0; 4 where items differ or a random model is not at chance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=None, help="items per task of parity and chance")
    parser.add_argument("--work", type=Path, default=None, help="keep the files here")
    args = parser.parse_args()
    if not (SHARED / "data/cmmlu").is_dir():
        print("bench/eval.py needs the records of ../shared/data, which are not here")
        return 0
    work = args.work or Path(tempfile.mkdtemp(prefix="bench_eval_"))
    data = work / "data"
    shutil.rmtree(work, ignore_errors=True)
    data.mkdir(parents=True)
    groups = lay_benchmarks(data)
    bad = 0
    if args.only in (None, "start"):
        start(work, data, groups["shots"][:2], args.rounds)
    if args.only in (None, "parity"):
        bad += parity(work, data, groups, args.limit)
    if args.only in (None, "chance"):
        bad += chance(work, data, groups["chance"], args.limit or CHANCE_ITEMS)
    if args.work is None:
        shutil.rmtree(work, ignore_errors=True)
    return 4 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
