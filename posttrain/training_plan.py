"""The plan of a training stage: inputs, rows and their fates, steps, memory, one row as it is trained."""

from pathlib import Path

from posttrain import arguments, chat, hub, model, rows, runs, training, training_data, training_forecast
from posttrain.config import in_project, shown
from posttrain.errors import PosttrainError, UserFault
from posttrain.forecast import memory
from posttrain.plan import Plan, who_makes
from posttrain.schedule import Schedule, plan_steps


def inputs(plan: Plan, kind: str) -> None:
    """Base, SFT run and data files: there, pending, or in the way."""
    cfg = plan.config
    sft_run = getattr(cfg, "sft_run", None)
    if sft_run:
        if plan.need("SFT run", sft_run / "manifest.json", otherwise="Set sft_run to a finished run, or to null."):
            _collect(plan, lambda: training.start_from_run(cfg, sft_run))
            _collect(plan, lambda: _same_base_as_asked(plan, sft_run))
    else:
        found, name, notes = model.find_base(cfg.model)
        if found:
            plan.fact("inputs", f"base: {name} ({shown(found)})" + "".join(f"; {note}" for note in notes))
            _collect(plan, lambda: model.load_tokenizer(found, cfg.model.chat_template, cfg.model.trust_remote_code))
            _collect(plan, lambda: model.check_targets(model.skeleton(found, cfg.model.trust_remote_code), cfg.lora))
            _collect(plan, lambda: _length_fits(cfg, found))
        elif model.is_hub_id(cfg.model.base) and not hub.offline():
            others = f", else {' or '.join(cfg.model.fallback)}" if cfg.model.fallback else ""
            plan.download(f"base: {cfg.model.base}{others}, downloaded from {cfg.model.hub} at the start of the run "
                          "(beforehand: python -m scripts.fetch)")  # fmt: skip
        elif who_makes(in_project(Path(cfg.model.base)), plan.loaded.path.parent, plan.stage):
            plan.need("base", in_project(Path(cfg.model.base)))
        else:
            plan.faults.append(model.base_fault(notes))
    otherwise = "For a file of your own: --set data.train_files=[my.jsonl] (a share of it is held out)."
    for file in cfg.data.train_files + cfg.data.validation_files:
        if file.is_dir():
            plan.faults.append(f"data: {shown(file)} is a directory; name its files")
    for file in cfg.data.train_files:
        plan.need("training data", file, otherwise=otherwise)
    for file in cfg.data.validation_files:
        plan.need("validation data", file, otherwise="Without one set data.val_files=[] (data.val_share is held out).")
    _collect(plan, lambda: training_data.data_parents(cfg.data.train_files, kind))
    _collect(plan, lambda: model.attention(cfg.model.attn_implementation))
    if cfg.trainer.extra:
        _collect(plan, lambda: arguments.check_extra(arguments.arguments_class(kind), cfg.trainer.extra))
    place = cfg.output_dir
    if sft_run and (sft_run == place or sft_run in place.parents or place in sft_run.parents):
        plan.faults.append(f"output_dir: {shown(place)} and sft_run: {shown(sft_run)} lie in each other")
    plan.make(cfg.output_dir, note="adapter, tokenizer, checkpoints, metrics.jsonl, manifest.json")


def _length_fits(cfg, base: Path) -> None:
    """The base was made for so many positions; a longer row would be trained on positions that it never saw."""
    facts = runs.read_json(base / "config.json") or {}
    most = facts.get("max_position_embeddings")
    if most and cfg.trainer.max_length > most and not facts.get("rope_scaling"):
        raise UserFault(f"trainer.max_length: {cfg.trainer.max_length}, but {shown(base)} has {most} positions")


def _start_means(plan: Plan, start: training.Start) -> None:
    """Whether a run would be new, go on, be skipped or be refused, decided as the run itself decides it."""
    cfg = plan.config
    identity = runs.identity_of(plan.loaded, training.run_inputs(cfg, start), **training.identity(cfg))
    try:
        meaning, _ = runs.decide(runs.Run(cfg.output_dir, cfg.name, plan.loaded, identity), cfg.overwrite)
    except runs.AlreadyDone as done:
        meaning = str(done)
    said = {"fresh": "a new run", "resume": "goes on from the last complete checkpoint",
            "set_aside": "what is there is set aside first"}  # fmt: skip
    plan.fact("writes", f"{shown(cfg.output_dir)}: {said.get(meaning, meaning)}")


def _same_base_as_asked(plan: Plan, sft_run: Path) -> None:
    """A stage YAML that names a base of its own must name the one that the SFT adapter stands on."""
    facts, asked = model.adapter_facts(sft_run), plan.config.model.base
    origin = plan.loaded.origins.get("model.base", "configs/hardware/")
    if not origin.startswith("configs/hardware/") and asked not in (facts.base_id, str(facts.base_path)):
        raise UserFault(f"model.base: {asked} ({origin}), but {shown(sft_run)} is an adapter of {facts.base_id}; leave "
                        "model.base out, or set sft_run to a run on that base")  # fmt: skip
    plan.fact("inputs", f"base: {facts.base_id} ({shown(facts.base_path)}), from the SFT run, with its template, "
                        f"quantisation ({facts.quantization}) and LoRA shape")  # fmt: skip


def rows_and_schedule(plan: Plan, kind: str, read) -> None:
    """What a real run would make of the data: with the tokenizer on disk by the very code that trains, else estimated.
    `read` is data.sources.read_training_file."""
    cfg = plan.config
    if not all(file.is_file() for file in cfg.data.train_files + cfg.data.validation_files):
        plan.fact("data", "rows and steps are known once the data is there")
        _memory(plan, kind, None)
        return
    try:
        records = training_data.read_records(cfg, kind, read)
        sft_run = getattr(cfg, "sft_run", None)
        ready = (sft_run / "manifest.json").is_file() if sft_run else model.find_base(cfg.model)[0]
        if not ready:
            _estimated(plan, records.train)
            _memory(plan, kind, None)
            return
        start = training.start_from_run(cfg, sft_run) if sft_run else training.start_from_base(
            cfg, getattr(cfg, "loss_on", None))  # fmt: skip
        encoded = (rows.sft_rows if kind == "sft" else rows.preference_rows)(cfg, start, records)
        _data(plan, kind, start, encoded)
        training_data.require_rows(encoded)
        if cfg.trainer.early_stopping_patience and not encoded.val:
            plan.faults.append("trainer.early_stopping_patience: there is no validation to judge by")
        _start_means(plan, start)
        schedule = plan_steps(cfg.trainer, len(encoded.train))
        for line in schedule.lines("rows" if kind == "sft" else "pairs"):
            plan.fact("schedule", line)
        _memory(plan, kind, start, schedule)
    except PosttrainError as error:
        plan.faults.append(str(error))


def _data(plan: Plan, kind: str, start: training.Start, encoded: training_data.Rows) -> None:
    read = sum(encoded.fates.values())
    plan.fact("data", f"{read} records: " + ", ".join(f"{reason} {n}" for reason, n in sorted(encoded.fates.items())))
    plan.fact("data", f"{encoded.tokens} tokens, {encoded.trained_tokens} trained; {len(encoded.val)} rows validate")
    for note in encoded.notes:
        plan.fact("sampling", note)
    injects = f"; it says unasked: {start.template.injects!r}" if start.template.injects else ""
    plan.fact("example", f"template: {start.template.name}{injects}; trained tokens stand between 【 and 】")
    if kind == "sft" and encoded.train:
        row = encoded.train[0]
        end = row["seq_lengths"][0] if "seq_lengths" in row else len(row["input_ids"])
        text = chat.marked(start.tokenizer, row["input_ids"][:end], row["labels"][:end])
        plan.facts["example"] += _shortened(text).splitlines()
    elif encoded.train:
        row = encoded.train[0]
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            labels = [chat.IGNORED] * len(row["prompt_ids"]) + row[f"{side}_ids"]
            plan.fact("example", f"-- {side} --")
            plan.facts["example"] += _shortened(chat.marked(start.tokenizer, ids, labels)).splitlines()


def _shortened(text: str, limit: int = 1200) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n ... {len(text) - limit} characters ...\n{text[-limit // 2 :]}"


def _estimated(plan: Plan, records: list[dict]) -> None:
    """Without a tokenizer: about 0.7 tokens a Chinese character and 0.25 any other (Qwen2's vocabulary)."""
    turns = [m["content"] for r in records for m in r.get("messages") or r["prompt"] + r["chosen"] + r["rejected"]]
    chinese = sum("一" <= c <= "鿿" for turn in turns for c in turn)
    tokens = int(0.7 * chinese + 0.25 * (sum(map(len, turns)) - chinese)) + 5 * len(turns)
    plan.fact("data", f"{len(records)} records, about {tokens} tokens (an estimate: no tokenizer on disk yet)")
    cfg = plan.config.trainer
    count = max(1, tokens // cfg.max_length) if getattr(cfg, "packing", False) else len(records)
    for line in plan_steps(cfg, count).lines("rows (estimated)"):
        plan.fact("schedule", line)


def _memory(plan: Plan, kind: str, start: training.Start | None, schedule: Schedule | None = None) -> None:
    """The forecast against the card, and the disk that checkpoints take."""
    cfg, loaded = plan.config, plan.loaded
    found, name, _ = model.find_base(cfg.model)
    arch = memory.architecture(start.base.id, start.base.path) if start else memory.architecture(name, found)
    if arch is None:
        plan.fact("memory", "no forecast: the base has no config.json on disk and none in configs/models/")
        return
    vram = loaded.card.get("vram_gib")
    of_the_run = {} if start is None else {
        "quantization": start.quantization, "double_quant": start.double_quant,
        "lora_r": start.lora["r"], "target_modules": start.lora["target_modules"],
    }  # fmt: skip
    forecast = training_forecast.predict(cfg, arch, vram, **of_the_run)
    for line in forecast.lines():
        plan.fact("memory", line)
    if forecast.verdict == "NO":
        plan.too_big.append(
            f"memory: about {forecast.total:.1f} GiB are needed, {loaded.card['card']} has "
            f"{vram or memory.machine_gib():.1f}\n"
            "    in this order: a smaller trainer.per_device_train_batch_size, trainer.gradient_checkpointing=true, a "
            "shorter trainer.max_length, model.quantization=nf4, a smaller model.base"
        )
    checkpoints = (cfg.trainer.save_total_limit + 1) * int(3 * forecast.adapters * 2**30)
    plan.make(cfg.output_dir, checkpoints, "checkpoints with optimiser state")


def _collect(plan: Plan, check) -> None:
    """Run a check and add what it says to the plan's faults, so that all of them are told at once."""
    try:
        check()
    except PosttrainError as error:
        plan.faults.append(str(error))
