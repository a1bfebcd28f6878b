"""The blocks of config keys of prepare_data: cleaning rules, mixing, decontamination."""

import math
from typing import Literal

from pydantic import Field, field_validator

from posttrain.config import Block, ProjectPath

Action = Literal["keep", "flag", "drop"]


class Rules(Block):
    """The cleaning rules. Each may `keep` (not looked for), `flag` (kept, named in meta.flags) or `drop` what it finds;
    its name is the reason in the accounts. configs/datasets.yaml may set others for one source."""

    too_short: Action = "drop"
    """Fewer than min_chars characters."""
    min_chars: int = Field(8, ge=0)
    """Characters of a conversation at least (of a pair: of its prompt and the longer answer), white space folded."""
    too_long: Action = "drop"
    """More than max_chars characters (or max_tokens tokens)."""
    max_chars: int = Field(4096, ge=1)
    """Characters at most."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens of `tokenizer` at most, chat marks not counted; null counts no tokens. Costs more than all other rules."""
    other_language: Action = "drop"
    """Neither Chinese nor, where it is allowed, English."""
    min_cn_ratio: float = Field(0.3, ge=0, le=1)
    """Share of Chinese characters among letters, below which a record is not Chinese."""
    allow_english_fallback: bool = True
    """Records that are not Chinese but English are no other language."""
    odd_symbols: Action = "drop"
    """Too few letters and digits among the characters that are not white space."""
    min_ordinary: float = Field(0.4, ge=0, le=1)
    """Share of Chinese characters, ASCII letters and ASCII digits at least."""
    repetition: Action = "drop"
    """An answer that repeats itself: too few different 4-grams of characters."""
    max_repetition: float = Field(0.6, ge=0, le=1)
    """1 - (different 4-grams / all 4-grams) of the answer at most; answers of 20 characters and more."""
    mojibake: Action = "flag"
    """Text that was decoded with the wrong encoding, or replacement characters."""
    keywords: Action = "flag"
    """A word of one of the lists in `keywords`, by topic."""
    safety_filter: bool = True
    """false: the keyword lists are not applied to this source (safety sets keep their harmful prompts)."""
    blacklist: Action = "drop"
    """A regular expression of `blacklist` matches."""
    pii: Literal["keep", "flag", "mask", "drop"] = "mask"
    """Mobile numbers, identity and bank cards with a valid checksum, e-mail addresses; mask: a placeholder instead."""
    refusal: Action = "flag"
    """The answer is a refusal, or speaks of itself as a language model."""
    answer_language: Action = "flag"
    """The answer is in another language than the question, which did not ask for that."""
    vague_reference: Action = "flag"
    """The question speaks of a text, picture or link that is not there."""
    time_bound: Action = "flag"
    """The question asks for something that changes with the day (news, weather, prices, today's date)."""
    self_contradiction: Action = "flag"
    """The answer takes back what it said."""
    ungrounded_number: Action = "flag"
    """A question that gives a text, and a number in the answer that is not in it."""
    repeated_answer: Action = "flag"
    """An answer that stands in more than max_same_answers records."""
    max_same_answers: int = Field(20, ge=1)
    """Records that may share one answer; the first ones stay."""
    repeated_opening: Action = "flag"
    """The first 12 characters of the answer open more than max_same_openings of all answers."""
    max_same_openings: float = Field(0.02, gt=0, le=1)
    """Share of a set's answers that may open alike (at least 50); the first ones stay."""
    contaminated: Action = "drop"
    """Holds a benchmark's item (see `decontaminate`)."""
    exact_duplicate: Action = "drop"
    """Equal to an earlier record but for width, case and white space (SHA-256 of the key text)."""
    near_duplicate: Action = "drop"
    """5-character shingles alike to those of an earlier record."""
    min_jaccard: float = Field(0.8, ge=0.7, le=1)
    """Jaccard similarity from which two records are near duplicates. One value for all sources. Found by MinHash: of
    pairs at 0.8 99.8 %, at 0.75 98 %, at 0.7 93 %."""


class Decontaminate(Block):
    """Which benchmarks must not be in the training data. `rules.contaminated` says what happens to what is found."""

    benchmarks: list[ProjectPath] = []
    """Files and directories of benchmark items beside raw_dir/eval/ and configs/panel.yaml, which always count."""
    min_coverage: float = Field(0.5, gt=0, le=1)
    """Share of an item's text (Chinese characters, Latin words) standing in 13-grams that the record holds too, from
    which it is a leak."""


class Mix(Block):
    """Which sources, in what shares, and how many records at most."""

    mix: dict[str, float] = {}
    """Key of configs/datasets.yaml (or a directory of raw_dir) -> weight. Shares of the result where there is enough of
    each source. A source of weight 0 is not even opened."""
    max_samples: int = Field(60_000, ge=1)
    """Records over all splits at most."""
    chinese_share: float | None = Field(None, ge=0, le=1)
    """Share of Chinese records among those taken, the rest being the other languages; null takes them as they come."""
    length_buckets: list[int] = [256, 1024]
    """Upper bounds in characters of the length buckets. Records are taken from the buckets of a source in rotation,
    and written so that a file's beginning holds all lengths."""
    multi_turn_share: float | None = Field(None, ge=0, le=1)
    """Share of conversations with more than one question; null takes them as they come."""
    replay: dict[str, float] = {}
    """Sources of general data (key -> weight) mixed in against forgetting, beside `mix`."""
    replay_share: float = Field(0.0, ge=0, lt=1)
    """Share of the result that comes from `replay`: 0.05 to 0.1 is usual."""
    on_shortage: Literal["keep_ratio", "fill", "error"] = "fill"
    """Where a source, language or length has less than its share: take fewer of the others too, so that the ratios
    hold; fill up with what there is; or stop."""

    @field_validator("mix", "replay")
    @classmethod
    def _weights(cls, mix):
        unusable = [f"{key}={weight}" for key, weight in mix.items() if not 0 <= weight < math.inf]
        if unusable:
            raise ValueError(f"a weight is a finite number and not negative (got {', '.join(unusable)})")
        return mix

    @field_validator("length_buckets")
    @classmethod
    def _ascending(cls, bounds):
        if any(bound < 1 for bound in bounds) or sorted(set(bounds)) != bounds:
            raise ValueError(f"bounds of length buckets rise and are positive (got {bounds})")
        return bounds
