"""The GPU bench: refuses where there is no card, and runs its own code on tiny shapes on a CPU."""

import json

import pytest
from conftest import ROOT, run_command

from bench import gpu, gpu_page


def test_without_a_card_nothing_is_measured():
    done = run_command("-m", "bench.gpu", CUDA_VISIBLE_DEVICES="", PATH="/nowhere")
    assert done.returncode == 2 and "no CUDA card" in done.stderr and "--device cpu --quick" in done.stderr
    assert run_command("-m", "bench.gpu", "--device", "cpu").returncode == 2


def test_the_page_without_measurements_is_the_one_in_docs_or_names_its_card():
    text = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    assert text == gpu_page.page(gpu_page.blank(gpu.MEMORY, gpu.SPEED)) or "driver" in text


def test_the_jobs_are_what_was_asked():
    kinds = {(job["stage"], job["quantization"]) for job in gpu.MEMORY}
    assert len(gpu.MEMORY) >= 12 and {s for s, _ in kinds} == {"sft", "orpo", "dpo"} and {q for _, q in kinds} == {
        "none", "nf4"}  # fmt: skip
    assert {job["size"] for job in gpu.MEMORY} == {"0.5B", "1.5B", "3B", "7B"}
    assert all({**ours, "trainer": "trl", "name": trl["name"]} == trl for ours, trl in gpu.SPEED)
    assert gpu.PHASES["out of memory"] < 9 * 60


@pytest.mark.slow
def test_every_phase_on_a_cpu(tmp_path):
    done = run_command("-m", "bench.gpu", "--device", "cpu", "--quick", "--work", str(tmp_path / "work"), "--out",
                       str(tmp_path / "gpu.md"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "work/results.json").read_text())
    for row in found["memory"]:
        assert row["measured"].get("tokens_per_second", 0) > 0, row
        assert row["forecast"].get("allocated", 0) > 0, row
    for row in found["speed"]:
        ours, trl = row["ours"]["losses"], row["trl"]["losses"]
        assert len(ours) == len(trl) == 4 and abs(ours[0] - trl[0]) < 1e-3, row
    assert found["resume"]["same_adapter"] and 10 <= found["resume"]["killed_at"] < 20, found["resume"]
    assert found["resume"]["largest_loss_difference"] == 0
    text = (tmp_path / "gpu.md").read_text()
    assert "not a measurement" in text and "needs a card" in text
