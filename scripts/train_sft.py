"""
Supervised fine-tuning: conversations in, LoRA adapter out.

    python -m scripts.train_sft --config configs/sft.yaml --dry-run
    accelerate launch -m scripts.train_sft --config configs/sft.yaml
    accelerate launch -m scripts.train_sft --set data.train_files=[my.jsonl]     # your own rows
"""

import sys

sys.path[0] = str(__import__("pathlib").Path(__file__).resolve().parents[1])  # `python scripts/X.py` works too

from posttrain.cli import opened, run_stage  # noqa: E402
from posttrain.config import Loaded  # noqa: E402
from posttrain.plan import Plan  # noqa: E402
from posttrain.runs import open_run  # noqa: E402
from posttrain.stages import TrainSft  # noqa: E402


def plan(plan: Plan) -> None:
    """Inputs, rows and their fates, steps, memory, one row with what is trained marked."""
    from posttrain import training_plan
    from posttrain.data import sources

    training_plan.inputs(plan, "sft")
    if plan.dry_run and not plan.faults:
        training_plan.rows_and_schedule(plan, "sft", sources.read_training_file)


def main(loaded: Loaded) -> None:
    """Rows, model, TRL's trainer with our head, adapter."""
    from datasets import Dataset
    from trl import SFTConfig

    from posttrain import arguments, training, training_data
    from posttrain import rows as rows_of
    from posttrain.data import sources
    from posttrain.schedule import plan_steps
    from posttrain.sft import ChunkedSFTTrainer

    cfg: TrainSft = loaded.config
    parents = training_data.data_parents(cfg.data.train_files, "sft")
    start = training.start_from_base(cfg, cfg.loss_on)
    inputs = training.run_inputs(cfg, start)
    run = opened(open_run(cfg.output_dir, loaded, inputs, extra_identity=training.identity(cfg)))
    records = training_data.read_records(cfg, "sft", sources.read_training_file)
    rows = rows_of.sft_rows(cfg, start, records)
    training_data.require_rows(rows)
    schedule = plan_steps(cfg.trainer, len(rows.train))
    training.say(rows, schedule, cfg)

    trainer = ChunkedSFTTrainer(
        model=training.load_trainable(cfg, start),
        args=arguments.arguments(
            SFTConfig, cfg, schedule, bool(rows.val), packing=cfg.trainer.packing, eval_packing=False,
            max_length=cfg.trainer.max_length, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(rows.train),
        eval_dataset=Dataset.from_list(rows.val) if rows.val else None,
        processing_class=start.tokenizer,
    )  # fmt: skip
    checkpoint = training.train(trainer, run, cfg.trainer.save_minutes, cfg.trainer.early_stopping_patience)
    training.finish(cfg, loaded, run, trainer, start, rows, schedule, inputs, checkpoint, parents)


if __name__ == "__main__":
    run_stage(TrainSft, plan, main, default_config="configs/sft.yaml", description=__doc__)
