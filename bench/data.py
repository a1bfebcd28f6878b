"""
The data engine against the plain reference, datatrove and data-juicer: CPU time, memory, and the records kept.

    python -m bench.data                                        # the 40,000 records of ../shared/bench, 3 rounds
    python -m bench.data --sizes 40000 1000000 --rounds 1       # and a million made from them (bench/data_corpus.py)
    python -m bench.data --sizes 60000 250000 1000000 --rounds 1 --runs ours      # memory against records
    POSTTRAIN_PEERS=/path/to/venvs python -m bench.data --peers     # the peers too (bench/peers/README.md)
    python -m bench.data --peers                                    # without venvs: their recorded figures

A run is one process with its children, on one thread; the runs of a round alternate. CPU seconds are user + system
time of the whole process tree, imports included; records/s/core = records / CPU seconds. Peak memory is the largest
resident set of one process of the tree, and of its parent. Figures are medians of the rounds. Writes
outputs/bench/data.json.

    reference   tests/reference.py
    ours        scripts.prepare_data on the reference's rules, one worker
    ours_all    all rules at their defaults, and decontamination against four benchmarks of ../shared/data; one worker
    ours_2      as ours, two workers
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # `python bench/data.py` works like `-m`

from bench import data_corpus  # noqa: E402
from tests import reference  # noqa: E402

OUT = ROOT / "outputs" / "bench"
RECORDED = ROOT / "bench" / "peers" / "figures.json"
RUNS = ("reference", "ours", "ours_all", "ours_2")
PEERS = ("datatrove", "data_juicer")
BENCHMARKS = [ROOT.parent / "shared" / "data" / name for name in ("cmmlu", "gsm8k", "alignbench", "safetybench")]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}  # fmt: skip


# ------------------------------------------------------------------ one run


def measured(command: list[str], log: Path, work: Path = ROOT) -> dict[str, float]:
    """Run a command to its end: cpu_s, wall_s, peak_mib (largest process of its tree) and parent_mib.

    cpu_s is the kernel's account of the process and all children it waited for. RuntimeError if it fails.
    """
    peaks, began = {}, time.perf_counter()
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=work, env={**os.environ, **ENVIRONMENT})
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            for pid in tree(process.pid):
                peaks[pid] = max(peaks.get(pid, 0), peak_mib(pid))
            time.sleep(0.1)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}; the end of {log}:\n{tail}")
    wall = time.perf_counter() - began
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": wall, "peak_mib": max(peaks.values()),
            "parent_mib": peaks[process.pid]}  # fmt: skip


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    return found


def peak_mib(pid: int) -> float:
    """High-water mark of a process's resident set; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


# ------------------------------------------------------------------ the commands


def command_of(run: str, records: Path, work: Path) -> list[str]:
    """The command line of one run over a file of records. Its ids go to work/ids.json, or `ours_ids` reads them."""
    venvs = Path(os.environ.get("POSTTRAIN_PEERS", ""))
    if run == "reference":
        return [sys.executable, "tests/reference.py", str(records), "--out", f"{work}/ids.json",
                "--records", f"{work}/kept.jsonl"]  # fmt: skip
    if run == "datatrove":
        return [f"{venvs}/datatrove/bin/python", "bench/peers/datatrove_run.py", str(records), f"{work}/work",
                f"{work}/ids.json"]  # fmt: skip
    if run == "data_juicer":
        return [f"{venvs}/data_juicer/bin/dj-process", "--config", "bench/peers/data_juicer.yaml",
                "--dataset_path", str(juicer_input(records)), "--export_path", f"{work}/out/kept.jsonl"]  # fmt: skip
    return [sys.executable, "-m", "scripts.prepare_data", "--config", str(our_config(run, records, work))]


def our_config(run: str, records: Path, work: Path) -> Path:
    """The YAML of one of our runs. Only `ours_all` has rules that the reference lacks."""
    words, topics = reference.keywords(), sorted(path.stem for path in (ROOT / "configs/keywords").glob("*.txt"))
    lists = {topic: work / f"{topic}.txt" for topic in topics}  # in place of the lists of configs/keywords/
    for number, path in enumerate(lists.values()):
        path.write_text("\n".join(words[number :: len(lists)]) + "\n", encoding="utf-8")
    raw = work / "raw" / "bench"
    raw.mkdir(parents=True)
    (raw / records.name).symlink_to(records)
    config = {
        "stage": "sft", "raw_dir": str(work / "raw"), "output_dir": str(work / "out"), "split": [1.0, 0.0, 0.0],
        "sft": {"mix": {"bench": 1}, "max_samples": 100_000_000}, "workers": 2 if run == "ours_2" else 1,
        "keywords": {topic: str(path) for topic, path in lists.items()}, "rules": {"max_chars": reference.MAX_CHARS},
    }  # fmt: skip
    if run == "ours_all":
        config["decontaminate"] = {"benchmarks": [str(path) for path in BENCHMARKS if path.exists()]}
    else:
        from posttrain.data_blocks import Rules

        dropping = ("too_short", "too_long", "odd_symbols", "repetition", "keywords", "pii", "exact_duplicate",
                    "near_duplicate")  # fmt: skip
        actions = [name for name, field in Rules.model_fields.items() if field.default in ("flag", "mask", "drop")]
        config["rules"] |= {name: "drop" if name in dropping else "keep" for name in actions}
        config["strip_html"] = False
    path = work / "data.yaml"
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def juicer_input(records: Path) -> Path:
    """The records as {id, text}, their turns joined: data-juicer has no adapters. Not timed."""
    path = OUT / f"texts_{records.name}"
    with open(path, "w", encoding="utf-8") as out:
        for row_id, row in reference.rows(records):
            turns = reference.sharegpt(row["conversations"]) if "conversations" in row else reference.alpaca(row)
            text = "\n".join(text for _, text, _ in turns)
            out.write(json.dumps({"id": row_id, "text": text}, ensure_ascii=False) + "\n")
    return path


def ours_ids(directory: Path) -> dict[str, list[str]]:
    """{kept, before_near_duplicates} as source:line, from what prepare_data wrote."""
    import zstandard  # here and in our_config, so that the peers can be measured without our requirements

    def place(file: str, line: int) -> str:
        return f"{Path(file).name.split('.')[0]}:{line}"

    with open(directory / "sft_train.jsonl", encoding="utf-8") as lines:
        metas = (json.loads(line)["meta"] for line in lines)
        kept = [place(meta["file"], meta["line"]) for meta in metas]
    with zstandard.open(directory / "sft_dropped.jsonl.zst", "rt", encoding="utf-8") as lines:
        dropped = (json.loads(line) for line in lines)
        near = [place(row["file"], row["line"]) for row in dropped if row["reason"] == "near_duplicate"]
    return {"kept": kept, "before_near_duplicates": kept + near}


def one(run: str, records: Path, work: Path) -> dict:
    """Measure one run in a fresh directory, and read which records it kept."""
    subprocess.run(["rm", "-rf", str(work)], check=True)
    work.mkdir(parents=True)
    figures = measured(command_of(run, records, work), work / "log.txt")
    if run in RUNS[1:]:
        ids = ours_ids(work / "out")
    elif run == "data_juicer":
        with open(work / "out" / "kept.jsonl", encoding="utf-8") as lines:
            ids = {"kept": [json.loads(line)["id"] for line in lines]}
    else:
        ids = json.loads((work / "ids.json").read_text())
    (work / "kept.json").write_text(json.dumps({k: ids[k] for k in ("kept", "before_near_duplicates") if k in ids}))
    return figures | {"kept": len(ids["kept"])}


# ------------------------------------------------------------------ what is said of them


def agreement(directory: Path, runs: list[str], size: int) -> dict[str, float]:
    """Near duplicates as a share, and how many records not both the reference and `ours` keep, before and after."""
    steps = ("before_near_duplicates", "kept")
    said = {}
    for run in ("reference", "ours"):
        if run in runs:
            ids = json.loads((directory / run / "kept.json").read_text())
            said[run] = [set(ids[step]) for step in steps]
    if not said:
        return {}
    before, after = next(iter(said.values()))
    told = {"near_duplicate_share": (len(before) - len(after)) / size}
    if len(said) == 2:
        told |= {f"differ_{step}": len(one ^ other) for step, one, other in zip(steps, *said.values(), strict=True)}
    return told


def conclusions(results: list[dict]) -> list[str]:
    """What the tables do not show: agreement, the gain of two workers, memory per record."""
    told = []
    for result in results:
        size, runs, same = result["records"], result["runs"], result["agreement"]
        head = f"{size:,} records: "
        if same:
            told.append(f"{head}{same['near_duplicate_share']:.1%} near duplicates")
        if "differ_kept" in same:
            before, after = same["differ_before_near_duplicates"], same["differ_kept"]
            told.append(f"{head}ours and the reference keep the same ids before near-dedupe but for {before}, after it "
                        f"but for {after} ({after / size:.3%})")  # fmt: skip
        if {"ours", "ours_2"} <= runs.keys():
            told.append(f"{head}two workers are {runs['ours']['wall_s'] / runs['ours_2']['wall_s']:.2f} x one (wall)")
    if len(results) > 1 and all("ours" in result["runs"] for result in results):
        low, high = results[0], results[-1]
        grown = (high["runs"]["ours"]["parent_mib"] - low["runs"]["ours"]["parent_mib"]) * 2**20
        per_record = grown / (high["records"] - low["records"])
        told.append(
            f"parent memory from {low['records']:,} to {high['records']:,} records: {per_record:.0f} B per record"
        )
    return told


def start_up() -> float:
    """CPU seconds of importing the stage, building its tables and loading its compiled loops, in a fresh process; the
    best of three. The first of them compiles where that was not done yet."""
    code = "import time, posttrain.data.pipeline as p; p.get_ready(); print(time.process_time())"
    found = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                            env={**os.environ, **ENVIRONMENT}).stdout for _ in range(3)]  # fmt: skip
    return min(map(float, found))


def cpu_model() -> str:
    """As the kernel names it."""
    return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))


def medians(rounds: list[dict]) -> dict[str, float]:
    """The median of every figure, and all CPU seconds."""
    middle = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    return middle | {"all_cpu_s": [round(figures["cpu_s"], 2) for figures in rounds]}


def table(size: int, figures: dict[str, dict]) -> str:
    """Markdown: one line per run, its CPU time as a multiple of the reference's and of ours.

    A recorded figure is compared with the reference of its own rounds: another day is another load.
    """
    lines = [
        "| run | CPU s | each round | wall s | records/s/core | / reference | / ours | peak MiB | parent MiB | kept |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    plain, ours = (figures[run]["cpu_s"] if run in figures else None for run in ("reference", "ours"))
    for run, it in figures.items():
        beside = it.get("reference_cpu_s", plain)
        to_plain = it["cpu_s"] / beside if beside else None
        to_ours = to_plain * plain / ours if to_plain and plain and ours else it["cpu_s"] / ours if ours else None
        note = f" ({it['recorded']})" if "recorded" in it else ""
        rounds = ", ".join(f"{seconds:.1f}" for seconds in it["all_cpu_s"])
        cells = (
            f"{it['cpu_s']:.1f}", rounds, f"{it['wall_s']:.1f}", f"{size / it['cpu_s']:,.0f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in (to_plain, to_ours)),
            f"{it['peak_mib']:.0f}", f"{it['parent_mib']:.0f}", f"{it['kept']:.0f}",
        )  # fmt: skip
        lines.append(f"| {run}{note} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recorded(size: int) -> dict[str, dict]:
    """The peers' figures as bench/peers/README.md took them once, if they are of this many records."""
    taken = json.loads(RECORDED.read_text(encoding="utf-8"))
    if taken["records"] != size:
        return {}
    same = {"recorded": f"recorded {taken['date']}", "reference_cpu_s": taken["runs"]["reference"]["cpu_s"]}
    return {peer: taken["runs"][peer] | same for peer in PEERS}


def compare(size: int, runs: list[str], rounds: int) -> dict:
    """All runs over `size` records, alternated, `rounds` times."""
    records = data_corpus.corpus(size, OUT)
    directory = OUT / f"data_{size}"
    taken = {run: [] for run in runs}
    for number in range(1, rounds + 1):
        for run in runs:
            figures = one(run, records, directory / run)
            taken[run].append(figures)
            print(f"  {size} records, round {number}, {run}: {figures['cpu_s']:.1f} s CPU", file=sys.stderr, flush=True)
    figures = {run: medians(of_rounds) for run, of_rounds in taken.items()}
    return {"records": size, "mb": records.stat().st_size / 1e6, "runs": figures,
            "agreement": agreement(directory, runs, size)}  # fmt: skip


def main() -> None:
    """Run, print a table for each size, write outputs/bench/data.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[data_corpus.SHARED_RECORDS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", nargs="+", choices=[*RUNS, *PEERS], default=list(RUNS))
    parser.add_argument("--peers", action="store_true", help="also datatrove and data-juicer, on the first size")
    parser.add_argument("--record", action="store_true", help=f"write the figures to {RECORDED.relative_to(ROOT)}")
    args = parser.parse_args()
    if not data_corpus.SHARED.exists():
        print(f"{data_corpus.SHARED}: the shared records are not beside this checkout; nothing to measure")
        return
    OUT.mkdir(parents=True, exist_ok=True)
    live = args.peers and "POSTTRAIN_PEERS" in os.environ
    machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "python": platform.python_version(),
               "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    results, ready_s = [], start_up() if {"ours", "ours_all", "ours_2"} & set(args.runs) else None
    for number, size in enumerate(args.sizes):
        runs = args.runs + [peer for peer in PEERS if live and number == 0 and peer not in args.runs]
        result = compare(size, runs, args.rounds)
        if args.peers and not live:
            result["runs"] |= recorded(size)
        results.append(result)
        print(f"\n{size:,} records, {result['mb']:.0f} MB\n\n{table(size, result['runs'])}")
    print("\n" + "\n".join(conclusions(results)))
    if ready_s:
        machine["start_up_s"] = ready_s
        print(f"\nimports, tables and compiled loops: {ready_s:.2f} s CPU")
    print(f"\n{machine['cores']} x {machine['cpu']}, Python {machine['python']}, {machine['date']}")
    written = json.dumps({**machine, "sizes": results}, indent=1)
    (OUT / "data.json").write_text(written, encoding="utf-8")
    if args.record:
        RECORDED.write_text(json.dumps({**machine, **results[0]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
