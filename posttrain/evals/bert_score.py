"""
BERTScore by an encoder on disk (Zhang et al. 2020, ICLR): each token is matched to the nearest token of the other side.

Written anew because the bert_score package is no longer maintained and pulls in pandas and matplotlib; equal to it
(bench/metrics.py). It differs in one thing: a cosine below 0 stays what it is, where the package lets a token match the
padding of its batch, at 0.
"""

import math
import time
from collections import Counter
from importlib.metadata import version
from typing import Any

from posttrain.config import shown
from posttrain.errors import UserFault
from posttrain.evals.answer_sets import BERTSCORE, Items
from posttrain.evaluation_blocks import BertScore
from posttrain.runs import fingerprint, read_json

# The layer that agrees best with people's judgement of WMT16 translations: bert_score 0.3.13, utils.model2layers.
LAYERS = {"bert-base-chinese": 8, "bert-base-multilingual-cased": 9, "bert-base-uncased": 9, "bert-large-uncased": 18,
          "roberta-base": 10, "roberta-large": 17, "xlm-roberta-base": 9, "xlm-roberta-large": 17,
          "distilbert-base-multilingual-cased": 5}  # fmt: skip
BATCH = 16


def check(how: BertScore) -> None:
    """UserFault if the encoder, its layer or the baseline cannot be used; nothing is loaded."""
    from posttrain.model import missing_files

    directory = how.model
    lacking = missing_files(directory) if directory.is_dir() else ["the directory itself"]
    if lacking:
        raise UserFault(f"bert_score.model: {shown(directory)} lacks {', '.join(lacking)}; download an encoder there, "
                        "for instance bert-base-chinese, with its model.safetensors")  # fmt: skip
    layers = (read_json(directory / "config.json") or {}).get("num_hidden_layers")
    if not isinstance(layers, int):
        raise UserFault(f"bert_score.model: {shown(directory)}/config.json tells no num_hidden_layers: not an encoder")
    if not 1 <= layer_of(how) <= layers:
        raise UserFault(f"bert_score.num_layers: {layer_of(how)}; {shown(directory)} has the layers 1 to {layers}")
    baseline_of(how)


def layer_of(how: BertScore) -> int:
    """The layer whose states are compared. UserFault where neither the config nor the encoder's name tells it."""
    if how.num_layers:
        return how.num_layers
    if how.model.name not in LAYERS:
        raise UserFault(f"bert_score.num_layers: not known for {how.model.name}; set it (two thirds of the layers is "
                        f"usual), or name the directory as the encoder is called: {', '.join(LAYERS)}")  # fmt: skip
    return LAYERS[how.model.name]


def baseline_of(how: BertScore) -> float | None:
    """The F1 of unrelated sentences at this layer: column F of the bert_score package's files (LAYER,P,R,F)."""
    if how.baseline is None:
        return None
    try:
        head, *rows = [line.split(",") for line in how.baseline.read_text(encoding="utf-8").split()]
        values = {int(row[0]): float(row[head.index("F")]) for row in rows}
        return values[layer_of(how)]
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserFault(f"bert_score.baseline: {shown(how.baseline)}: no value F for layer {layer_of(how)} "
                        f"({type(error).__name__}: {error}); a file has lines LAYER,P,R,F") from None  # fmt: skip


def encoder_facts(how: BertScore) -> dict[str, Any]:
    """As it stands among a manifest's inputs."""
    return {"path": shown(how.model), "fingerprint": fingerprint(how.model)}


def signature(how: BertScore) -> str:
    """What a number was made with."""
    weights, rescaled = fingerprint(how.model)[:12], "none" if how.baseline is None else f"{baseline_of(how):g}"
    return (f"bertscore-f1|model:{how.model.name}:{weights}|layer:{layer_of(how)}|idf:{'yes' if how.idf else 'no'}"
            f"|baseline:{rescaled}|transformers:{version('transformers')}|mean|0-1")  # fmt: skip


def measure(items: Items, scores: dict[str, dict[str, dict]], kept) -> None:
    """Put the values of every item of a set beside each model's answers: scores[model][set]["bertscore"]. What is kept
    from before (measure.Kept) under the same encoder and answers is not measured again."""
    encoder, what, made_with = None, f"{items.name}.{BERTSCORE}", signature(items.bert_score)
    for model, some in scores.items():
        answers = [answer["text"] for answer in some[items.name]["answers"]]
        key = kept.key(model, [made_with, items.references, answers])
        found = kept.get(model, what, key)
        if found is None:
            encoder, began = encoder or Encoder(items.bert_score), time.perf_counter()
            values = f1_items(encoder, answers, items.references)
            samples = [{"id": i, BERTSCORE: value} for i, value in zip(items.ids, values, strict=True)]
            found = kept.put(model, what, key, {BERTSCORE: values}, samples)
            mean, seconds = sum(values) / len(values), time.perf_counter() - began
            print(f"  {model}: {items.name}: {BERTSCORE} {mean:.4f}, {seconds:.1f} s", flush=True)
        some[items.name][BERTSCORE] = found[BERTSCORE]


def f1_items(encoder: "Encoder", answers: list[str], references: list[list[str]]) -> list[float]:
    """BERTScore's F1 of each answer to the nearest of its references. An empty answer is 0 (before a baseline)."""
    how, best = encoder.how, [-math.inf] * len(answers)
    pairs = [(i, answer, right) for i, answer in enumerate(answers) for right in references[i]]
    weights = rarity([encoder.ids(right) for _, _, right in pairs]) if how.idf else None
    pairs.sort(key=lambda pair: -len(pair[1]) - len(pair[2]))
    for start in range(0, len(pairs), BATCH):
        some = pairs[start : start + BATCH]
        said, right = encoder.states([a for _, a, _ in some]), encoder.states([r for _, _, r in some])
        for (i, _, _), ours, theirs in zip(some, said, right, strict=True):
            best[i] = max(best[i], matched(ours, theirs, weights, encoder.unweighted))
    low = baseline_of(how)
    return best if low is None else [(value - low) / (1 - low) for value in best]


def rarity(texts: list[list[int]]) -> dict[int, float]:
    """Inverse document frequency of each token over the references: -log of the share that holds it, plus one each."""
    counts = Counter(token for ids in texts for token in set(ids))
    return {token: math.log((len(texts) + 1) / (count + 1)) for token, count in counts.items()} | \
        {-1: math.log(len(texts) + 1)}  # fmt: skip


def matched(ours, theirs, weights: dict[int, float] | None, unweighted: set[int]) -> float:
    """F1 of two texts as (ids, unit vectors): the mean best cosine of each token to the other side, both ways."""
    import torch

    if len(ours[0]) <= 2 or len(theirs[0]) <= 2:  # the two special tokens, and nothing between
        return 0.0
    cosines, means = ours[1] @ theirs[1].T, []
    for ids, best in ((ours[0], cosines.max(1).values), (theirs[0], cosines.max(0).values)):
        own = [float(token not in unweighted) if weights is None else weights.get(token, weights[-1]) for token in ids]
        weight = torch.tensor(own)
        means.append(float((best * weight).sum() / weight.sum()) if weight.sum() else 0.0)
    precision, recall = means
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class Encoder:
    """An encoder and its tokenizer, on the card where there is one, in float32."""

    def __init__(self, how: BertScore):
        from transformers import AutoModel, AutoTokenizer

        from posttrain.model import device

        check(how)
        self.how = how
        self.tokenizer = AutoTokenizer.from_pretrained(how.model, local_files_only=True)
        lm = AutoModel.from_pretrained(how.model, local_files_only=True, use_safetensors=True, dtype="float32")
        self.lm, self.layer = lm.to(device()).eval(), layer_of(how)
        byte_level = lm.config.model_type == "roberta"
        self.space = " " if byte_level else ""  # its vocabulary marks a word by the blank before it
        positions = lm.config.max_position_embeddings - (2 if "roberta" in lm.config.model_type else 0)
        self.longest = min(self.tokenizer.model_max_length, positions)
        self.unweighted = {self.tokenizer.cls_token_id, self.tokenizer.sep_token_id}

    def ids(self, text: str) -> list[int]:
        """Token ids with the special tokens, cut off at the encoder's length; [] of an empty text."""
        text = text.strip()
        return self.tokenizer(self.space + text, truncation=True, max_length=self.longest)["input_ids"] if text else []

    def states(self, texts: list[str]) -> list[tuple[list[int], Any]]:
        """(ids, (tokens, width) vectors of length 1) of each text, from one padded batch."""
        import torch

        rows = [self.ids(text) for text in texts]
        width = max(map(len, rows), default=0)
        if width == 0:
            return [(row, torch.empty(0, 1)) for row in rows]
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.lm.device)
        mask = torch.tensor([[1] * max(1, len(row)) + [0] * (width - max(1, len(row))) for row in rows],
                            device=self.lm.device)  # fmt: skip
        with torch.no_grad():
            hidden = self.lm(ids, attention_mask=mask, output_hidden_states=True).hidden_states[self.layer]
        hidden = torch.nn.functional.normalize(hidden, dim=-1).cpu()
        return [(row, vectors[: len(row)]) for row, vectors in zip(rows, hidden, strict=True)]
