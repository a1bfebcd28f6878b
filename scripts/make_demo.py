"""
The embedded demo: a tiny Chinese base, a raw K12 corpus in the original schemas, prompts and eval tasks.

    python -m scripts.make_demo --config configs/demo/make_demo.yaml --dry-run
    python -m scripts.make_demo --config configs/demo/make_demo.yaml

Needs no hub, no GPU and no account. `make demo` runs it and then every stage on what it makes (scripts/demo.sh).
"""

import sys

sys.path[0] = str(__import__("pathlib").Path(__file__).resolve().parents[1])  # `python scripts/X.py` works too

from posttrain.cli import opened, run_stage  # noqa: E402
from posttrain.config import ROOT, Loaded, shown  # noqa: E402
from posttrain.plan import Plan  # noqa: E402
from posttrain.runs import fingerprint, open_run, sha256  # noqa: E402
from posttrain.stages import MakeDemo  # noqa: E402


def plan(plan: Plan) -> None:
    """What would be made, and a few facts of the corpus."""
    cfg = plan.config
    from posttrain.demo.facts import FAMILIES

    plan.fact(
        "data", f"{sum(len(f.facts) for f in FAMILIES)} facts in {len(FAMILIES)} families, six ways to ask for each"
    )
    plan.fact(
        "schedule", f"base: {cfg.base_steps} steps of {cfg.base_batch_size} sequences, about 1 million parameters"
    )
    family = FAMILIES[0]
    plan.fact(
        "example", f"{family.questions[0].format(**family.facts[0])} -> {family.answer.format(**family.facts[0])}"
    )
    plan.make(cfg.output_dir / "raw", note="Alpaca, ShareGPT, OASST messages, preference pairs in three spellings")
    plan.make(cfg.output_dir / "base", note="Qwen3 architecture, own byte-level BPE, ChatML template")
    plan.make(cfg.output_dir / "prompts.jsonl")
    plan.make(cfg.output_dir / "eval_tasks", note="items of the two tasks in configs/demo/tasks/")


def main(loaded: Loaded) -> None:
    """Corpus, tokenizer, model, a short pre-training. The run's record lies beside the base."""
    cfg = loaded.config
    base = cfg.output_dir / "base"
    # The facts and the recipe are code: another version of them makes another demo.
    code = {path.name: sha256(path) for path in sorted((ROOT / "posttrain/demo").glob("*.py"))}
    run = opened(open_run(base, loaded, inputs={}, rebuild=True, extra_identity={"code": code}))

    import torch

    from posttrain.demo.base import make_model, make_tokenizer, pretrain
    from posttrain.demo.corpus import write_corpus

    texts, files = write_corpus(cfg.output_dir, cfg.seed)
    print(
        f"corpus: {len(files)} files under {shown(cfg.output_dir)}/, {sum(map(len, texts)):,} characters for the base"
    )
    tokenizer = make_tokenizer(texts)
    torch.manual_seed(cfg.seed)
    model = make_model(tokenizer)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"base: {size:,} parameters, {len(tokenizer)} tokens; {cfg.base_steps} steps of pre-training ...", flush=True)
    results = pretrain(model, tokenizer, texts, cfg.base_steps, cfg.base_batch_size, cfg.seed, base / "metrics.jsonl")
    model.cpu().save_pretrained(base)
    tokenizer.save_pretrained(base)
    print(f"base: loss {results['first_loss']} -> {results['loss']}, {results['tokens_per_second']:,} tokens/s")
    weights = [base / "model.safetensors", base / "tokenizer.json"]
    run.finish("model", inputs={}, outputs=[*files, *weights], results={"parameters": size, **results},
               fingerprint=fingerprint(base), seed=cfg.seed)  # fmt: skip


if __name__ == "__main__":
    run_stage(MakeDemo, plan, main, default_config="configs/demo/make_demo.yaml", description=__doc__)
