"""Tokenisation of plain text for continued pre-training: documents to pieces that fit, each token learned once."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from posttrain.chat import IGNORED

# What separates documents in pre-training, by the names that published vocabularies give it: Qwen, GPT-2, DeepSeek and
# GLM (<|endoftext|>), Llama 3 (<|end_of_text|>), Llama 2, Mistral, InternLM and Baichuan (</s>), Gemma (<eos>).
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
BATCH = 1000  # documents encoded at a time


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token between documents: not the end of a turn, which an instruct model's eos_token is."""
    known = tokenizer.get_vocab()
    return next((token for token in END_OF_TEXT if token in known), tokenizer.eos_token)


def document_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[list[int]]:
    """Ids of each document with the end-of-text token behind. A special token's name in a text stays text."""
    end = tokenizer.convert_tokens_to_ids(end_of_text(tokenizer))
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer(texts[start : start + BATCH], split_special_tokens=True)["input_ids"]
        yield from ([*ids, end] for ids in encoded)


def pieces(ids: list[int], max_length: int) -> list[dict[str, list[int]]]:
    """A document as rows {"input_ids", "labels"} of at most `max_length` tokens, in order.

    A piece begins with the last token of the one before, as context: so each token but the document's first, which
    nothing precedes, is learned exactly once.
    """
    starts = range(0, max(1, len(ids) - 1), max_length - 1)
    cut = [ids[start : start + max_length] for start in starts]
    return [{"input_ids": piece, "labels": [IGNORED, *piece[1:]]} for piece in cut]
