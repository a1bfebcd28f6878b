"""Config keys of evaluation: answer_sets, gates; and of chat: chat_sensitive."""

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config import Block, ProjectPath


class AnswerSet(Block):
    """Prompts with right answers in a local file, which the models answer freely."""

    file: ProjectPath
    """JSONL of {"prompt", "answer"} or {"messages"} (the last turn is the answer); THUCNews's text and class by a tab,
    with class.txt beside it; CMRC 2018's or SQuAD's JSON."""
    kind: Literal["text", "classification", "extractive_qa"] = "text"
    """text: BLEU-4, ROUGE-L, chrF; classification: accuracy, macro-F1, confusion matrix; extractive_qa: exact match and
    F1 as CMRC 2018 defines them."""
    classes: list[str] | None = None
    """Of a classification; null takes class.txt beside the file, or the answers that occur."""
    limit: int | None = Field(500, ge=1)
    """A seeded draw of this many items; null is all."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer in tokens."""


class Gate(Block):
    """A bound that every adapter must keep, or the evaluation ends with exit code 4."""

    min: float | None = None
    """The number must not be below."""
    max: float | None = None
    """The number must not be above."""
    signature: str | None = None
    """The signature (tool, version, tokeniser) that the bound was set for; a number with another one is refused."""

    @model_validator(mode="after")
    def _bounds_something(self):
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min or max")
        return self


class SensitiveFilter(Block):
    """Words that must not be shown, found through disguises (width, case, traditional characters, noise between)."""

    files: list[ProjectPath] = Field(min_length=1)
    """Word lists of your own: UTF-8, a word per line, # comments."""
    action: Literal["mask", "replace", "block"] = "mask"
    """mask: every character becomes `by`; replace: the word becomes `by`; block: the answer ends before the word."""
    by: str = "*"
    """What stands in place of a character (mask) or of a word (replace)."""
