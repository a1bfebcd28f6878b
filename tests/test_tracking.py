"""Watching a run: trackers that are missing or wanted, the card's samples, the progress bar, the panels."""

import io
import json
import os
import sys
import time
from types import SimpleNamespace

import pytest

from posttrain import tracking
from posttrain.callbacks import Metrics
from posttrain.config import load_config
from posttrain.errors import UserFault
from posttrain.stages import TrainSft


def test_one_tracker_or_a_list():
    for given, expected in (("tensorboard", ["tensorboard"]), ("[tensorboard, wandb]", ["tensorboard", "wandb"])):
        loaded = load_config(TrainSft, "configs/sft.yaml", ["hardware=cpu", f"tracking={given}"])
        assert loaded.config.tracking == expected
    with pytest.raises(UserFault, match="tracking"):
        load_config(TrainSft, "configs/sft.yaml", ["hardware=cpu", "tracking=[tensorboard, neptune]"])


def test_missing_packages_are_named_with_the_command(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: name == "tensorboard" or None)
    tracking.check_packages(["none", "tensorboard"])
    with pytest.raises(UserFault, match=r"wandb, swanlab not installed\n.*pip install wandb==\S+ swanlab==\S+, "):
        tracking.check_packages(["tensorboard", "wandb", "swanlab"])


@pytest.mark.parametrize("login, offline, mode", [
    ("", "0", "offline"), ("key", "0", "online"), ("key", "1", "offline"),
])  # fmt: skip
def test_wandb_stays_offline_without_login_and_without_hub(login, offline, mode, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "check_packages", lambda names: None)
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path), "HF_HUB_OFFLINE": offline, "WANDB_PROJECT": "mine"}
                        | ({"WANDB_API_KEY": login} if login else {}))  # fmt: skip
    assert tracking.prepare(["wandb", "mlflow", "none"], tmp_path) == ["wandb", "mlflow"]
    assert os.environ["WANDB_MODE"] == mode and os.environ["WANDB_PROJECT"] == "mine"
    assert os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite:///")


def test_no_token_stands_in_a_config():
    from transformers import TrainingArguments

    from posttrain.arguments import check_extra

    with pytest.raises(UserFault, match="trainer.extra.hub_token: .* no token"):
        check_extra(TrainingArguments, {"hub_token": "hf_x"})


def test_samples_of_the_card_are_averaged_between_two_lines():
    readings = iter([(0.5, 2**30), (1.0, 3 * 2**30)])
    card = tracking.CardSampler(lambda: next(readings), seconds=0.01)  # ends as with a driver that is gone
    deadline = time.time() + 10
    while len(card.samples) < 2 and time.time() < deadline:
        time.sleep(0.01)
    assert card.since_last() == {"gpu_utilization": 0.75, "gpu_used_gib": 3.0}
    assert card.since_last() == {} and tracking.CardSampler(None).since_last() == {}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stderr", [Terminal, io.StringIO])
def test_a_bar_on_a_terminal_and_lines_everywhere(stderr, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "stderr", stderr())
    metrics, args = Metrics(tmp_path / "metrics.jsonl", SimpleNamespace()), None
    state = SimpleNamespace(global_step=0, max_steps=4, epoch=0.0)
    metrics.on_train_begin(args, state, None)
    for step in range(1, 5):
        state.global_step = step
        metrics.on_step_end(args, state, None)
        logs = {"loss": 1.0 / step, "learning_rate": 1e-4, "num_tokens": 10 * step}
        metrics.on_log(args, state, None, logs)
        assert logs["tokens_per_second"] > 0 and "rss_gib" in logs  # the trackers come after it
    metrics.on_train_end(args, state, None)
    drawn = sys.stderr.getvalue()
    assert ("4/4" in drawn) == isinstance(sys.stderr, Terminal) and (drawn == "") != isinstance(sys.stderr, Terminal)
    assert capsys.readouterr().out.count("loss") == 4
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all("rss_gib" in line for line in lines)


def test_what_was_logged_has_a_panel():

    from posttrain.report.figures import PANELS, curves

    keys = {key for lines in PANELS.values() for key, _ in lines}
    wanted = {"loss", "learning_rate", "grad_norm", "rewards/margins", "rewards/accuracies", "rss_gib", "reserved_gib",
              "tokens_per_second", "gpu_utilization"}  # fmt: skip
    assert wanted <= keys
    picture, abreast = curves([{"step": s, **dict.fromkeys(wanted, s / 9)} for s in range(1, 9)], 8)
    assert abreast == 3 and "<svg" in picture
