"""BERTScore: by hand from the paper's formula, its weights and baseline, and as a part of an evaluation.

That it equals the bert_score package is measured by bench/metrics.py, which needs that package."""

import math
from types import SimpleNamespace

import pytest
import torch

from bench.metrics import make_encoder, pairs
from posttrain.errors import UserFault
from posttrain.evals import answer_sets, bert_score
from posttrain.evaluation_blocks import BertScore

ANSWERS, RIGHT = pairs(12, seed=2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder") / "tiny", ANSWERS + RIGHT)


def by_hand(how: BertScore, answer: str, right: str, weight=lambda token: 1.0) -> float:
    """Zhang et al. 2020, section 3: one text at a time, no padding; special tokens weigh nothing."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, lm = AutoTokenizer.from_pretrained(how.model), AutoModel.from_pretrained(how.model).eval()
    ids = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in (answer, right)]
    with torch.no_grad():
        states = [lm(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0] for row in ids]
    table = [[float(torch.cosine_similarity(a, b, dim=0)) for b in states[1]] for a in states[0]]
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    sides = []
    for row, best in ((ids[0], [max(line) for line in table]),
                      (ids[1], [max(column) for column in zip(*table, strict=True)])):  # fmt: skip
        weights = [0.0 if token in ends else weight(token) for token in row]
        sides.append(sum(w * b for w, b in zip(weights, best, strict=True)) / sum(weights))
    return 2 * sides[0] * sides[1] / sum(sides)


def test_is_the_papers_formula_whatever_is_in_the_batch(encoder):
    how = BertScore(model=encoder, num_layers=2)
    found = bert_score.f1_items(bert_score.Encoder(how), ANSWERS, [[text] for text in RIGHT])
    for at in (0, 3, 7):
        assert found[at] == pytest.approx(by_hand(how, ANSWERS[at], RIGHT[at]), abs=1e-5)
    assert bert_score.f1_items(bert_score.Encoder(how), [RIGHT[0]], [[RIGHT[0]]])[0] == pytest.approx(1.0)


def test_rare_tokens_weigh_more_with_idf(encoder):
    how = BertScore(model=encoder, num_layers=2, idf=True)
    loaded = bert_score.Encoder(how)
    found = bert_score.f1_items(loaded, ANSWERS, [[text] for text in RIGHT])
    held = [set(loaded.ids(text)) for text in RIGHT]

    def weight(token):
        return math.log((len(RIGHT) + 1) / (sum(token in own for own in held) + 1))

    assert found[1] == pytest.approx(by_hand(how, ANSWERS[1], RIGHT[1], weight), abs=1e-5)
    assert found[1] != pytest.approx(by_hand(how, ANSWERS[1], RIGHT[1]), abs=1e-4)


def test_empty_answers_are_0_long_ones_cut_off_and_the_best_reference_counts(encoder):
    loaded = bert_score.Encoder(BertScore(model=encoder, num_layers=2))
    said = ["", " \n", "好" * 100_000, RIGHT[0]]
    found = bert_score.f1_items(loaded, said, [["好"], ["好"], ["好"], ["好", RIGHT[0]]])
    assert found[:2] == [0.0, 0.0] and 0 < found[2] < 1 and found[3] == pytest.approx(1.0)


def test_a_baseline_rescales(encoder, tmp_path):
    file = tmp_path / "zh.tsv"
    file.write_text("LAYER,P,R,F\n0,0,0,0\n1,0,0,0\n2,0.1,0.2,0.5\n")
    raw, rescaled = (BertScore(model=encoder, num_layers=2, baseline=path) for path in (None, file))
    loaded = [bert_score.Encoder(how) for how in (raw, rescaled)]
    [plain], [moved] = (bert_score.f1_items(one, ANSWERS[:1], [RIGHT[:1]]) for one in loaded)
    assert moved == pytest.approx((plain - 0.5) / 0.5)
    assert "|layer:2|idf:no|baseline:none|" in bert_score.signature(raw)
    assert "|baseline:0.5|" in bert_score.signature(rescaled)


def test_faults_name_what_is_wrong(encoder, tmp_path):
    def fault(**keys) -> str:
        with pytest.raises(UserFault) as told:
            bert_score.check(BertScore(**{"model": encoder, "num_layers": 2, **keys}))
        return str(told.value)

    assert "lacks the directory itself" in fault(model=tmp_path / "none")
    assert "lacks config.json, tokenizer.json, model.safetensors" in fault(model=tmp_path)
    assert "not known for tiny; set it" in fault(num_layers=None)
    assert "has the layers 1 to 3" in fault(num_layers=4)
    (tmp_path / "b.tsv").write_text("LAYER,P,R,F\n0,1,1,1\n")
    assert "no value F for layer 2" in fault(baseline=tmp_path / "b.tsv")


def test_what_is_kept_is_not_measured_again(encoder, monkeypatch):
    how = BertScore(model=encoder, num_layers=2)
    items = answer_sets.Items("w", "text", ["a", "b"], [[], []], [RIGHT[:1], RIGHT[1:2]], [], how)
    store: dict = {}
    kept = SimpleNamespace(
        key=lambda model, content: repr((model, content)),
        get=lambda model, what, key: store.get((model, what, key)),
        put=lambda model, what, key, score, samples: store.setdefault((model, what, key), score),
    )
    scores = {m: {"w": {"answers": [{"text": t} for t in ANSWERS[i : i + 2]]}} for i, m in enumerate(("base", "one"))}
    bert_score.measure(items, scores, kept)
    first = {m: scores[m]["w"].pop("bertscore") for m in scores}
    monkeypatch.setattr(bert_score, "Encoder", None)
    bert_score.measure(items, scores, kept)
    assert {m: scores[m]["w"]["bertscore"] for m in scores} == first and len(store) == 2
    row = answer_sets.rows(items, {model: ANSWERS[:2] for model in first}, 0, first)[-1]
    assert row["metric"] == "bertscore"
    assert row["scores"]["one"]["value"] == pytest.approx(sum(first["one"]) / 2)
    assert row["signature"] == bert_score.signature(how) and row["differences"]["one"]["test"] == "bootstrap"
