"""
The linter of a dry run: what is allowed and yet often a mistake, each with its reason and the key that mends it.

Notes, not faults: whoever knows why may go on. A bound has its source where it stands; "of experience" marks those
that are no more than that.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from posttrain import model, refusals, rendering, templates
from posttrain.blocks import PreferenceTraining, Training
from posttrain.config import ROOT, read_yaml
from posttrain.schedule import Schedule, question
from posttrain.stages import TrainCpt, TrainDpo, TrainOrpo, TrainSft
from posttrain.text import folded_text, key_text
from posttrain.training_data import Records, Rows


@dataclass(frozen=True)
class Note:
    """A line of the linter: a short name of its rule, and what it says."""

    rule: str
    text: str


# Above (and for preferences below) these a run often diverges, or learns nothing. LoRA's best rate is about ten times
# that of full fine-tuning, whatever the model (Schulman et al. 2025, "LoRA Without Regret"; Biderman et al. 2024, arXiv
# 2405.09673, who found the best rates of LoRA up to 5e-4). Preferences: DPO's paper trains all weights at 1e-6 and
# Zephyr at 5e-7 (arXiv 2310.16944); ORPO's paper at 8e-6 (arXiv 2403.07691, appendix); LoRA ten times that, and a
# decade of room on both sides.
LEARNING_RATES = {
    (TrainCpt, "lora"): (0, 5e-4), (TrainCpt, "full"): (0, 5e-5), (TrainSft, "lora"): (0, 5e-4),
    (TrainSft, "full"): (0, 5e-5), (TrainOrpo, "lora"): (1e-6, 5e-4), (TrainOrpo, "full"): (1e-7, 5e-5),
    (TrainDpo, "lora"): (5e-7, 1e-4), (TrainDpo, "full"): (5e-8, 1e-5),
}  # fmt: skip
# DPO's paper: 0.1, and 0.5 for summaries; Zephyr 0.1; with log-ratios per token larger ones (SimPO, arXiv 2405.14734: 2
# to 10). ORPO's paper: 0.1 to 0.25, its ablation up to 1.
BETAS = {"sigmoid": (0.01, 0.5), "sigmoid_norm": (0.5, 10), "orpo": (0.05, 1)}
MAX_EPOCHS = 3  # InstructGPT's SFT overfits its validation loss after one (Ouyang et al. 2022, 3.5); of experience
MEMORISED = (500, 5)  # fewer conversations, in more epochs than this; of experience
WARMUP = (0.01, 0.1)  # of experience: AdamW's second moment needs some steps, a tenth of a run is enough
MIN_TRAINED_TOKENS = 500  # in one optimiser step; of experience
MAX_REFUSALS = 0.03  # 3 % made models safe, more made them refuse harmless questions (Bianchi et al., 2309.07875)
# Eight characters that open an answer of 40 and more: in twelve public sets, uncleaned, at most 6 % of the answers
# share them (belle, firefly, lima, oasst, sharegpt_zh, medical, coig_cqia ...: 16 to 1,567 answers each).
OPENING, LONG_ANSWER, MAX_OPENING = 8, 40, 0.1
MAX_DROPPED = 0.05
MAX_LONGER_CHOSEN = 0.8  # of pairs: length then tells the chosen answer almost alone (Singhal et al., 2310.03716)
MAX_OVERLAP = 0.01  # of the validation questions
NEAR, SHINGLE, COMMON = 0.7, 5, 0.1  # Jaccard index; characters; shingles in more validation questions are a frame
MOST_LOOKED_AT = 20_000  # training questions


def lines(cfg: Training, kind: str, start, records: Records, rows: Rows, schedule: Schedule) -> list[str]:
    """What the linter says of a run, for the plan.  start: training.Start"""
    notes = [*config_notes(cfg, schedule.epochs), *record_notes(cfg, kind, records), *row_notes(cfg, rows, schedule),
             *template_notes(cfg, start)]  # fmt: skip
    return [f"{note.rule}: {note.text}" for note in notes]


# ------------------------------------------------------------------ the config alone


def config_notes(cfg: Training, epochs: float | None = None) -> list[Note]:
    """What the config says by itself. epochs: as they come out, where max_steps decides them."""
    return [*_learning_rate(cfg), *_epochs(cfg, epochs), *_target_modules(cfg), *_warmup(cfg), *_beta(cfg)]


def _learning_rate(cfg: Training) -> list[Note]:
    low, high = LEARNING_RATES[type(cfg), cfg.finetuning_type]
    rate, how = cfg.trainer.learning_rate, {"lora": "an adapter", "full": "full fine-tuning"}[cfg.finetuning_type]
    if rate > high:
        return [Note("learning_rate", f"trainer.learning_rate {rate:g} is above {high:g}, where {how} often unlearns "
                     f"what the base knows or diverges; begin with {high / 2.5:g}")]  # fmt: skip
    if rate < low:
        return [Note("learning_rate", f"trainer.learning_rate {rate:g} is below {low:g}: {how} will hardly move")]
    return []


def _epochs(cfg: Training, epochs: float | None) -> list[Note]:
    passes = cfg.trainer.num_train_epochs if epochs is None else epochs
    if passes <= MAX_EPOCHS or cfg.trainer.early_stopping_patience:
        return []
    return [Note("epochs", f"{passes:g} passes over the data: after three a model mostly learns its rows by heart; "
                 "fewer, or trainer.early_stopping_patience: 3 with a validation")]  # fmt: skip


def _target_modules(cfg: Training) -> list[Note]:
    """QLoRA found that adapters on all linear layers are what meets full fine-tuning (Dettmers et al. 2023, arXiv
    2305.14314, figure 2); attention alone is worse at any rank (Schulman et al. 2025)."""
    names = cfg.lora.target_modules
    if cfg.finetuning_type == "full" or isinstance(names, str) or not set(names) <= {"q_proj", "v_proj", "W_pack"}:
        return []
    return [Note("target_modules", f"adapters on {', '.join(names)} alone learn less than on all linear layers, at any "
                 "rank; enough for labels and a format, else lora.target_modules of configs/sft.yaml")]  # fmt: skip


def _warmup(cfg: Training) -> list[Note]:
    ratio, (low, high) = cfg.trainer.warmup_ratio, WARMUP
    if cfg.trainer.lr_scheduler_type == "constant" or getattr(cfg.trainer, "slow_start", None):
        return []
    if low <= ratio <= high:
        return []
    why = f"{ratio:.0%} of the run at a rate that is still rising"
    if ratio < low:
        why = "the first steps go at the full rate before AdamW knows the size of the gradients"
    return [Note("warmup", f"trainer.warmup_ratio {ratio:g}: {why}; 0.03 is usual")]


def _beta(cfg: Training) -> list[Note]:
    if not isinstance(cfg, PreferenceTraining):
        return []
    kind = cfg.loss_type if isinstance(cfg, TrainDpo) else "orpo"
    low, high = BETAS[kind]
    if low <= cfg.beta <= high:
        return []
    what = "the policy leaves the reference freely" if cfg.beta < low else "the policy hardly leaves the reference"
    if kind == "orpo":
        what = "preferences hardly count" if cfg.beta < low else "the odds term outweighs the likelihood"
    return [Note("beta", f"beta {cfg.beta:g} is outside of {low:g} to {high:g} ({kind}): {what}")]


# ------------------------------------------------------------------ records


def record_notes(cfg: Training, kind: str, records: Records) -> list[Note]:
    """What the records say: nothing general, refusals, one opening, longer chosen answers, both sides of the split."""
    if kind == "text":
        return []
    answers = [turn["content"] for record in records.train for turn in _learned(record)]
    notes = _no_general(cfg, records) if kind == "sft" else _longer_chosen(cfg, records)
    return [*notes, *_refusals(answers), *_openings(answers), *_overlap(records)]


def _learned(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers that a record teaches."""
    turns = record.get("messages") or record["chosen"]
    return [turn for turn in turns if turn["role"] == "assistant" and turn["content"]]


def _no_general(cfg: TrainSft, records: Records) -> list[Note]:
    """Nothing in the run but a domain of one's own: no known public set among its sources, no replay, no penalty."""
    sources = {record["source"] for record in records.train}
    if cfg.replay or cfg.kl_to_base or cfg.ewc or sources & set(read_yaml(ROOT / "configs/datasets.yaml")):
        return []
    return [Note("general_data", f"every row is of {', '.join(sorted(sources)[:3])}: with nothing general beside them "
                 "a model forgets what it does not see; replay.files with general conversations (5 to 10 %)"
                 f"{', or kl_to_base' if cfg.finetuning_type == 'lora' else ''} (docs/symptoms.md)")]  # fmt: skip


def _refusals(answers: list[str]) -> list[Note]:
    folded = [folded_text(answer[: 4 * refusals.OPENING]) for answer in answers]
    count = sum(refusals.refusal(answer) is not None for answer in folded)
    share = count / max(1, len(answers))
    if share <= MAX_REFUSALS:
        return []
    return [Note("refusals", f"{count} of {len(answers)} answers ({share:.1%}) refuse; above {MAX_REFUSALS:.0%} a "
                 "model begins to refuse harmless questions. prepare_data drops them: rules.refusal=drop")]  # fmt: skip


def _openings(answers: list[str]) -> list[Note]:
    long = [answer.strip() for answer in answers if len(answer.strip()) >= LONG_ANSWER]
    if len(long) < 1 / MAX_OPENING:
        return []
    (opening, count), = Counter(answer[:OPENING] for answer in long).most_common(1)
    if count <= MAX_OPENING * len(long):
        return []
    return [Note("opening", f"{count} of {len(long)} longer answers ({count / len(long):.0%}) open with {opening!r}: "
                 "the model will open nearly every answer so; vary the rows, or drop some")]  # fmt: skip


def _longer_chosen(cfg: PreferenceTraining, records: Records) -> list[Note]:
    lengths = [[len(record[side][0]["content"]) for side in ("chosen", "rejected")] for record in records.train]
    longer = sum(chosen > rejected for chosen, rejected in lengths) / max(1, len(lengths))
    if len(lengths) < 20 or longer <= MAX_LONGER_CHOSEN:
        return []
    start = "2" if isinstance(cfg, TrainOrpo) else "0.004"
    return [Note("length_bias", f"in {longer:.0%} of the pairs the chosen answer is the longer one: length alone tells "
                 f"it, and the model grows wordy. length_penalty: {start} (docs/config.md says how to choose it), or "
                 "more pairs where the shorter answer is chosen")]  # fmt: skip


def _overlap(records: Records) -> list[Note]:
    """Validation questions that stand in the training rows too, word for word or nearly: the loss on them flatters."""
    asked = {key_text(question(record)) for record in records.val} - {""}
    trained = {key_text(question(record)) for record in records.train[:MOST_LOOKED_AT]}
    same = asked & trained
    near = _near(asked - same, trained)
    if not asked or len(same | near) <= MAX_OVERLAP * len(asked):
        return []
    return [Note("overlap", f"{len(same)} of {len(asked)} validation questions stand in the training rows too, and "
                 f"{len(near)} nearly: the validation loss flatters. data.val_files: [] holds out by question; "
                 "prepare_data keeps near duplicates on one side")]  # fmt: skip


def _near(asked: set[str], trained: set[str]) -> set[str]:
    """Those of `asked` that share 70 % of their five-character shingles with a trained question (Jaccard index).
    Shingles of many validation questions are an instruction's frame and do not count."""
    shingles = {text: _shingles(text) for text in asked}
    common = Counter(shingle for found in shingles.values() for shingle in found)
    frame = {shingle for shingle, count in common.items() if count > max(2, COMMON * len(asked))}
    shingles = {text: found - frame for text, found in shingles.items() if found - frame}
    holders: dict[str, list[str]] = {}
    for text, found in shingles.items():
        for shingle in found:
            holders.setdefault(shingle, []).append(text)
    near = set()
    for text in trained:
        own = _shingles(text) - frame
        shared = Counter(holder for shingle in own for holder in holders.get(shingle, ()))
        near |= {holder for holder, n in shared.items() if n >= NEAR * (len(own) + len(shingles[holder]) - n)}
    return near


def _shingles(text: str) -> set[str]:
    return {text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)}


# ------------------------------------------------------------------ rows, template


def row_notes(cfg: Training, rows: Rows, schedule: Schedule) -> list[Note]:
    """What the encoded rows say: too few for so many passes, too little in a step, too many dropped."""
    notes, kept = [], sum(count for fate, count in rows.fates.items() if fate.startswith("kept"))
    if kept < MEMORISED[0] and schedule.epochs > MEMORISED[1]:
        notes.append(Note("few_rows", f"{kept} records in {schedule.epochs:g} passes are learned by heart, not "
                          "generalised; more rows, or fewer passes"))  # fmt: skip
    a_step = rows.trained_tokens * schedule.epochs / max(1, schedule.steps)
    if rows.trained_tokens and a_step < MIN_TRAINED_TOKENS:
        why = f"about {a_step:.0f} trained tokens decide an optimiser step: a noisy direction"
        notes.append(Note("tokens_per_step", f"{why}; a larger trainer.tokens_per_step (without packing: "
                          "sequences_per_step), or a smaller trainer.min_steps"))  # fmt: skip
    read, long = sum(rows.fates.values()), rows.fates["longer_than_max_length"]
    if long > MAX_DROPPED * read:
        notes.append(Note("too_long", f"{long} of {read} records ({long / read:.1%}) are longer than "
                          f"trainer.max_length {cfg.trainer.max_length} and dropped, the longest answers among them; a "
                          "larger max_length, or data.on_too_long: truncate_left_turns"))  # fmt: skip
    return notes


def template_notes(cfg: Training, start) -> list[Note]:
    """A template that the base's tokenizer does not have: the base never saw its marks.  start: training.Start"""
    if cfg.model.chat_template == "auto" or start.adapter_dir:
        return []
    own = model.read_tokenizer(start.base.path, cfg.model.trust_remote_code).chat_template
    both = [text for text in (own, start.template.text) if text]
    texts = [[_rendered(start, text, probe) for probe in templates.PROBES] for text in both]
    if own is None or texts[0] == texts[1]:
        return []
    return [Note("template", f"model.chat_template {cfg.model.chat_template} renders otherwise than the template of "
                 "the base, which an instruct model was trained with; auto takes the base's own")]  # fmt: skip


def _rendered(start, template: str, messages: list[dict[str, Any]]) -> str | None:
    try:
        return rendering.render(start.tokenizer, template, messages).strip()
    except TemplateError:
        return None
