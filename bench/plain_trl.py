"""Plain TRL on the work of bench.train, as its documentation shows it; prints a line of JSON at every step.

    accelerate launch bench/plain_trl.py sft|dpo|orpo BASE DATA OUTPUT STEPS ACCUMULATION [ROWS]

ROWS: rows of ours (Arrow), already encoded and packed, in place of DATA: TRL on the same tokens and labels.
"""

import json
import sys

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Say(TrainerCallback):
    """What bench.train reads: the step, its loss, tokens so far."""

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            print(json.dumps({"step": state.global_step, "loss": logs["loss"], "num_tokens": logs.get("num_tokens")}),
                  flush=True)  # fmt: skip


def main() -> None:
    """One run of one trainer."""
    stage, base, data, output, steps, accumulation, *rows = sys.argv[1:]
    given = dict(output_dir=output, max_steps=int(steps), per_device_train_batch_size=4, learning_rate=2e-4,
                 logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, max_length=512,
                 gradient_accumulation_steps=int(accumulation), disable_tqdm=True, seed=42,
                 gradient_checkpointing=True)  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(base)
    dataset = Dataset.from_file(rows[0]) if rows else load_dataset("json", data_files=data, split="train")
    if stage == "sft":
        from trl import SFTConfig, SFTTrainer

        extra = {"dataset_kwargs": {"skip_prepare_dataset": True}} if rows else {}
        args, cls = SFTConfig(**given, packing=True, **extra), SFTTrainer
    elif stage == "dpo":
        from trl import DPOConfig, DPOTrainer

        args, cls = DPOConfig(**given, beta=0.1), DPOTrainer
    else:
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        args, cls = ORPOConfig(**given, beta=0.1), ORPOTrainer
    trainer = cls(model=AutoModelForCausalLM.from_pretrained(base), args=args, train_dataset=dataset, peft_config=lora,
                  processing_class=tokenizer)  # fmt: skip
    trainer.add_callback(Say())
    print("ready", flush=True)
    trainer.train()


if __name__ == "__main__":
    main()
