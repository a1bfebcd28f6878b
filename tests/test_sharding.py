"""Our model building, adapter and loss with the weights cut over two processes (gloo, no card).

accelerate reaches FSDP2 and ZeRO-3 on cards only, so this is one level down: torch's fully_shard and
deepspeed.initialize. The launch itself is in test_launch.py.
"""

import json
from importlib.util import find_spec

import pytest
from conftest import run_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def steps(base, tmp_path_factory) -> dict[str, dict]:
    """What tests/sharded_step.py measured: "fsdp2 lora" -> loss, sizes, how far the weights are off."""
    out = tmp_path_factory.mktemp("sharding") / "out.json"
    hows = ["fsdp2"] + (["zero3"] if find_spec("deepspeed") else [])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_command(*launch, "tests/sharded_step.py", str(base), str(out), *hows)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("how", ["fsdp2", "zero3"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_over_two_processes_is_the_step_of_one(how, kind, steps):
    """Each process holds half of the weights; the loss is that of the whole model, and so are the weights after a step,
    the output head's among them: the losses read it, and it is gathered because they call it as a module."""
    if how == "zero3" and not find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed: pip install -r requirements-zero3.txt")
    step = steps[f"{how} {kind}"]
    assert step["here"] == pytest.approx(step["whole"] / 2, rel=0.01)
    assert step["loss"] == pytest.approx(step["expected"], abs=1e-5)
    assert step["moved"] > 1e-3 and step["off"] < 1e-5
