"""Every YAML under configs/ is a test case: it loads into the class of the stage that reads it."""

import re
from pathlib import Path

import pytest
import yaml

from posttrain.config import ROOT, load_config, read_yaml
from posttrain.data.catalogue import load_catalogue
from posttrain.plan import stage_of
from posttrain.schedule import plan_steps
from posttrain.stages import STAGES

CONFIGS = ROOT / "configs"
HARDWARE = sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml"))


def names(files) -> list[str]:
    return sorted(str(path.relative_to(CONFIGS)) for path in files)


STAGE_FILES = names(path for where in ("", "demo", "recipes") for path in (CONFIGS / where).glob("*.yaml")
                    if path.stem not in ("datasets", "panel") or where == "recipes")  # fmt: skip
CATALOGUES = names(CONFIGS.rglob("datasets.yaml"))
ACCELERATE = names((CONFIGS / "accelerate").glob("*.yaml"))
TASKS = names(CONFIGS.glob("*/tasks/*.yaml"))


def stage_named_in(path: Path) -> str:
    """The stage of a YAML: by its name, or by the command that a recipe gives in its first lines."""
    head = "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:8])
    command = re.search(r"-m scripts\.(\w+) --config (\S+)", head)
    if path.parent.name == "recipes":
        assert command and command[2] == f"configs/recipes/{path.name}", f"{path}: no command in its first lines"
        return command[1]
    return stage_of(path)


def test_no_yaml_is_left_out():
    tried = {"panel.yaml", *STAGE_FILES, *CATALOGUES, *ACCELERATE, *TASKS}
    tried |= {f"hardware/{name}.yaml" for name in HARDWARE}
    assert set(names(CONFIGS.rglob("*.yaml"))) == tried


@pytest.mark.parametrize("name", STAGE_FILES)
def test_stage_config_loads(name):
    path = CONFIGS / name
    cls = STAGES[stage_named_in(path)]
    loaded = load_config(cls, path)
    stated = read_yaml(path)
    assert set(stated) <= set(loaded.origins) | {key.split(".")[0] for key in loaded.origins}


HARDWARE_USERS = [n for n in STAGE_FILES if "hardware" in STAGES[stage_named_in(CONFIGS / n)].model_fields]


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("name", HARDWARE_USERS)
def test_every_card_loads_under_every_stage(name, hardware):
    loaded = load_config(STAGES[stage_named_in(CONFIGS / name)], CONFIGS / name, [f"hardware={hardware}"])
    assert loaded.hardware == hardware and loaded.card["vram_gib"] >= 0


@pytest.mark.parametrize("hardware", HARDWARE)
def test_hardware_files_hold_nothing_that_decides_the_result(hardware):
    """What is learned belongs to the stage: no learning rate, no epochs, no tokens per step beside a card."""
    content = read_yaml(CONFIGS / f"hardware/{hardware}.yaml")
    decides = {"learning_rate", "num_train_epochs", "tokens_per_step", "sequences_per_step", "weight_decay", "seed"}
    for stage, values in content.items():
        if isinstance(values, dict):
            assert not decides & set(values.get("trainer", {})), f"{hardware}.{stage}"
            assert stage == "all_training" or stage in STAGES


@pytest.mark.parametrize("hardware", ["4090", "5090", "h200"])
def test_cards_that_stand_for_others_leave_the_precision_open(hardware):
    """`hardware: auto` gives a V100 the file of a 5090, and a V100 has no bf16."""
    stages = {"train_sft": "sft.yaml", "eval_harness": "eval.yaml", "infer_compare": "compare.yaml"}
    for stage, file in stages.items():
        loaded = load_config(STAGES[stage], CONFIGS / file, [f"hardware={hardware}"]).config
        assert getattr(loaded, "trainer", loaded).precision == "auto"


@pytest.mark.parametrize("hardware", [name for name in HARDWARE if name.startswith("3050")])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_small_card_accumulates_eight_rows(hardware, packing):
    sets = [f"hardware={hardware}", f"trainer.packing={packing}"]
    trainer = load_config(STAGES["train_sft"], CONFIGS / "recipes/small_card.yaml", sets).config.trainer
    assert plan_steps(trainer, 10_000).accumulation == 8


@pytest.mark.parametrize("name", CATALOGUES)
def test_catalogue_is_complete(name):
    for key, entry in load_catalogue(CONFIGS / name).items():
        assert entry.licence != "unknown" and entry.language != "unknown", key
        assert entry.hub or entry.modelscope or name.startswith("demo"), key


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_its_config(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / name))
    assert config.mixed_precision == "no"  # trainer.precision of the stage decides
    assert config.distributed_type.value == {"single": "NO", "ddp": "MULTI_GPU", "ddp_multinode": "MULTI_GPU",
                                               "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[Path(name).stem]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_task_files_name_their_task(name):
    content = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    assert content["task"] == Path(name).stem


def test_defaults_are_the_real_experiment():
    """The figures that the issue fixes; a change here is a change of the experiment."""

    def loaded(stage, file, *sets):
        return load_config(STAGES[stage], CONFIGS / file, list(sets)).config

    sft = loaded("train_sft", "sft.yaml", "hardware=4090")
    assert sft.model.base == "Qwen/Qwen3-4B-Instruct-2507"
    assert (sft.lora.r, sft.lora.alpha, sft.lora.dropout, len(sft.lora.target_modules)) == (16, 16, 0.05, 7)
    assert (sft.trainer.learning_rate, sft.trainer.num_train_epochs, sft.trainer.max_length) == (2e-4, 1.5, 2048)
    assert sft.trainer.tokens_per_step == 32 * 2048 and sft.trainer.packing and sft.loss_on == "assistant"
    assert loaded("train_sft", "sft.yaml", "hardware=5090").trainer.max_length == 4096
    orpo = loaded("train_orpo", "orpo.yaml", "hardware=5090")
    assert (orpo.beta, orpo.length_penalty, orpo.prefer_chinese_ratio) == (0.2, 0.02, 0.7)
    assert (orpo.trainer.learning_rate, orpo.trainer.num_train_epochs) == (8e-5, 1)
    dpo = loaded("train_dpo", "dpo.yaml", "hardware=4090")
    assert (dpo.beta, dpo.trainer.learning_rate, dpo.trainer.num_train_epochs) == (0.2, 5e-5, 1)
    paper = loaded("train_dpo", "recipes/dpo_paper.yaml", "hardware=4090")
    assert (paper.beta, paper.trainer.learning_rate, paper.trainer.sequences_per_step) == (0.1, 5e-6, 32)
    small = loaded("train_sft", "recipes/small_card.yaml")
    assert (small.lora.r, small.lora.alpha) == (8, 16)
    assert (small.trainer.max_length, small.trainer.tokens_per_step) == (512, 8 * 512)
    label = loaded("train_sft", "recipes/classification_qa.yaml")
    assert (label.lora.r, label.lora.alpha, label.lora.dropout, label.trainer.num_train_epochs) == (8, 32, 0.1, 3)
    assert label.lora.target_modules == ["q_proj", "v_proj"]
