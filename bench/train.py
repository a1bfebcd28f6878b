"""
Launch and training on the same work, ours and plain TRL, each through `accelerate launch`, in turns.

    python -m bench.train                       # SFT, then DPO and ORPO: about 8 CPU minutes
    python -m bench.train --stages sft

The work (../shared/research/peers_cpu.md): a Qwen2 of 41.8M random parameters with the real vocabulary of 151,936,
20,000 real conversations, 512 tokens, packed, LoRA r 16 on all linear layers, fp32, batch 4 x accumulation 4, gradient
checkpointing, one thread. DPO and ORPO: batches of 4 real pairs that fit into 512 tokens. LoRA dropout 0, so that the
first loss is comparable. Cold: nothing of the data is on disk in encoded form; warm: the same command again.

Seconds are counted by wall clock and by CPU over all processes of a run: on a machine with other work on it only the
latter says something. Memory is the largest high-water mark of one process.
"""

import argparse
import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1"}  # fmt: skip
PAIRS = 4  # in a step


# ------------------------------------------------------------------ the work


def make_work(work: Path, conversations: int, steps: int) -> None:
    """base/, sft.jsonl and pref.jsonl in `work`, if they are not there."""
    if not (work / "base/model.safetensors").is_file():
        make_base(work / "base")
    with gzip.open(SHARED / "bench/sft_zh_en.jsonl.gz", "rt", encoding="utf-8") as lines:
        write(work / "sft.jsonl", ({"messages": messages(json.loads(line))} for line in lines), conversations)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    with gzip.open(SHARED / "bench/pref_pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        pairs = (pair(json.loads(line)) for line in lines)
        fitting = (p for p in pairs if 300 < max(len(tokenizer.apply_chat_template(p["prompt"] + p[side])["input_ids"])
                                                 for side in ("chosen", "rejected")) <= 512)  # fmt: skip
        write(work / "pref.jsonl", fitting, PAIRS * steps)


def make_base(directory: Path) -> None:
    """A random Qwen2 of the real vocabulary."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    for file in (SHARED / "tokenizers/qwen2").iterdir():
        shutil.copyfile(file, directory / file.name)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936, hidden_size=256, num_hidden_layers=4, intermediate_size=704, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=None,
        eos_token_id=151645, pad_token_id=151643,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory)


def messages(row: dict) -> list[dict]:
    """An Alpaca or ShareGPT row as messages."""
    if "conversations" not in row:
        question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles.get(t["from"], t["from"]), "content": t["value"]} for t in row["conversations"]]


def pair(row: dict) -> dict:
    """A pair whose prompt is one question."""
    question = row["prompt"].removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
    answers = {side: [{"role": "assistant", "content": row[side].strip()}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": question}], **answers}


def write(file: Path, rows, count: int) -> None:
    """The first `count` rows as JSONL."""
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in itertools.islice(rows, count))


def ours_yaml(work: Path, stage: str, steps: int, micro: int) -> Path:
    """Our config of a stage for the common work."""
    sft = stage == "sft"
    trainer = {"max_length": 512, "per_device_train_batch_size": 4, "precision": "fp32", "learning_rate": 2e-4,
               "max_steps": steps, "logging_steps": 1, "gradient_checkpointing": True, "save_steps": 1000}
    trainer |= {"packing": True, "tokens_per_step": 2048 * micro} if sft else {"sequences_per_step": PAIRS}
    config = {"stage": stage, "hardware": "cpu", "output_dir": str(work / f"ours_{stage}"), "tracking": "none",
              "model": {"base": str(work / "base"), "fallback": []}, "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
              "data": {"train_files": [str(work / ("sft.jsonl" if sft else "pref.jsonl"))], "val_files": [],
                       "val_share": 0.0}, "trainer": trainer}  # fmt: skip
    config |= {} if sft else {"sft_run": None, "beta": 0.1, "prefer_chinese_ratio": None}
    config |= {"nll_on": "all", "length_penalty": 0.0} if stage == "orpo" else {}
    file = work / f"{stage}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


# ------------------------------------------------------------------ a run


def watched(command: list[str], work: Path, ready: str) -> dict:
    """Run a command. Returns {"ready" and "steps": [wall s, CPU s] since its launch, "mib", "lines": what it printed}.

    ready: a pattern of the line after which the first step begins.
    """
    began, seen = time.time(), {"ready": None, "steps": {}, "mib": 0.0, "lines": []}
    env = {**os.environ, **ENVIRONMENT, "HF_DATASETS_CACHE": str(work / "hf_datasets")}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          start_new_session=True) as process:  # fmt: skip
        for line in process.stdout:
            cpu, mib = tree(process.pid)
            now = (time.time() - began, cpu)
            seen["mib"] = max(seen["mib"], mib)
            seen["lines"].append(line)
            if re.search(ready, line):
                seen["ready"] = now
            if step := re.match(r'\s*(?:\{"step": |step +)(\d+)', line):
                seen["steps"][int(step[1])] = now
    if process.returncode:
        raise SystemExit("".join(seen["lines"][-30:]) + f"\n{' '.join(command)}: exit {process.returncode}")
    return seen


def tree(root: int) -> tuple[float, float]:
    """(CPU seconds, largest high-water mark in MiB) of a process and all below it, ended children included."""
    children: dict[int, list[int]] = {}
    stats = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        pid = int(entry.parent.name)
        children.setdefault(int(fields[1]), []).append(pid)
        ticks = sum(map(int, fields[11:15]))  # user and system, its own and of children that ended
        stats[pid] = ticks / os.sysconf("SC_CLK_TCK")
    cpu, mib, todo = 0.0, 0.0, [root]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        cpu += stats.get(pid, 0.0)
        try:
            mark = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        except OSError:
            continue
        mib = max(mib, int(mark[1]) / 1024 if mark else 0.0)
    return cpu, mib


def launch(*script: str) -> list[str]:
    """The real command."""
    return [str(Path(sys.executable).with_name("accelerate")), "launch", *script]


def ours(work: Path, stage: str, steps: int, micro: int = 1) -> dict:
    """A run of ours, with losses, tokens and cells from its metrics.jsonl."""
    shutil.rmtree(work / f"ours_{stage}", ignore_errors=True)
    command = launch("-m", f"scripts.train_{stage}", "--config", str(ours_yaml(work, stage, steps, micro)))
    seen = watched(command, work, r"rows a step|pairs a step|optimiser steps")
    metrics = [json.loads(line) for line in (work / f"ours_{stage}/metrics.jsonl").read_text().splitlines()]
    return seen | {"metrics": {line["step"]: line for line in metrics}}


def plain_trl(work: Path, stage: str, steps: int, micro: int = 1, rows: str | None = None) -> dict:
    """A run of plain TRL."""
    data = work / ("sft.jsonl" if stage == "sft" else "pref.jsonl")
    command = launch("bench/plain_trl.py", stage, str(work / "base"), str(data), str(work / "trl"), str(steps),
                     str(micro), *([rows] if rows else []))  # fmt: skip
    seen = watched(command, work, "^ready")
    metrics = [json.loads(line) for line in seen["lines"] if line.startswith('{"step"')]
    return seen | {"metrics": {line["step"]: line for line in metrics}}


# ------------------------------------------------------------------ comparison


def forget(work: Path) -> None:
    """Nothing of the data is left in encoded form."""
    for kept in (".cache", "hf_datasets"):
        shutil.rmtree(work / kept, ignore_errors=True)


def compare_sft(work: Path, steps: int, micro: int) -> None:
    """Cold launches, warm launches with `steps` steps, and TRL on our rows."""
    forget(work)
    cold, warm = {}, {}
    for name, of, count in (("cold", cold, 1), ("warm", warm, steps)):
        of |= {"ours": ours(work, "sft", count, micro), "trl": plain_trl(work, "sft", count, micro)}
        for what, at in (("ready", lambda run: run["ready"]), ("first step", lambda run: run["steps"][1])):
            line(f"SFT launch -> {what}, {name}", *(at(of[who]) for who in ("ours", "trl")))
        compared(f"SFT peak MiB, {name}", *(of[who]["mib"] for who in ("ours", "trl")))
    speed = {who: rate(warm[who], steps) for who in warm}
    counted = f"n = {steps - 1} of {steps} steps" if steps > 1 else "n = 1 step, counted from ready"
    for number, unit in ((0, "wall"), (1, "CPU")):
        compared(f"SFT tokens/{unit} s, {counted}", *(speed[who][number] for who in ("ours", "trl")), 1)
    rows = sorted((work / ".cache/rows").glob("*/train.arrow"), key=lambda file: file.stat().st_mtime)[-1]
    same = plain_trl(work, "sft", 1, micro, str(rows))
    compared("SFT loss of step 1, same rows", warm["ours"]["metrics"][1]["loss"], same["metrics"][1]["loss"], 5)
    compared("SFT first step on the same rows, CPU s", *(run["steps"][1][1] - run["ready"][1]
                                                         for run in (warm["ours"], same)), 1)  # fmt: skip


def compare_pairs(work: Path, stage: str, steps: int) -> None:
    """Both on the same pairs. Seconds are counted from `ready` to the last step: ours take the reference first."""
    mine, theirs = ours(work, stage, steps), plain_trl(work, stage, steps)
    cells = mine["metrics"][steps]["num_cells"]
    for number, unit in ((0, "wall"), (1, "CPU")):
        rates = [cells / (run["steps"][steps][number] - run["ready"][number]) for run in (mine, theirs)]
        compared(f"{stage.upper()} cells/{unit} s, n = {steps} steps", *rates, 1)
    compared(f"{stage.upper()} peak MiB", mine["mib"], theirs["mib"])
    compared(f"{stage.upper()} loss of step 1", mine["metrics"][1]["loss"], theirs["metrics"][1]["loss"], 4)


def rate(run: dict, steps: int) -> list[float]:
    """Tokens per wall and per CPU second over the steps after the first; of a single step, since the run was ready."""
    tokens = run["metrics"][steps]["num_tokens"] - (run["metrics"][1]["num_tokens"] if steps > 1 else 0)
    began = run["steps"][1] if steps > 1 else run["ready"]
    return [tokens / (run["steps"][steps][i] - began[i]) for i in (0, 1)]


def line(name: str, mine: tuple[float, float], theirs: tuple[float, float]) -> None:
    """Wall and CPU seconds of both."""
    compared(f"{name}, wall s", mine[0], theirs[0], 1)
    compared(f"{name}, CPU s", mine[1], theirs[1], 1)


def compared(name: str, mine: float, theirs: float, digits: int = 0) -> None:
    """One row of the table."""
    print(f"| {name} | {mine:,.{digits}f} | {theirs:,.{digits}f} | {mine / theirs:.2f} |", flush=True)


def main() -> None:
    """Print a table: ours, TRL, ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", default=["sft", "dpo", "orpo"], choices=["sft", "dpo", "orpo"])
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4, help="of an SFT step (1: a quarter of the time)")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/bench_train")
    args = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit(f"{SHARED}: the shared records are not there; this bench needs them")
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_work(work, args.conversations, args.steps)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("\n| | ours | TRL | ours / TRL |\n|---|---|---|---|", flush=True)
    for stage in args.stages:
        if stage == "sft":
            compare_sft(work, args.steps, args.micro_batches)
        else:
            compare_pairs(work, stage, args.steps)


if __name__ == "__main__":
    main()
