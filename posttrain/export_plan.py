"""
What export_lora would do, without torch: which stage a config is of, the base, the place, the size, the checks.
"""

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from posttrain import runs
from posttrain.blocks import Training
from posttrain.config import Loaded, in_project, leaves, read_yaml, schema_keys, shown
from posttrain.errors import UserFault
from posttrain.export_checks import BOUNDS, PRECISIONS
from posttrain.forecast import memory
from posttrain.plan import origin_of
from posttrain.runs import read_json
from posttrain.stages import TRAINING_STAGES, ExportLora


def training_class(path: Path) -> type[Training]:
    """Which training stage a YAML is of: its `stage:` key, else keys that only one of them has. UserFault else."""
    values = read_yaml(path)
    choices = ", ".join(TRAINING_STAGES)
    if "stage" in values:
        if values["stage"] in TRAINING_STAGES:
            return TRAINING_STAGES[values["stage"]]
        raise UserFault(f"{shown(path)}: stage: {values['stage']!r} is not a training stage; export_lora reads a "
                        f"training config\n  choices: {choices}")  # fmt: skip
    keys = {name: set(schema_keys(cls)) for name, cls in TRAINING_STAGES.items()}
    owners = {key: [name for name in keys if key in keys[name]] for key in leaves(values)}
    # A key may be of several stages (length_penalty of two): what all keys have in common tells.
    able = set(keys).intersection(*(names for names in owners.values() if names))
    if len(able) > 1:  # ask the run; a config of train_cpt has no key of its own, so SFT is meant where there is none
        run = read_json(in_project(Path(values.get("output_dir", "."))) / "manifest.json") or {}
        made_by = {name for name in able if TRAINING_STAGES[name].name == run.get("stage")}
        able = made_by or able - {"cpt"}
    if len(able) != 1:
        raise UserFault(f"{shown(path)}: which training stage is this? Add one line `stage: ...`\n  choices: {choices}")
    return TRAINING_STAGES[able.pop()]


def block_of(cfg: Training) -> ExportLora:
    """What to do, as the config of this stage."""
    return ExportLora(run=cfg.output_dir, **cfg.export.model_dump())


def other_base(loaded: Loaded, manifest: dict) -> str | None:
    """The fault if the config names another base than the run's. A base that only the hardware file names does not
    count: an adapter may be exported on another machine than the one that trained it."""
    origin = origin_of("model.base", loaded.origins)
    asked, trained = loaded.config.model, manifest["base"]
    if origin is None or origin.startswith("configs/hardware") or trained["id"] in (asked.base, *asked.fallback):
        return None
    directory = in_project(Path(asked.base))
    found = runs.fingerprint(directory) if (directory / "config.json").is_file() else None
    if found == trained["fingerprint"]:
        return None
    return (f"model.base: {asked.base} is not the base that {shown(loaded.config.output_dir)} was trained on\n"
            f"      trained on {trained['id']}, fingerprint {trained['fingerprint'][:12]}"
            f"{f', this one {found[:12]}' if found else ''}; leave model.base out: the run knows its base")  # fmt: skip


def elements_on_disk(directory: Path) -> int:
    """Elements of all tensors in a directory's safetensors files, read from their headers."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with open(file, "rb") as f:
            header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        for name, tensor in header.items():
            total += prod(tensor["shape"]) if name != "__metadata__" else 0
    return total


def dtype_of_export(cfg: ExportLora, base: Path | None) -> str:
    """Precision of merged weights: the one asked for, else the base's own (`dtype` in its config.json, before
    transformers 5 `torch_dtype`)."""
    if cfg.dtype != "auto":
        return cfg.dtype
    config = read_json(base / "config.json") if base else {}
    named = config.get("dtype") or config.get("torch_dtype") or "float32"
    return named if named in PRECISIONS else "float32"


def size(cfg: ExportLora, training: Training, manifest: dict[str, Any] | None) -> tuple[int, str]:
    """(bytes written at most, what is written). Two merged models stand on the disk while merge_base auto compares."""
    trained = manifest["base"] if manifest else {"id": training.model.base, "path": training.model.base}
    base = in_project(Path(trained["path"]))
    if cfg.mode == "adapter":
        file = cfg.run / "adapter_model.safetensors"
        return (file.stat().st_size if file.is_file() else 0), "adapter, tokenizer, README.md, manifest.json"
    elements = elements_on_disk(cfg.run) if training.finetuning_type == "full" and manifest else 0
    elements = elements or (elements_on_disk(base) if base.is_dir() else 0)
    arch = memory.architecture(trained["id"])
    if not elements and arch:
        linear, other = memory.parameter_counts(arch)
        elements = sum(linear) + other
    dtype = dtype_of_export(cfg, base) if base.is_dir() or cfg.dtype != "auto" else "bfloat16"
    both = cfg.merge_base == "auto" and quantization_of(training, manifest) != "none"
    note = f"merged weights in {dtype}{', two while they are compared' if both else ''}, tokenizer, README.md"
    return elements * (4 if dtype == "float32" else 2) * (1 + both), note if elements else f"{note}; size unknown"


def quantization_of(training: Training, manifest: dict[str, Any] | None) -> str:
    """4-bit type that the run trained on; for a run that is not there yet, what its config says."""
    return manifest["quantization"]["type"] if manifest else training.model.quantization


def checks(cfg: ExportLora, training: Training, manifest: dict[str, Any] | None) -> list[str]:
    """What will be checked, with which bounds, for the dry run."""
    trained = "the trained weights" if training.finetuning_type == "full" else "base + adapter"
    lines = [f"check: reload from disk, compare logits with {trained} on {cfg.num_check_prompts} conversations of "
             "the run's validation (else training) file"]  # fmt: skip
    if cfg.mode == "adapter":
        return [*lines, "bound: equal to the last bit; exit 4 otherwise, or where the adapter is zero or not finite"]
    mean = f"{cfg.max_logit_diff:g}" if cfg.max_logit_diff else \
        ", ".join(f"{name} {BOUNDS[name][0]:g}" for name in BOUNDS) + " standard deviations of the logits"  # fmt: skip
    top1 = f"{cfg.min_top1:g}" if cfg.min_top1 is not None else ", ".join(f"{n} {BOUNDS[n][1]:g}" for n in BOUNDS)
    lines += [f"bound: mean |logit difference| at most {mean}; top-1 agreement at least {top1}"]
    if training.finetuning_type == "full":
        return lines
    lines += ["exit 4 too where the merged model is the base, holds not what the adapter changes, or is not finite"]
    if quantization_of(training, manifest) != "none":
        lines.append(f"4-bit run, merge_base {cfg.merge_base}: "
                     + ("the dequantised and the unquantised base are both merged and measured, the nearer is kept"
                        if cfg.merge_base == "auto" else f"merged into the {cfg.merge_base} base"))  # fmt: skip
    return lines


def no_adapter(cfg: ExportLora, training: Training) -> list[str]:
    """The fault where an adapter is asked of a run that trained every weight."""
    if training.finetuning_type == "lora" or cfg.mode == "merged":
        return []
    return [f"export.mode: adapter, but {shown(cfg.run)} trains every weight (finetuning_type: full); "
            "--set export.mode=merged writes the whole model in export.dtype, with the serving template"]  # fmt: skip


def faults_of_place(cfg: ExportLora) -> list[str]:
    """Why the export cannot go where it is asked to go: a run, or a directory with something else in it."""
    out, status = cfg.output_dir, read_json(cfg.output_dir / "status.json")
    if out == cfg.run or out in cfg.run.parents or cfg.run in out.parents:
        return [f"export.output_dir: {shown(out)} and the run {shown(cfg.run)} lie in each other; choose a directory "
                "of its own, e.g. outputs/merged/<name>"]  # fmt: skip
    if out.exists() and not out.is_dir():
        return [f"export.output_dir: {shown(out)} is a file"]
    if out.is_dir() and any(out.iterdir()) and (status or {}).get("stage") != "export_lora":
        return [f"export.output_dir: {shown(out)} holds something that is not an export; choose another directory"]
    return []
