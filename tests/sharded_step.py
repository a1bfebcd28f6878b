"""One optimiser step of our model, adapter and loss with the weights cut over processes; run by test_sharding.py.

    python -m torch.distributed.run --nproc_per_node 2 tests/sharded_step.py <base> <out.json> fsdp2 zero3
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from posttrain import blocks, launch, losses, model  # noqa: E402

LR = 1.0  # of plain SGD: AdamW's first step is the sign of the gradient, in which errors of rounding show large


def build(base: str, kind: str) -> torch.nn.Module:
    """As training.load_trainable builds it, with an adapter that is no longer at its start (B is not 0)."""
    torch.manual_seed(0)
    lm = model.load_base(Path(base), "fp32", whole=False)
    if kind == "full":
        lm.requires_grad_(True)
    else:
        lm = model.new_adapter(lm, blocks.Lora(r=4, dropout=0.0))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    losses.return_logps(lm)
    return lm.train()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 300, (4, 24), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(lm, rows: dict[str, torch.Tensor], scored: int) -> torch.Tensor:
    return -lm(**rows)["logps"].sum() / scored


def trained(lm) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in lm.named_parameters() if p.requires_grad}


def under_fsdp2(lm, rows, scored):
    """torch's fully_shard, cut as accelerate cuts with TRANSFORMER_BASED_WRAP: each decoder layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in losses.causal_lm(lm).get_decoder().layers:
        fully_shard(layer)
    fully_shard(lm)
    here, whole = launch.held(lm)
    optimizer = torch.optim.SGD(trained(lm).values(), LR)
    loss = loss_of(lm, rows, scored)
    (loss * dist.get_world_size()).backward()  # gradients are averaged over processes
    optimizer.step()
    return loss.detach(), here, whole, {name: p.full_tensor().detach() for name, p in trained(lm).items()}


def under_zero3(lm, rows, scored):
    """deepspeed.initialize; parameters of any size are cut (the default keeps small ones whole)."""
    import deepspeed

    # An all-reduce in shared memory, which would be compiled for minutes at first use.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    names = list(trained(lm))
    engine, *_ = deepspeed.initialize(
        model=lm, optimizer=torch.optim.SGD(trained(lm).values(), LR),
        config={"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    )  # fmt: skip
    here, whole = launch.held(engine)
    assert losses.causal_lm(lm).get_output_embeddings().weight.numel() == 0, "the head is whole outside of a forward"
    loss = loss_of(engine, rows, scored)
    engine.backward(loss * dist.get_world_size())
    engine.step()
    after = {}
    for name, parameter in lm.named_parameters():
        if name in names:
            with deepspeed.zero.GatheredParameters([parameter]):
                after[name] = parameter.detach().clone()
    return loss.detach(), here, whole, after


def compare(how: str, kind: str, base: str) -> dict[str, float]:
    """A step on the whole batch in one process against the same step over all of them."""
    rank, rows = dist.get_rank(), batch()
    scored = int((rows["labels"][:, 1:] != -100).sum())
    alone, lm = build(base, kind), build(base, kind)

    optimizer = torch.optim.SGD(trained(alone).values(), LR)
    expected = loss_of(alone, rows, scored)
    before = {name: p.detach().clone() for name, p in trained(alone).items()}
    expected.backward()
    optimizer.step()

    own = {name: part[2 * rank : 2 * rank + 2] for name, part in rows.items()}
    loss, here, whole, after = {"fsdp2": under_fsdp2, "zero3": under_zero3}[how](lm, own, scored)
    dist.all_reduce(loss)
    return {
        "loss": loss.item(), "expected": expected.item(), "here": here, "whole": whole,
        "off": max((after[name] - p).abs().max().item() for name, p in trained(alone).items()),
        "moved": max((before[name] - p).abs().max().item() for name, p in trained(alone).items()),
    }  # fmt: skip


def main(base: str, out: str, *hows: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    facts = {f"{how} {kind}": compare(how, kind, base) for how in hows for kind in ("lora", "full")}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
