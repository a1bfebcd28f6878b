"""Records to the rows of a trainer: held out, drawn, encoded, packed; with the fate of every record."""

from posttrain import chat
from posttrain.blocks import PreferenceTraining
from posttrain.schedule import draw, hold_out, to_chinese_share
from posttrain.stages import TrainSft
from posttrain.training import Rows, Start


def sft_rows(cfg: TrainSft, start: Start, train: list[dict], val: list[dict]) -> Rows:
    """Conversations to rows {"input_ids", "labels"[, "seq_lengths"]} of at most trainer.max_length tokens.

    With packing a training row holds several conversations (best fit decreasing, TRL's pack_dataset); validation rows
    are never packed, so that their loss does not depend on what lies beside them.
    """
    train, val, notes = _split(cfg, train, val)
    length, rule = cfg.trainer.max_length, cfg.data.on_too_long
    encoded = chat.encode_chats(start.tokenizer, train, length, start.loss_on, rule)
    encoded_val = chat.encode_chats(start.tokenizer, val, length, start.loss_on, rule)
    tokens = sum(len(row["input_ids"]) for row in encoded.rows)
    trained = sum(label != chat.IGNORED for row in encoded.rows for label in row["labels"])
    rows = pack(encoded.rows, length) if cfg.trainer.packing else encoded.rows
    if cfg.trainer.packing and rows:
        notes.append(f"packed {len(encoded.rows)} conversations into {len(rows)} rows of {length} tokens, "
                     f"{tokens / (len(rows) * length):.1%} full")  # fmt: skip
    if start.loss_on != cfg.loss_on:
        notes.append(f"loss_on: {start.loss_on} instead of {cfg.loss_on}, because the template shows earlier answers "
                     "otherwise than it asks for them")  # fmt: skip
    return Rows(rows, encoded_val.rows, encoded.fates, encoded.dropped + encoded_val.dropped, tokens, trained, notes)


def pack(rows: list[dict], length: int) -> list[dict]:
    """Rows of up to `length` tokens that hold whole conversations, best fit decreasing; adds "seq_lengths"."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from trl import pack_dataset

    if not rows:
        return []
    disable_progress_bar()
    dataset = Dataset.from_list(rows)
    # One pass over everything: TRL packs batch by batch, and the last row of each batch stays half empty.
    return pack_dataset(dataset, length, "bfd", {"batch_size": len(rows), "keep_in_memory": True}).to_list()


def preference_rows(cfg: PreferenceTraining, start: Start, train: list[dict], val: list[dict]) -> Rows:
    """Pairs to rows {"prompt_ids", "chosen_ids", "rejected_ids"}, drawn to the wanted share of Chinese prompts."""
    train, val, notes = _split(cfg, train, val)
    train, drawn = to_chinese_share(train, cfg.prefer_chinese_ratio, cfg.trainer.seed)
    length, rule = cfg.trainer.max_length, cfg.data.on_too_long
    encoded = chat.encode_pairs(start.tokenizer, train, length, rule)
    encoded_val = chat.encode_pairs(start.tokenizer, val, length, rule)
    tokens = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in encoded.rows)
    trained = sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in encoded.rows)
    return Rows(encoded.rows, encoded_val.rows, encoded.fates, encoded.dropped + encoded_val.dropped, tokens, trained,
                [drawn, *notes])  # fmt: skip


def _split(cfg, train: list[dict], val: list[dict]) -> tuple[list[dict], list[dict], list[str]]:
    """Training and validation records: the given validation files, or a held-out share of the training ones."""
    seed, notes = cfg.trainer.seed, []
    if not val:
        train, val = hold_out(train, cfg.data.val_share, seed)
        notes.append(f"{len(val)} of the training records are held out for validation (data.val_share)")
    if cfg.data.max_train_rows and cfg.data.max_train_rows < len(train):
        notes.append(f"{cfg.data.max_train_rows} of {len(train)} training records drawn (data.max_train_rows)")
    train = draw(train, cfg.data.max_train_rows, seed)
    return train, draw(val, cfg.data.max_val_rows, seed), notes
