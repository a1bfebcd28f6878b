"""
The whole page over real records: data, SFT, ORPO, evaluation, comparison, safety, report, with the network off.

    python -m bench.real_page                         # in /tmp/posttrain_real_page; five minutes on two idle cores
    python -m bench.real_page --work /tmp/page --language en

The records are those of ../shared/data (SOURCES.md there); nothing of them is copied into the project, and the page
must not be either. The model is a Qwen2 of two layers with random weights and Qwen2's real vocabulary: multiple choice
must come out as chance. Every stage is its real command in a process of its own, with HF_HUB_OFFLINE=1 and with sockets
that refuse to connect; attempts are counted and printed. The work directory is emptied at the start.
"""

import argparse
import csv
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # `python bench/real_page.py` works like `-m`
SHARED = ROOT.parent / "shared"
MARK = ".posttrain_real_page"  # only a directory with this file in it is emptied
SUBJECTS = [path.stem for path in sorted((SHARED / "data/cmmlu/test").glob("*.csv"))][:10]
COPIED = {
    "belle": ("belle_1k", ("Belle_open_source_1k.json",)), "dpo_en_zh_20k": ("dpo_en_zh_20k", ("dpo_zh_500.jsonl",)),
    "eval/gsm8k": ("gsm8k", ("train.jsonl", "test.jsonl")), "eval/thucnews": ("thucnews", ("dev.txt", "class.txt")),
    "eval/cmrc2018": ("cmrc2018", ("squad_cmrc2018_trial.json",)), "eval/xstest": ("xstest", ("xstest_prompts.csv",)),
    **{f"eval/cmmlu/{split}": (f"cmmlu/{split}", [f"{name}.csv" for name in SUBJECTS]) for split in ("dev", "test")},
}  # fmt: skip
GSM8K = 4  # items: the model never ends, so each is 256 tokens over the whole vocabulary
NO_NETWORK = """
import socket
def refuse(self, address, *rest):
    if self.family == getattr(socket, "AF_UNIX", None):
        return connect(self, address, *rest)
    with open({attempts!r}, "a") as out:
        out.write(f"{{address}}\\n")
    raise OSError("the network is off")
connect, socket.socket.connect, socket.socket.connect_ex = socket.socket.connect, refuse, refuse
"""


def lay(work: Path) -> None:
    """The raw sets and benchmarks in the layout that prepare_data and eval_harness expect; the base."""
    for place, (folder, files) in COPIED.items():
        (work / "raw" / place).mkdir(parents=True)
        for file in files:
            shutil.copyfile(SHARED / "data" / folder / file, work / "raw" / place / file)
    gsm8k = work / "raw/eval/gsm8k/test.jsonl"
    gsm8k.write_text("".join(gsm8k.read_text(encoding="utf-8").splitlines(keepends=True)[:GSM8K]), encoding="utf-8")
    make_base(work / "base")


def make_base(path: Path) -> None:
    """Random weights under the real vocabulary: 64 wide, two layers."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shutil.copytree(SHARED / "tokenizers/qwen2", path, copy_function=shutil.copyfile)
    path.chmod(0o755)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=151_643,
        eos_token_id=151_645, pad_token_id=151_643,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)


def configs(work: Path, language: str) -> dict[str, dict]:
    """Stage -> its YAML. Sizes are cut so that all of it takes minutes on two cores."""
    w = str(work)
    model = {"base": f"{w}/base", "fallback": [], "quantization": "none"}
    training = {
        "hardware": "cpu", "tracking": "none", "export": {"mode": "adapter", "output_dir": f"{w}/exported"},
    }  # fmt: skip
    trainer = {
        "max_length": 192, "packing": False, "sequences_per_step": 8, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "logging_steps": 1, "save_steps": 100, "gradient_checkpointing": False,
        "warmup_ratio": 0.1,
    }  # fmt: skip
    sft_trainer = trainer | {"max_steps": 8, "learning_rate": 2e-2}
    pref_trainer = {k: v for k, v in trainer.items() if k != "packing"} | {"max_steps": 3, "learning_rate": 5e-3}
    tasks = [f"cmmlu_{subject}" for subject in SUBJECTS] + ["gsm8k"]
    sets = {
        "thucnews": {"file": f"{w}/raw/eval/thucnews/dev.txt", "kind": "classification", "limit": 40,
                     "max_new_tokens": 8},
        "cmrc2018": {"file": f"{w}/raw/eval/cmrc2018/squad_cmrc2018_trial.json", "kind": "extractive_qa", "limit": 20,
                     "max_new_tokens": 16},
    }  # fmt: skip
    adapters = [f"{w}/sft", f"{w}/align"]
    return {
        "prepare_data": {"raw_dir": f"{w}/raw", "output_dir": f"{w}/proc", "hub": "none", "tokenizer": f"{w}/base",
                         "sft": {"mix": {"belle": 1}}, "pref": {"mix": {"dpo_en_zh_20k": 1}}},
        "train_sft": {"output_dir": f"{w}/sft", "model": model, "data": {"train_files": [f"{w}/proc/sft_train.jsonl"]},
                      "trainer": sft_trainer, **training},
        "train_orpo": {"output_dir": f"{w}/align", "sft_run": f"{w}/sft", "model": model, "prefer_chinese_ratio": None,
                       "data": {"train_files": [f"{w}/proc/pref_train.jsonl"]}, "trainer": pref_trainer, **training},
        "eval_harness": {"output_dir": f"{w}/eval", "hardware": "cpu", "peft_adapter": adapters, "tasks": tasks,
                         "data_dir": f"{w}/raw/eval", "num_fewshot": 0, "limit": 40, "batch_size": 4,
                         "answer_sets": sets, "gates": {"thucnews/accuracy": {"min": 0.0}},
                         "safety": {"files": {"own": "configs/safety/prompts.jsonl",
                                              "xstest": f"{w}/raw/eval/xstest/xstest_prompts.csv"},
                                    "limit": 20, "max_new_tokens": 16},
                         "sft_test": f"{w}/proc/sft_test.jsonl", "pref_test": f"{w}/proc/pref_test.jsonl",
                         "max_test_rows": 40, "max_length": 512},
        "infer_compare": {"output_dir": f"{w}/panel", "hardware": "cpu", "prompts": "configs/panel.yaml", "sheet": True,
                          "adapters": {"SFT": adapters[0], "ORPO": adapters[1]}, "batch_size": 8, "cost_prompts": 4,
                          "generation": {"max_new_tokens": 32, "temperature": 0.2}},
        "report": {"runs": [f"{w}/eval", f"{w}/panel", f"{w}/align"], "output_dir": f"{w}/report", "outputs_dir": w,
                   "markdown": f"{w}/report/report.md", "language": language, "num_samples": 3},
    }  # fmt: skip


def run(stage: str, work: Path, environment: dict[str, str], *more: str) -> None:
    """One stage's command; what it says goes to <work>/logs. Prints its wall time; ends the program if it fails."""
    log, began, before = work / "logs" / f"{stage}{''.join(more)}.txt", time.perf_counter(), cpu_seconds()
    command = [sys.executable, "-m", f"scripts.{stage}", "--config", str(work / f"{stage}.yaml"), *more]
    with open(log, "w") as out:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out).returncode
    print(f"{' '.join((stage, *more)):20} {time.perf_counter() - began:6.1f} s  CPU {cpu_seconds() - before:6.1f} s  "
          f"exit {code}", flush=True)  # fmt: skip
    if code:
        sys.exit(f"{log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]))


def cpu_seconds() -> float:
    """User and system time of the stages that have ended: tells more than wall time where other work is going on."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def chance(work: Path) -> None:
    """The accuracies of the multiple-choice tasks, beside what guessing gives."""
    from posttrain.runs import read_json

    rows = [row for row in read_json(work / "eval/results.json")["tasks"] if row["task"].startswith("cmmlu")]
    n = sum(row["n"] for row in rows)
    for model in read_json(work / "eval/results.json")["models"]:
        right = sum(row["scores"][model]["value"] * row["n"] for row in rows if row["metric"] == "acc")
        n = sum(row["n"] for row in rows if row["metric"] == "acc")
        print(f"cmmlu, {len(SUBJECTS)} subjects, {model}: {right:.0f} of {n} right ({right / n:.3f}; guessing: 0.25)")
    with open(work / "panel/sheet.csv", encoding="utf-8-sig", newline="") as sheet:
        print(f"blind sheet: {sum(1 for _ in csv.reader(sheet)) - 1} answers to score")


def main() -> None:
    """Lay, run, verify; say where the page is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/posttrain_real_page"))
    parser.add_argument("--language", choices=("zh", "en"), default="zh")
    args = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"{SHARED}: the real records are not here")
    work = args.work.resolve()
    if work.is_dir() and any(work.iterdir()) and not (work / MARK).is_file():
        sys.exit(f"{work} holds other things; name an empty directory: --work")
    shutil.rmtree(work, ignore_errors=True)
    for folder in (work / "logs", work / "blocked"):
        folder.mkdir(parents=True)
    (work / MARK).touch()
    attempts = work / "attempts.txt"
    (work / "blocked/sitecustomize.py").write_text(NO_NETWORK.format(attempts=str(attempts)))
    path = os.pathsep.join(filter(None, (str(work / "blocked"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    lay(work)
    for stage, content in configs(work, args.language).items():
        (work / f"{stage}.yaml").write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
        run(stage, work, environment)
    run("report", work, environment, "--verify")
    print(f"{'all':20} {time.perf_counter() - began:6.1f} s  CPU {cpu_seconds():6.1f} s")
    tried = attempts.read_text().splitlines() if attempts.is_file() else []
    print(f"attempts to reach the network: {len(tried)}{f' ({tried[0]} ...)' if tried else ''}")
    chance(work)
    print((work / "logs/report--verify.txt").read_text().strip().splitlines()[-1])
    print(f"page: {work / 'report/report.html'}, {work / 'report/report.md'}")


if __name__ == "__main__":
    main()
