"""
vLLM behind lm-eval's tasks (`backend: vllm`): one engine for the base and all adapters on it.

Not measured: its pins clash with those of training, so it needs an environment of its own, and no machine of this
project has had one yet. The arguments are those of lm_eval 0.4.13's models/vllm_causallms.py. Numbers of the two
backends are not mixed: kept measurements carry the backend. What asks the model itself (answer sets, safety, held-out
rows) stays with hf.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain.config import shown
from posttrain.evals.models import BASE, Lineup
from posttrain.plan import Plan
from posttrain.runs import read_json
from posttrain.stages import EvalHarness

INSTALL = (
    "backend: vllm is not installed here, and its pins clash with this environment's; make one of its own:\n"
    "      python3 -m venv .venv-vllm && .venv-vllm/bin/pip install 'lm-eval[vllm]==0.4.13' peft pydantic psutil\n"
    "      .venv-vllm/bin/pip install --no-deps -e . && .venv-vllm/bin/python -m scripts.eval_harness ...\n"
    "      or take what is here: --set backend=hf"
)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves room for (vllm/config/lora.py)
MAX_MODEL_LEN = 8192  # tokens: at a model's full length (262,144) the keys and values of one request fill the card
DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def plan_backend(plan: Plan, cfg: EvalHarness, lineup: Lineup | None) -> None:
    """Faults of `backend: vllm`, all at once; nothing for hf."""
    if cfg.backend != "vllm":
        return
    if find_spec("vllm") is None:
        plan.faults.append(INSTALL)
    others = [key for key in ("answer_sets", "safety", "sft_test", "pref_test") if getattr(cfg, key)]
    if others:
        off = " ".join(f"--set {key}={'{}' if key == 'answer_sets' else 'null'}" for key in others)
        plan.faults.append(f"backend: vllm runs tasks only; measure {', '.join(others)} with backend=hf in another "
                           f"output_dir, and leave them out here: {off}")  # fmt: skip
    if lineup is None:
        return
    if lineup.quantization != "none":
        plan.faults.append(f"backend: vllm takes no base in 4 bit ({lineup.quantization}) with adapters; set "
                           "quantization=none, or backend=hf")  # fmt: skip
    whole = [name for name, facts in lineup.adapters.items() if facts.whole]
    if whole and len(lineup.adapters) + cfg.include_base > 1:
        plan.faults.append(f"backend: vllm holds one engine, and {', '.join(whole)} is a whole model: give it an "
                           "evaluation of its own, with include_base=false")  # fmt: skip
    for name, facts in lineup.adapters.items():
        if not facts.whole and (why := _not_loadable(facts.dir)):
            plan.faults.append(f"backend: vllm does not load adapter {name}: {why}; merge it first (python -m "
                               "scripts.export_lora ... --set export.mode=merged), or set backend=hf")  # fmt: skip
    plan.fact("schedule", "backend: vllm, one engine; it forms its own batches (batch_size is not used)")


def _not_loadable(adapter: Path) -> str:
    """Why vLLM rejects an adapter (issues 9280, 21500 of vllm-project/vllm), or ""."""
    settings = read_json(adapter / "adapter_config.json") or {}
    targets = settings.get("target_modules") or []
    heads = [name for name in (*targets, *(settings.get("modules_to_save") or []))
             if name in ("lm_head", "embed_tokens")]  # fmt: skip
    if heads or settings.get("modules_to_save"):
        return f"it holds whole layers ({', '.join(heads or settings['modules_to_save'])})"
    if settings.get("use_dora"):
        return "it is a DoRA adapter"
    return "" if settings.get("r", 0) <= RANKS[-1] else f"its rank {settings['r']} is above {RANKS[-1]}"


def engine_arguments(cfg: EvalHarness, lineup: Lineup, tokenizer: Path) -> dict[str, Any]:
    """The keyword arguments of lm-eval's VLLM. tokenizer: the directory of the one with the run's template."""
    whole = next((facts.dir for facts in lineup.adapters.values() if facts.whole), None)
    adapters = [facts.dir for facts in lineup.adapters.values() if not facts.whole]
    arguments = {
        "pretrained": str(whole or lineup.base_path), "tokenizer": str(tokenizer), "dtype": DTYPES[cfg.precision],
        "batch_size": "auto", "seed": cfg.seed, "enable_thinking": False,
        "max_model_len": min(MAX_MODEL_LEN, _positions(whole or lineup.base_path)),
    }  # fmt: skip
    if adapters:
        most = max((read_json(path / "adapter_config.json") or {}).get("r", 0) for path in adapters)
        arguments |= {"lora_local_path": str(adapters[0]), "max_lora_rank": next(r for r in RANKS if r >= most)}
    return arguments


def _positions(model: Path) -> int:
    config = read_json(model / "config.json") or {}
    return (config.get("text_config") or config).get("max_position_embeddings") or MAX_MODEL_LEN


def each_engine(cfg: EvalHarness, lineup: Lineup, names: list[str]) -> Iterator[tuple[str, Any]]:
    """(name, lm-eval's wrapper around the engine) for each name; the same engine, asked with that adapter or none."""
    from posttrain.evals import harness

    if not names:
        return
    from lm_eval.models.vllm_causallms import VLLM
    from vllm.lora.request import LoRARequest

    tokenizer = cfg.output_dir / "partial/tokenizer"
    lineup.tokenizer.save_pretrained(tokenizer)
    wrapped = VLLM(**engine_arguments(cfg, lineup, tokenizer))
    wrapped.sizes = None
    harness.ready(wrapped, lineup.tokenizer, cfg.apply_chat_template)
    for number, name in enumerate(names, 1):
        facts = lineup.adapters.get(name)
        bare = name == BASE or facts.whole
        wrapped.lora_request = None if bare else LoRARequest(name, number, str(facts.dir))
        print(f"  {name}: by vllm: {shown(lineup.base_path if name == BASE else facts.dir)}", flush=True)
        yield name, wrapped
