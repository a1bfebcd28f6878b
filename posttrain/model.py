"""Tokenizer, base model, quantisation, adapter: found, loaded and identified in one place."""

import functools
import hashlib
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from posttrain import blocks, chat, families, hub, light_bitsandbytes, runs, templates
from posttrain.config import in_project, shown
from posttrain.errors import UserFault

# ------------------------------------------------------------------ finding the base


@dataclass(frozen=True)
class Base:
    """A base model on disk: the name it was asked by, where it lies, and the fingerprint of its weights."""

    id: str
    path: Path
    fingerprint: str

    def facts(self) -> dict[str, str]:
        """As it stands in a manifest."""
        return {"id": self.id, "path": shown(self.path), "fingerprint": self.fingerprint}


def missing_files(directory: Path) -> list[str]:
    """What a model directory lacks to be loaded: config, tokenizer, weights (every shard of the index)."""
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        missing.append("tokenizer.json")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        listed = runs.read_json(index) or {}
        shards = set(listed.get("weight_map", {"": "a readable model.safetensors.index.json"}).values())
        missing += sorted(shard for shard in shards if not (directory / shard).is_file())
    elif not list(directory.glob("*.safetensors")):
        missing.append("model.safetensors")
    return missing


def on_disk(name: str, model: blocks.Model) -> tuple[Path | None, str]:
    """(directory, "") of a base that is complete on disk, or (None, why not). Asks no network."""
    local = in_project(Path(name))
    if local.is_dir():
        why = _no_whole_model(local)
        return (local, "") if not why else (None, f"{name}: {why}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return None, f"{name}: no such directory, and not a hub id (organisation/name)"
    found = hub.find_cached_base(name, model.revision, model.hub)
    if found is None:
        return None, f"{name}: not in the {model.hub} cache, or not whole there"
    lacking = missing_files(found)
    return (found, "") if not lacking else (None, f"{name}: its download is not complete (lacks {', '.join(lacking)})")


def _no_whole_model(directory: Path) -> str:
    """Why a directory is not a whole model; "" if it is one: a published base, a run with finetuning_type full, or an
    export with merged weights."""
    manifest, status = (runs.read_json(directory / f"{name}.json") for name in ("manifest", "status"))
    if status and not manifest:
        return f"an unfinished run ({status.get('stage')}, {status.get('state')}); run its stage to the end"
    lacking = missing_files(directory)
    if lacking and (directory / "adapter_config.json").is_file():
        return ("an adapter, not a whole model; continue it with sft_run (of train_sft: cpt_run), or merge it first: "
                "python -m scripts.export_lora --config <its YAML> --set export.mode=merged")  # fmt: skip
    return f"the directory lacks {', '.join(lacking)}" if lacking else ""


def is_hub_id(name: str) -> bool:
    """Whether a base that is not on disk could be on the hub."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~", "outputs/"))


def find_base(model: blocks.Model) -> tuple[Path | None, str, list[str]]:
    """(directory, name, notes) of the first of base and fallbacks that is on disk. No network, nothing downloaded.

    A base given as a directory has no fallback: a wrong path must not end in another model.
    """
    notes = []
    candidates = [model.base, *model.fallback] if is_hub_id(model.base) else [model.base]
    for name in candidates:
        found, why = on_disk(name, model)
        if found:
            return found, name, notes
        notes.append(why)
    return None, model.base, notes


def resolve_base(model: blocks.Model) -> Base:
    """The first of base and fallbacks that can be had, downloading it if need be. UserFault if none can."""
    notes = []
    for name in [model.base, *model.fallback] if is_hub_id(model.base) else [model.base]:
        found, why = on_disk(name, model)
        if found is None and is_hub_id(name) and not hub.offline():
            found, why = _download(name, model)
        if found:
            for note in notes:
                print(f"base: {note}; going on to {name}", flush=True)
            return Base(name, found, runs.fingerprint(found))
        notes.append(why)
    raise UserFault(base_fault(notes))


def base_fault(notes: list[str]) -> str:
    """The message for a base that cannot be had."""
    tried = "\n".join(f"    {note}" for note in notes)
    offline = " (HF_HUB_OFFLINE=1: nothing is downloaded)" if hub.offline() else ""
    return (f"model.base: no base model could be had{offline}. Tried:\n{tried}\n"
            "    choose: a directory with the model, --set model.base=<directory>; or download it first with "
            "`python -m scripts.fetch --config configs/fetch.yaml`")  # fmt: skip


def _download(name: str, model: blocks.Model) -> tuple[Path | None, str]:
    try:
        return hub.download_base(name, model.revision, model.hub), ""
    except UserFault as fault:
        return None, str(fault)


# ------------------------------------------------------------------ device, precision, attention


def device() -> torch.device:
    """The card of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of frozen weights and of autocast. auto: bf16 where the card computes in it, else fp16; CPU fp32."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision != "auto":
        return named[precision]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def attention(asked: str) -> str:
    """auto: flash attention 2 where the package is there and the card is Ampere or newer, else PyTorch's sdpa."""
    if asked == "flash_attention_2" and not find_spec("flash_attn"):
        raise UserFault("model.attn_implementation: flash_attention_2 needs the package flash_attn, which is not here; "
                        "choose auto or sdpa")  # fmt: skip
    if asked != "auto":
        return asked
    able = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return "flash_attention_2" if able and find_spec("flash_attn") else "sdpa"


# ------------------------------------------------------------------ loading


def read_tokenizer(path: Path, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a directory as it is there. UserFault if it cannot be read."""
    families.check_remote_code(path, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # json, tokenizers and transformers each raise their own for a damaged file
        raise UserFault(f"{shown(path)}: its tokenizer cannot be read ({str(error).splitlines()[0]}); fetch or copy it "
                        "again") from error  # fmt: skip


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json")  # fmt: skip


def tokenizer_sha(path: Path) -> str:
    """SHA-256 over the files that decide how text becomes ids."""
    hashes = [f"{name}:{runs.sha256(path / name)}" for name in TOKENIZER_FILES if (path / name).is_file()]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def load_tokenizer(path: Path, chat_template: str = "auto", trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a base or of a run, with the training template locked in and a padding token set."""
    return locked_tokenizer(path, chat_template, trust_remote_code)[0]


def for_training(path: Path, chat_template: str, trust_remote_code: bool) -> tuple[Tokenizer, templates.Template]:
    """As locked_tokenizer, but read once a process, unless its files change: the plan of a run reads it first, and a
    vocabulary of 150,000 takes 1 to 2 CPU seconds."""
    stamps = tuple((path / name).stat().st_mtime_ns for name in (*TOKENIZER_FILES, "chat_template.jinja")
                   if (path / name).is_file())  # fmt: skip
    return _read_once(path, chat_template, trust_remote_code, stamps)


@functools.lru_cache(maxsize=1)
def _read_once(path: Path, chat_template: str, trust_remote_code: bool, stamps: tuple[int, ...]):
    return locked_tokenizer(path, chat_template, trust_remote_code)


def locked_tokenizer(path: Path, chat_template: str = "auto", trust_remote_code: bool = False
                     ) -> tuple[Tokenizer, templates.Template]:  # fmt: skip
    """(tokenizer, template): the tokenizer of a base or of a run with the training template locked in and a padding
    token set."""
    tokenizer = read_tokenizer(path, trust_remote_code)
    template = templates.choose_template(tokenizer, chat_template)
    chat.lock_template(tokenizer, template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|endoftext|>" if "<|endoftext|>" in tokenizer.get_vocab() else tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer, template


def load_base(path: Path, precision: str = "auto", quantization: str = "none", double_quant: bool = True,
              attn_implementation: str = "auto", trust_remote_code: bool = False,
              whole: bool = True) -> PreTrainedModel:  # fmt: skip
    """The frozen base on this process's device, in eval mode. 4-bit by bitsandbytes where asked. Where it is not to be
    `whole` there it stays in the machine's memory, from which FSDP2 and ZeRO-3 take each process's share."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    dtype, where = dtype_of(precision), device()
    arguments: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention(attn_implementation)}
    if quantization != "none":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    if (where.type == "cuda" and whole) or quantization != "none":
        arguments["device_map"] = {"": where}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, trust_remote_code=trust_remote_code, **arguments
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise UserFault(f"model.base: {shown(path)} cannot be loaded: {str(error).splitlines()[0]}") from error
    families.check_head(model, path)
    model.eval()
    if whole and quantization == "none":  # 4-bit weights on a CPU are repacked by a forward pass (release_4bit)
        families.check_logits(model, path)
    return model


def skeleton(path: Path, trust_remote_code: bool = False) -> nn.Module:
    """The model of a directory without its weights, for checks that need only its layers. UserFault for a base that
    cannot be trained here."""
    families.check_remote_code(path, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a model's own Python raises what it likes
        if not (trust_remote_code or isinstance(error, OSError | ValueError | KeyError)):
            raise
        of_its_own = " by the Python that it brings" if trust_remote_code else ""
        raise UserFault(f"model.base: {shown(path)}: its config.json cannot be used{of_its_own} "
                        f"({type(error).__name__}: {str(error).splitlines()[0]})\n  choose {families.GOOD}"
                        ) from error  # fmt: skip
    families.check_head(bare, path)
    return bare


def new_adapter(model: PreTrainedModel, lora: blocks.Lora):
    """A fresh LoRA adapter on the base. UserFault if a target module is not in this architecture."""
    light_bitsandbytes.import_bitsandbytes()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias=lora.bias,
                        target_modules=families.target_modules(model, lora), use_rslora=lora.use_rslora,
                        use_dora=lora.use_dora, task_type="CAUSAL_LM")  # fmt: skip
    return get_peft_model(model, config)


def load_adapter(model: PreTrainedModel, adapter_dir: Path, trainable: bool = False):
    """The adapter of a run on its base. UserFault if its shapes are of another base."""
    light_bitsandbytes.import_bitsandbytes()
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0]
        raise UserFault(f"{shown(adapter_dir)}: the adapter does not fit this base ({why})") from error


def release_4bit(model: nn.Module) -> None:
    """Undo what bitsandbytes 0.50 does to 4-bit weights on CPUs with AVX512-BF16 at a first forward without gradients:
    it repacks them, and later gradients and merges read them wrongly (cosine 0.24 to the true gradient). Its
    state_dict hook packs them back. Call after every evaluation or generation during training. No effect otherwise."""
    if device().type == "cpu" and getattr(model, "is_loaded_in_4bit", False):
        model.state_dict()


# ------------------------------------------------------------------ adapters of runs


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter directory says of itself. `manifest` is None for an adapter that this project did not train.

    whole: not an adapter but a whole model; its base is then the one below all whole models that it was trained on."""

    dir: Path
    base_id: str
    base_path: Path | None
    base_fingerprint: str | None
    quantization: str
    double_quant: bool
    template_sha: str | None
    manifest: dict[str, Any] | None
    whole: bool = False

    @property
    def weights(self) -> dict[str, Any]:
        """The trained weights as an input of a manifest."""
        if self.whole:
            return {"path": shown(self.dir), "fingerprint": runs.fingerprint(self.dir)}
        return runs.describe_file(self.dir / "adapter_model.safetensors")


def run_facts(directory: Path) -> AdapterFacts:
    """The facts of an adapter, or of a whole model that a run or an export made. UserFault if it is neither."""
    manifest = runs.read_json(directory / "manifest.json")
    if not is_whole(manifest):
        return adapter_facts(directory)
    base = root_base(manifest)
    path, quantization = in_project(Path(base["path"])), manifest.get("quantization") or {}
    found = path if path.is_dir() else on_disk(base["id"], blocks.Model(base=base["id"]))[0]
    return AdapterFacts(directory, base["id"], found, base["fingerprint"], "none",
                        quantization.get("double_quant", True), manifest["template"]["sha256"], manifest,
                        whole=True)  # fmt: skip


def is_whole(manifest: dict[str, Any] | None) -> bool:
    """Whether a manifest is of a whole model that stands on a base: trained with finetuning_type full, or merged."""
    return isinstance(manifest, dict) and manifest.get("kind") == "model" and "base" in manifest


def root_base(manifest: dict[str, Any]) -> dict[str, str]:
    """The base below whole models that were trained one on the other: {id, path, fingerprint}."""
    base = manifest["base"]
    while is_whole(below := runs.read_json(in_project(Path(base["path"])) / "manifest.json")):
        base = below["base"]
    return base


def adapter_facts(adapter_dir: Path) -> AdapterFacts:
    """Read a run's manifest, or PEFT's own config for a foreign adapter. UserFault if it is neither."""
    settings = runs.read_json(adapter_dir / "adapter_config.json")
    if settings is None and is_whole(runs.read_json(adapter_dir / "manifest.json")):
        raise UserFault(f"{shown(adapter_dir)}: a whole model, not an adapter; go on from it with "
                        f"model.base={shown(adapter_dir)} and sft_run=null (of train_sft: cpt_run=null)")  # fmt: skip
    if not (isinstance(settings, dict) and settings.get("base_model_name_or_path")):
        there = (adapter_dir / "adapter_config.json").is_file()
        why = "adapter_config.json is damaged, or names no base" if there else "adapter_config.json is missing"
        raise UserFault(f"{shown(adapter_dir)}: no adapter there ({why}); run the training that makes it to its end, "
                        "or name another directory")  # fmt: skip
    manifest = runs.read_json(adapter_dir / "manifest.json")
    if manifest is None:
        if (adapter_dir / "status.json").is_file():
            runs.read_manifest(adapter_dir, "adapter")  # raises: this run of ours is not finished
        name = settings["base_model_name_or_path"]
        local = on_disk(name, blocks.Model(base=name))[0]
        return AdapterFacts(adapter_dir, name, local, None, "none", True, None, None)
    if not (isinstance(manifest, dict) and {"base", "quantization", "template"} <= manifest.keys()):
        stage = manifest.get("stage", "?") if isinstance(manifest, dict) else "?"
        raise UserFault(f"{shown(adapter_dir)}: its manifest.json is one of {stage}, not of a training; if that was "
                        "written beside an adapter, move manifest.json and status.json away")  # fmt: skip
    base, quantization = manifest["base"], manifest["quantization"]
    path = in_project(Path(base["path"]))
    found = path if path.is_dir() else on_disk(base["id"], blocks.Model(base=base["id"]))[0]
    return AdapterFacts(adapter_dir, base["id"], found, base["fingerprint"], quantization["type"],
                        quantization["double_quant"], manifest["template"]["sha256"], manifest)  # fmt: skip


def check_same_base(facts: list[AdapterFacts]) -> AdapterFacts:
    """The first of several adapters, after making sure that all stand on one base that is on disk unchanged."""
    first = facts[0]
    for other in facts[1:]:
        same = other.base_fingerprint == first.base_fingerprint if other.base_fingerprint and first.base_fingerprint \
            else other.base_id == first.base_id  # fmt: skip
        if not same:
            raise UserFault(f"the adapters stand on different bases: {shown(first.dir)} on {first.base_id}, "
                            f"{shown(other.dir)} on {other.base_id}; compare those of one base at a time")  # fmt: skip
    if first.base_path is None:
        how = "fetch it with `python -m scripts.fetch`" if is_hub_id(first.base_id) else \
            "put that directory back, or train the adapter anew on a base that is here"  # fmt: skip
        raise UserFault(f"{shown(first.dir)}: its base {first.base_id} is not on disk; {how}")
    if first.base_fingerprint and runs.fingerprint(first.base_path) != first.base_fingerprint:
        raise UserFault(f"{shown(first.base_path)} is not the base that {shown(first.dir)} was trained on: other "
                        f"weights under the same name\n  trained on {first.base_id}, fingerprint "
                        f"{first.base_fingerprint[:12]}, found {runs.fingerprint(first.base_path)[:12]}")  # fmt: skip
    return first
