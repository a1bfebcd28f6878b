"""Replay, kl_to_base, ewc and slow_start in train_sft: counted, the same however a step is cut, resumed bit for bit."""

import json
import signal
from functools import partial

import pytest
import torch
from conftest import ROOT, chats, run_command, run_here, write_rows
from test_sft import trainer_of
from test_training import command, manifest, metrics, start_and_kill

from posttrain import chat, ewc, model, training, training_data
from posttrain.config import load_config
from posttrain.data.sources import read_training_file
from posttrain.errors import UserFault
from posttrain.forgetting_blocks import KlToBase, SlowStart
from posttrain.replay import mark
from posttrain.rows import pack, sft_rows
from posttrain.runs import sha256
from posttrain.sft import ChunkedSFTTrainer
from posttrain.slow_start import apply_slow_start
from posttrain.stages import TrainSft


def general(count: int) -> list[dict]:
    """Conversations of two sources, about something else."""
    return [{"id": f"g{i}", "source": "stories" if i % 3 else "letters", "meta": {},
             "messages": [{"role": "user", "content": f"第{i}页写了什么？"},
                          {"role": "assistant", "content": f"写了{i}。"}]} for i in range(count)]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The domain, and a general file with three rows twice, two of the domain, one of the validation, one too long."""
    folder = tmp_path_factory.mktemp("forgetting")
    domain, val = chats(90), chats(10, seed=1)
    write_rows(folder / "sft_train.jsonl", domain)
    write_rows(folder / "sft_val.jsonl", val)
    long = general(1)[0] | {"id": "long"}
    long = long | {"messages": [long["messages"][0], {"role": "assistant", "content": "长" * 200}]}
    write_rows(folder / "general.jsonl", [*general(40), *general(3), *domain[:2], *val[:1], long])
    return folder


def sets(base, data, **values) -> list[str]:
    """--set values of a tiny run that replays the general file."""
    known = {
        "hardware": "cpu", "model.base": base, "data.train_files": f"[{data}/sft_train.jsonl]",
        "trainer.max_length": 96, "trainer.tokens_per_step": 192, "replay.files": f"[{data}/general.jsonl]",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (known | values).items()]


def rows_of(base, data, **values) -> training_data.Rows:
    cfg = load_config(TrainSft, ROOT / "configs/sft.yaml", sets(base, data, **values)).config
    records = training_data.read_records(cfg, "sft", read_training_file)
    return sft_rows(cfg, training.start_from_base(cfg, cfg.loss_on), records)


# ------------------------------------------------------------------ replay


def test_every_general_record_has_one_fate_and_the_share_is_of_trained_conversations(base, data):
    rows = rows_of(base, data, **{"replay.share": 0.1, "trainer.packing": "false"})
    assert len(rows.train) == 100 and rows.replay["conversations"] == 10 and rows.replay["share"] == 0.1
    fates = rows.replay["fates"]
    assert sum(fates.values()) == 47 and fates["kept"] == 10
    assert (fates["exact_duplicate"], fates["in_training"], fates["in_validation"]) == (3, 2, 1)
    assert rows.fates == {"kept": 90}, "the domain's records are counted apart"
    assert rows.replay["tokens"] == sum(len(row["input_ids"]) for row in rows.train[90:])
    assert rows.tokens == sum(len(row["input_ids"]) for row in rows.train)
    assert rows.trained_tokens > rows.replay["trained_tokens"] > 0
    assert rows.facts()["replay"] == rows.replay and "10 of 100 trained conversations (10.0%)" in rows.notes[0]
    again, other = (rows_of(base, data, **{"replay.share": 0.1, "trainer.packing": "false", "trainer.seed": seed})
                    for seed in (42, 43))  # fmt: skip
    assert again.train == rows.train and other.train[90:] != rows.train[90:]


def test_too_few_are_said_and_none_is_a_fault(base, data):
    rows = rows_of(base, data, **{"replay.share": 0.5})
    assert rows.replay["conversations"] == 40 and rows.replay["fates"]["longer_than_max_length"] == 1
    assert any("90 conversations were asked for (replay.share 0.5), only 40 can be used" in note for note in rows.notes)
    with pytest.raises(UserFault, match="no usable conversation.*in_training 90"):
        rows_of(base, data, **{"replay.files": f"[{data}/sft_train.jsonl]"})


def test_named_sources_alone(base, data):
    rows = rows_of(base, data, **{"replay.sources": "[letters]", "replay.share": 0.1})
    assert rows.replay["fates"]["other_source"] == 26 + 2 + 2 + 1
    with pytest.raises(UserFault, match=r"no record of novels.*\n.*stories \(28\)"):
        rows_of(base, data, **{"replay.sources": "[letters, novels]"})


def test_rows_that_only_ewc_reads(base, data):
    rows = rows_of(base, data, **{"replay.share": 0, "ewc.weight": 1, "ewc.num_samples": 30})
    assert rows.replay["conversations"] == 0 and len(rows.fisher_rows) == 30
    assert rows.replay["fates"]["for_ewc_only"] == 30 and "replay" not in rows.train[0]


# ------------------------------------------------------------------ the step


def loss_and_gradients(trainer, rows) -> tuple[float, torch.Tensor]:
    trainer.model.train()
    batch = trainer.data_collator([dict(row) for row in rows])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.fixture
def marked(base):
    """Rows of which the last third is replayed."""
    rows = chat.encode_chats(model.load_tokenizer(base), [*chats(8), *general(4)], 96, "assistant", "drop").rows
    mark(rows[:8], rows[8:])
    return rows


def test_packed_rows_hold_the_same_tokens(base, marked, tmp_path):
    """The marks follow their tokens through packing; the loss is that of padded rows, and beta x KL over it."""
    tokenizer, packed = model.load_tokenizer(base), pack(marked, 200)
    assert any(0 < sum(row["replay"]) < len(row["replay"]) for row in packed)
    held, apart, plain = (
        loss_and_gradients(trainer_of(partial(ChunkedSFTTrainer, kl_to_base=kl), base, tokenizer, some, tmp_path,
                                      packing), some)
        for some, packing, kl in ((packed, True, KlToBase(beta=10)), (marked, False, KlToBase(beta=10)),
                                  (marked, False, None))
    )  # fmt: skip
    assert abs(held[0] - apart[0]) < 1e-5 and (held[1] - apart[1]).norm() / apart[1].norm() < 1e-4
    assert apart[0] > plain[0] + 1e-5 and (apart[1] - plain[1]).norm() / plain[1].norm() > 1e-3


def test_accumulation_does_not_change_the_step(base, marked, tmp_path):
    """KL and penalty weigh the same in 1 x 12 and 12 x 1 rows."""
    tokenizer, adapters = model.load_tokenizer(base), []
    for micro, accumulation in ((12, 1), (1, 12)):
        held = partial(ChunkedSFTTrainer, kl_to_base=KlToBase(beta=10))
        trainer = trainer_of(held, base, tokenizer, marked, tmp_path, False, per_device_train_batch_size=micro,
                             gradient_accumulation_steps=accumulation, logging_steps=1)  # fmt: skip
        trainer.penalty = ewc.EwcPenalty(trainer.model, ewc.fisher_diagonal(trainer.model, marked, "factored", 0), 10.0)
        before, (penalty, slopes) = trainable(trainer), penalty_of(trainer)
        trainer.train()
        adapters.append(trainable(trainer))
        assert penalty > 1e-3 and slopes.norm() > 1e-3 and "ewc" in trainer.state.log_history[0]
    assert (adapters[0] - before).norm() > 1e-3
    assert (adapters[0] - adapters[1]).abs().max() < 1e-5


def trainable(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters() if p.requires_grad])


def penalty_of(trainer) -> tuple[float, torch.Tensor]:
    value = trainer.penalty()
    slopes = torch.autograd.grad(value, [p for p in trainer.model.parameters() if p.requires_grad])
    return value.item(), torch.cat([s.flatten() for s in slopes])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_learning_rates_of_a_slow_start(kind, base, marked, tmp_path):
    """A tenth of the rate for 8 of 40 steps, then the trainer's own schedule of the other 32, warm-up from there."""
    trainer = trainer_of(ChunkedSFTTrainer, base, model.load_tokenizer(base), marked, tmp_path, False, max_steps=40,
                         learning_rate=0.5, lr_scheduler_type=kind, warmup_steps=4)  # fmt: skip
    rates = {}
    for slow in (None, SlowStart(share=0.2, factor=0.1)):
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.create_optimizer()
        apply_slow_start(trainer, slow)
        scheduler, rates[slow is not None] = trainer.create_scheduler(40 if slow else 32), []
        for _ in range(40 if slow else 32):
            rates[slow is not None].append(scheduler.get_last_lr()[0])
            trainer.optimizer.step()
            scheduler.step()
    normal, slowed = rates[False], rates[True]
    assert slowed[:8] == pytest.approx([0.05] * 8)
    assert slowed[8:12] == pytest.approx([max(0.05, rate) for rate in normal[:4]])
    assert slowed[12:] == pytest.approx(normal[4:]) and max(slowed) == pytest.approx(0.5)


# ------------------------------------------------------------------ the command


RECIPE = {"replay.share": 0.2, "kl_to_base.beta": 0.5, "ewc.weight": 100, "ewc.num_samples": 8,
          "trainer.slow_start.share": 0.25}  # fmt: skip
FAULTS = {
    "share above a half": ({"replay.share": 0.9}, "replay.share: input should be less than or equal to 0.5"),
    "no file": ({"replay.files": "[]"}, "replay.files"),
    "a share without files": ({"replay": "{share: 0.1}"}, "replay.files: required"),
    "a share of nothing": ({"replay.share": 0}, "replay would do nothing"),
    "a beta of nothing": ({"kl_to_base.beta": 0}, "kl_to_base.beta: input should be greater than 0"),
    "ewc without general rows": ({"replay": "null", "ewc.weight": 1}, "needs replay.files"),
    "ewc on every weight": ({"finetuning_type": "full", "ewc.weight": 1}, "needs finetuning_type: lora"),
    "kl on every weight": ({"finetuning_type": "full", "kl_to_base.beta": 1}, "needs finetuning_type: lora"),
    "trained biases": ({"lora.bias": "all", "kl_to_base.beta": 1}, "needs lora.bias: none"),
    "ewc on DoRA": ({"lora.use_dora": "true", "ewc.weight": 1}, "needs lora.use_dora: false"),
    "slow from end to end": ({"trainer.slow_start.share": 1}, "trainer.slow_start.share: input should be less than 1"),
    "a misspelt key": ({"replay.fraction": 0.1}, "unknown key"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_the_config(case, base, data):
    values, needle = FAULTS[case]
    known = {} if "replay" in values else {"replay.files": f"[{data}/general.jsonl]"}
    given = {"hardware": "cpu", "model.base": base} | known | values
    with pytest.raises(UserFault) as fault:
        load_config(TrainSft, ROOT / "configs/sft.yaml", [f"{key}={value}" for key, value in given.items()])
    assert needle in str(fault.value)


def test_the_dry_run_shows_it_all(base, data, tmp_path):
    from scripts import train_sft

    args = [*command("sft", data, tmp_path / "sft", **{"model.base": base, "replay.files": f"[{data}/general.jsonl]",
                                                       **RECIPE})[2:], "--config", "configs/sft.yaml"]  # fmt: skip
    plan = run_here(TrainSft, train_sft.plan, train_sft.main, *args, "--dry-run")
    assert plan.returncode == 0, plan.stdout + plan.stderr
    for needle in ("replay: 22 of 112 trained conversations (19.6%)", "ewc: F from 8 replay conversations",
                   "0.0005 in the first 3 steps", "kl_to_base: 0.5 x KL(base || model) on", "replay data:",
                   "of replayed rows"):  # fmt: skip
        assert needle in plan.stdout, needle
    missing = run_here(TrainSft, train_sft.plan, train_sft.main, *args, "--dry-run", "--set", "replay.files=[no.jsonl]")
    assert missing.returncode == 2 and "replay data" in missing.stdout
    assert not (tmp_path / "sft").exists()


@pytest.mark.slow
def test_kill_9_with_all_of_them_on_gives_the_same_adapter(base, data, tmp_path):
    """The same rows, the same F (read, not estimated again), the same rates: bit for bit."""
    values = {"model.base": base, "replay.files": f"[{data}/general.jsonl]", **RECIPE}
    whole = run_command(*command("sft", data, tmp_path / "whole", **values))
    assert whole.returncode == 0, whole.stderr
    facts = manifest(tmp_path / "whole")
    assert facts["data"]["replay"]["conversations"] == 22 and f"replay:{data}/general.jsonl" in facts["inputs"]
    logged = {key for line in metrics(tmp_path / "whole") for key in line}
    assert {"kl_to_base", "ewc"} <= logged
    args = command("sft", data, tmp_path / "cut", **values)
    assert start_and_kill(args, tmp_path / "cut", 6, signal.SIGKILL) == -signal.SIGKILL
    store = tmp_path / "cut/fisher.safetensors"
    written = store.stat().st_mtime_ns
    resumed = run_command(*args)
    assert resumed.returncode == 0 and "going on from" in resumed.stdout, resumed.stderr
    assert store.stat().st_mtime_ns == written
    for name in ("adapter_model.safetensors", "fisher.safetensors"):
        assert sha256(tmp_path / f"cut/{name}") == sha256(tmp_path / f"whole/{name}")
    rates = [[line["learning_rate"] for line in metrics(tmp_path / run) if "loss" in line] for run in ("whole", "cut")]
    assert rates[0] == rates[1]


@pytest.mark.slow
def test_replay_forgets_less():
    """The bench on two seeds: general facts that neither run saw, after the same domain."""
    done = run_command("-m", "bench.forgetting", "--seeds", "2", "--only", "plain,replay+kl_to_base")
    assert done.returncode == 0, done.stderr
    seeds = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]  # DeepSpeed prints too
    assert len(seeds) == 2
    for of in seeds:
        assert of["plain"]["general_loss"] > of["base"]["general_loss"] + 0.2, "the domain alone must cost something"
        assert of["replay+kl_to_base"]["general_loss"] < of["plain"]["general_loss"] - 0.05
        assert of["replay+kl_to_base"]["domain_right"] > of["plain"]["domain_right"] - 0.1
