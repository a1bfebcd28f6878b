"""
How much a model forgets of what it knew while it learns a domain: plain SFT against replay, kl_to_base, ewc and
slow_start, paired over seeds.

    python -m bench.forgetting                       # five seeds, all means
    python -m bench.forgetting --seeds 1 --only plain,replay

For each seed a Qwen2 of 0.15 million parameters is built from config and taught 300 general facts (made-up names, each
with three attributes) in a chat format. Then train_sft itself teaches it 120 facts of a domain (other names, other
attributes, the same words as values) with LoRA, once for each mean. Replay files hold one half of the general facts;
forgetting is measured on the other half, which no tuned run ever sees. Tests ask in a wording that was never trained.

Forgetting is the rise of the loss per answer token over that of the base, and the fall in the share of answers that
would come out right word for word (greedy). Intervals are Student's, 95 %, of the differences to plain SFT with the
same seed.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from posttrain import chat, model
from posttrain.config import load_config
from posttrain.demo.base import make_tokenizer
from posttrain.records import write_jsonl
from posttrain.significance import t_interval
from posttrain.stages import TrainSft

WORDINGS = ("{name} 的 {attribute} 是 什么 ？", "请问 {name} 的 {attribute} ？", "请 说出 {name} 的 {attribute} 。",
            "请问 {name} 的 {attribute} 是 什么 ？")  # fmt: skip
TESTED = 3  # the wording that only the tests ask in
GENERAL, DOMAIN = ("首都", "特产", "河流"), ("型号", "剂量", "产地")
REPLAY, FOR_EWC = ["replay.files=[{general}]", "replay.share=0.1"], ["replay.files=[{general}]", "replay.share=0"]
MEANS = {
    "plain": [],
    "replay": REPLAY,
    "kl_to_base": ["kl_to_base.beta=0.3"],  # on the domain's own tokens: no general row at all
    "replay+kl_to_base": [*REPLAY, "kl_to_base.beta=1"],  # on the replayed rows
    "ewc": [*FOR_EWC, "ewc.weight=30"],
    "ewc_strong": [*FOR_EWC, "ewc.weight=100"],
    "ewc_strong_full": [*FOR_EWC, "ewc.weight=100", "ewc.fisher=full"],
    "slow_start": ["trainer.slow_start.share=0.1"],
    "slow_start_third": ["trainer.slow_start.share=0.33"],
}


# ------------------------------------------------------------------ data


def invented(draw: random.Random, count: int) -> list[str]:
    """Different names of three syllables."""
    names = set()
    while len(names) < count:
        names.add("".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)))
    return draw.sample(sorted(names), count)


def facts_of(draw: random.Random, names: list[str], attributes: tuple[str, ...], values: list[str]) -> list[list[dict]]:
    """For each name and attribute the conversations about it, one for each wording; the value is drawn."""
    facts = []
    for name in names:
        for attribute in attributes:
            answer = f"是 {draw.choice(values)}"
            facts.append([
                {"id": f"{name}-{attribute}-{i}", "source": attribute, "meta": {},
                 "messages": [{"role": "user", "content": wording.format(name=name, attribute=attribute)},
                              {"role": "assistant", "content": answer}]}
                for i, wording in enumerate(WORDINGS)
            ])  # fmt: skip
    return facts


def trained(facts: list[list[dict]]) -> list[dict]:
    return [row for fact in facts for i, row in enumerate(fact) if i != TESTED]


def asked(facts: list[list[dict]]) -> list[dict]:
    return [fact[TESTED] for fact in facts]


# ------------------------------------------------------------------ the base


def teach_base(path: Path, tokenizer, rows: list[dict], seed: int, steps: int) -> None:
    """A small Qwen2 that knows `rows`, saved as a hub model would be."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
    )  # fmt: skip
    lm, draw = Qwen2ForCausalLM(config), random.Random(seed)
    encoded = chat.encode_chats(tokenizer, rows, 64, "assistant", "drop").rows
    optimizer = torch.optim.AdamW(lm.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        batch = padded(draw.sample(encoded, 32), tokenizer.pad_token_id)
        loss = lm(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    lm.save_pretrained(path)
    tokenizer.save_pretrained(path)


def padded(rows: list[dict], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids, labels = torch.full((len(rows), width), pad), torch.full((len(rows), width), chat.IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < (torch.tensor(
        [len(row["input_ids"]) for row in rows])[:, None])).long(), "labels": labels}  # fmt: skip


# ------------------------------------------------------------------ measuring


@torch.no_grad()
def measure(lm, tokenizer, records: list[dict]) -> dict[str, float]:
    """{"loss" per answer token, "right": share of answers whose every token is the most likely one, which is what
    greedy decoding would give}."""
    lm.eval()
    rows = chat.encode_chats(tokenizer, records, 64, "assistant", "drop").rows
    nll, tokens, right = 0.0, 0, 0
    for start in range(0, len(rows), 64):
        batch = padded(rows[start : start + 64], tokenizer.pad_token_id)
        labels = batch.pop("labels")[:, 1:]
        logits = lm(**batch, use_cache=False).logits[:, :-1].float()
        scored = labels != chat.IGNORED
        nll += torch.nn.functional.cross_entropy(logits[scored], labels[scored], reduction="sum").item()
        tokens += int(scored.sum())
        right += int(((logits.argmax(-1) == labels) | ~scored).all(1).sum())
    return {"loss": nll / tokens, "right": right / len(rows)}


def tune(folder: Path, mean: str, sets: list[str], seed: int) -> Path:
    """train_sft, as its command runs it, in this process."""
    from scripts import train_sft

    out = folder / mean
    common = {
        "hardware": "cpu", "output_dir": out, "model.base": folder / "base", "tracking": "none",
        "data.train_files": f"[{folder}/domain.jsonl]", "data.val_files": "[]", "data.val_share": 0,
        "lora.r": 16, "lora.alpha": 32, "lora.dropout": 0, "trainer.max_length": 128, "trainer.seed": seed,
        "trainer.per_device_train_batch_size": 4, "trainer.tokens_per_step": 512, "trainer.learning_rate": 5e-3,
        "trainer.num_train_epochs": 12, "trainer.gradient_checkpointing": "false", "trainer.save_steps": 100000,
        "trainer.warmup_ratio": 0.05,
    }  # fmt: skip
    sets = [f"{k}={v}" for k, v in common.items()] + [s.format(general=folder / "general.jsonl") for s in sets]
    with contextlib.redirect_stdout(io.StringIO()):
        train_sft.main(load_config(TrainSft, Path("configs/sft.yaml"), sets))
    return out


def one_seed(seed: int, means: dict[str, list[str]], folder: Path, base_steps: int) -> dict[str, dict[str, float]]:
    """Base and every mean of one seed: general and domain loss and share of right answers."""
    draw = random.Random(seed)
    names = invented(draw, 200)
    values = [names.pop() for _ in range(60)]
    general = facts_of(draw, [names.pop() for _ in range(100)], GENERAL, values)
    domain = facts_of(draw, names, DOMAIN, values)
    draw.shuffle(general)
    replayed, kept_back = general[: len(general) // 2], general[len(general) // 2 :]
    every = trained(general) + trained(domain)
    tokenizer = make_tokenizer([m["content"] for row in every for m in row["messages"]])
    tokenizer.save_pretrained(folder / "base")
    tokenizer = model.load_tokenizer(folder / "base")
    teach_base(folder / "base", tokenizer, trained(general), seed, base_steps)
    write_jsonl(folder / "general.jsonl", trained(replayed))
    write_jsonl(folder / "domain.jsonl", trained(domain))

    def both(lm) -> dict[str, float]:
        sides = {"general": asked(kept_back), "domain": asked(domain)}
        return {f"{side}_{k}": v for side, rows in sides.items() for k, v in measure(lm, tokenizer, rows).items()}

    found = {"base": both(model.load_base(folder / "base"))}
    for mean, sets in means.items():
        began = time.process_time()
        run = tune(folder, mean, sets, seed)
        seconds = time.process_time() - began
        found[mean] = both(model.load_adapter(model.load_base(folder / "base"), run)) | {"cpu_s": seconds}
    return found


# ------------------------------------------------------------------ the table


def interval(values: list[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean."""
    if len(values) < 2:
        return (float("nan"), float("nan"))
    return t_interval(statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5, len(values))


COLUMNS = ("general_loss", "general_right", "domain_loss", "domain_right")


def table(seeds: list[dict[str, dict[str, float]]]) -> list[str]:
    """Two Markdown tables: means over the seeds; differences to plain SFT, seed by seed, with their intervals."""
    lines = [f"| run | {' | '.join(COLUMNS)} | CPU s |", "|---" * (len(COLUMNS) + 2) + "|"]
    for mean in seeds[0]:
        cells = [shown(key, statistics.mean(s[mean][key] for s in seeds)) for key in COLUMNS]
        seconds = [s[mean]["cpu_s"] for s in seeds if "cpu_s" in s[mean]]
        lines.append(f"| {mean} | {' | '.join(cells)} | {f'{statistics.mean(seconds):.1f}' if seconds else ''} |")
    lines += ["", f"| against plain | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for mean in [m for m in seeds[0] if m not in ("base", "plain")] if "plain" in seeds[0] else []:
        cells = []
        for key in COLUMNS:
            gaps = [s[mean][key] - s["plain"][key] for s in seeds]
            low, high = interval(gaps)
            cells.append(f"{shown(key, statistics.mean(gaps), '+')} [{shown(key, low, '+')}, {shown(key, high, '+')}]")
        lines.append(f"| {mean} | {' | '.join(cells)} |")
    return lines


def shown(key: str, value: float, sign: str = "") -> str:
    return format(value, f"{sign}.1%" if key.endswith("right") else f"{sign}.3f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", help="names of means, separated by commas")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--set", action="append", default=[], metavar="MEAN:KEY=VALUE", help="another setting to try")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(MEANS)
    means = {name: list(MEANS.get(name, [])) for name in names}
    for given in args.set:
        name, _, value = given.partition(":")
        means.setdefault(name, []).append(value)
    torch.set_num_threads(1)
    seeds = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            seeds.append(one_seed(seed, means, Path(folder), args.base_steps))
        print(json.dumps({"seed": seed, **seeds[-1]}), flush=True)
    print("\n".join(table(seeds)))


if __name__ == "__main__":
    main()
