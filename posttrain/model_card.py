"""The README.md of an export: what it is, from what it was made, how it was checked, how it is loaded."""

from typing import Any

from posttrain.config import shown
from posttrain.runs import read_json
from posttrain.stages import ExportLora

CARD = """# {name}

{what} on base `{base}`, made by {stage}.

- base fingerprint: `{fingerprint}`
- training run: {run}, {steps} steps, commit {commit}
- quantisation in training: {quantization}; precision: {precision}

## Data
{data}

## Licence
The licence of the base ({base}) goes on to this model, and so may conditions of the data: {licences}.

## Check
Reloaded from disk and compared with {trained} on {positions} positions of {check_rows} conversations
({check_source}): mean |logit difference| {mean_abs:.3g}, maximum {max_abs:.3g}, same most likely token {top1:.1%}.
All figures are in manifest.json.

## Use
```python
{load}
```
```
{serve}
```
The chat template is that of training, without its training marks.
"""
LOAD_MERGED = """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")"""
LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{name}")"""
SERVE_MERGED = "vllm serve {name}"
SERVE_ADAPTER = "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={name}"


SERVE_DORA = "# vLLM takes no DoRA adapter: export it with --set export.mode=merged, then: vllm serve {name}"
VARIANTS = {"use_rslora": "rsLoRA", "use_dora": "DoRA"}


def text(cfg: ExportLora, facts, results: dict[str, Any]) -> str:
    """`facts` are those of the run's adapter (model.AdapterFacts), `results` those of the export."""
    manifest, is_merged = facts.manifest, cfg.mode == "merged"
    adapter = read_json(facts.dir / "adapter_config.json") or {"r": 0}
    names = {"name": cfg.output_dir.name, "base": facts.base_id, "rank": max(8, adapter["r"])}
    variants = "".join(f", {word}" for key, word in VARIANTS.items() if adapter.get(key))
    serve = SERVE_MERGED if is_merged else SERVE_DORA if adapter.get("use_dora") else SERVE_ADAPTER
    what = f"LoRA adapter (PEFT{variants})"
    if is_merged:
        what = f"{'Whole model' if facts.whole else 'Merged weights'} ({results['dtype']}; {results['why']})"
    data = [f"- {entry['path']}, {entry.get('rows', '?')} rows, SHA-256 `{entry['sha256'][:16]}`"
            for role, entry in manifest["inputs"].items() if role.startswith("train:")]  # fmt: skip
    of_data = manifest["parents"].get("data", {}).get("path")
    check = results.get("merged_vs_adapter") or results["exported_vs_run"]
    return CARD.format(
        **names, stage=manifest["stage"], fingerprint=facts.base_fingerprint, run=shown(cfg.run),
        what=what, trained="the trained weights" if facts.whole else "base + adapter",
        steps=manifest["results"].get("steps", "?"), commit=manifest["git"]["commit"] or "unknown",
        quantization=facts.quantization, precision=manifest["precision"], data="\n".join(data),
        licences=f"see the data card beside {of_data}" if of_data else "see the source of each file",
        **{key: check[key] for key in ("positions", "mean_abs", "max_abs", "top1")},
        check_rows=results["check_rows"], check_source=results["check_source"],
        load=(LOAD_MERGED if is_merged else LOAD_ADAPTER).format(**names),
        serve=serve.format(**names),
    )  # fmt: skip
