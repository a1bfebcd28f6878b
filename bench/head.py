"""
The output head's share of a step: full logits, TRL's fused head, ours; time and peak memory of forward + backward.

    python -m bench.head                 # hidden 896, vocabulary 151,936 (Qwen2.5-0.5B), 512, 1024 and 2048 tokens
    python -m bench.head --lengths 512

One measurement is one process, so that its peak memory is its own; the three heads alternate, `--rounds` times, on one
thread. Memory is what forward and backward add to the process. Times are medians of the rounds, by wall clock
and by CPU: on a machine with other work on it only the latter says something.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

HEADS = ("full", "trl", "ours")


def measure(head: str, length: int, masked: float) -> dict[str, float]:
    """One forward and backward of a one-layer model of that width: seconds, and MiB added at the peak."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from posttrain.chat import IGNORED
    from posttrain.losses import return_logps

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=896, num_hidden_layers=1,
                         num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    lm = Qwen2ForCausalLM(config)
    for name, parameter in lm.named_parameters():  # as in LoRA: the head is frozen
        parameter.requires_grad_("layers" in name)
    ids = torch.randint(0, 151936, (1, length))
    labels = ids.masked_fill(torch.arange(length)[None] < masked * length, IGNORED)
    if head == "trl":
        add_fused_lm_head(lm)
    elif head == "ours":
        return_logps(lm)
    before, began, worked = peak_mib(reset=True), time.perf_counter(), time.process_time()
    if head == "full":
        loss = lm(input_ids=ids, labels=labels, use_cache=False).loss
    elif head == "trl":
        out = lm(input_ids=ids, labels=labels, fused_lm_head=True, use_cache=False)
        loss = -out.log_probs.sum() / out.label_mask.sum()
    else:
        loss = -lm(input_ids=ids, labels=labels)["logps"].sum() / (labels[:, 1:] != IGNORED).sum()
    loss.backward()
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    return {"seconds": seconds, "cpu": cpu, "mib": peak_mib() - before, "loss": loss.item()}


def peak_mib(reset: bool = False) -> float:
    """High-water mark of this process's resident memory in MiB; Linux lets a process set it back to the present."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def in_a_process(head: str, length: int, masked: float) -> dict[str, float]:
    """`measure` in a fresh process on one thread."""
    command = [sys.executable, "-m", "bench.head", "--one", head, str(length), str(masked)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Print one line per head, length and share of masked tokens, with the ratios to TRL's head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), float(args.one[2]))))
        return
    print(f"{'tokens':>6} {'masked':>6} {'head':>5} {'s':>7} {'CPU s':>7} {'MiB':>7} {'CPU/trl':>8} {'MiB/trl':>8}"
          "  loss")  # fmt: skip
    for length in args.lengths:
        for masked in (0.0, 0.7):
            runs = {head: [] for head in HEADS}
            for _ in range(args.rounds):
                for head in HEADS:
                    runs[head].append(in_a_process(head, length, masked))
            middle = {h: {k: statistics.median(r[k] for r in runs[h]) for k in runs[h][0]} for h in HEADS}
            for head, it in middle.items():
                ratio = [it[k] / middle["trl"][k] for k in ("cpu", "mib")]
                print(f"{length:>6} {masked:>6.0%} {head:>5} {it['seconds']:>7.2f} {it['cpu']:>7.2f} "
                      f"{it['mib']:>7.0f} {ratio[0]:>8.2f} {ratio[1]:>8.2f}  {it['loss']:.5f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
