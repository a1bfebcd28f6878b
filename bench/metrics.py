"""
The generation metrics against their sources: sacrebleu's own command, rouge_chinese, scikit-learn, bert_score.

    python -m bench.metrics                                # without the two packages below: their rows say so
    pip install --no-deps --target /tmp/peers rouge_chinese==1.0.3 six==1.17.0 bert_score==0.3.13
    python -m bench.metrics --peers /tmp/peers             # neither package is needed otherwise

Prints Markdown: the largest difference over 200 made pairs of answer and reference (Chinese, English and mixed, some of
them empty), then time and memory of ROUGE-L on one pair of long texts. Time and memory of one pair are those of a
process of its own, above what its imports took. BERTScore runs on a tiny encoder with random weights: what is held
together is the arithmetic.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # `python bench/metrics.py` works like `-m`

COMMON = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就"
    "分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经"
)
WORDS = "the model answers a question about rivers and mountains in winter 2024 GDP 5.2% train data".split()
LONG = (1000, 3000)
PEERS = ("rouge_chinese", "bert_score")


# ------------------------------------------------------------------ texts


def pairs(count: int, seed: int = 5) -> tuple[list[str], list[str]]:
    """(answers, references): each answer is its reference with a part of it cut, moved or replaced; a few are empty."""
    rng, answers, references = random.Random(seed), [], []
    for i in range(count):
        pieces = rng.choices(list(COMMON), k=rng.randrange(8, 90))
        for _ in range(rng.randrange(0, 4)):
            pieces.insert(rng.randrange(len(pieces)), f" {' '.join(rng.choices(WORDS, k=rng.randrange(1, 6)))} ")
        said = [piece for piece in pieces if rng.random() > 0.25]
        cut = rng.randrange(len(said) + 1)
        said = said[cut:] + said[:cut] if i % 3 else said + rng.choices(COMMON, k=5)
        references.append("".join(pieces).strip())
        answers.append("" if i % 50 == 49 else "".join(said).strip())
    return answers, references


def make_encoder(path: Path, texts: list[str]) -> Path:
    """A BERT of three layers with random weights and a vocabulary of the texts' characters, as a hub model lies."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    chars = sorted(set("".join(texts).lower()) - set(" \n"))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = special + chars + [f"##{char}" for char in chars if char.isascii()]
    pieces = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                          special_tokens=[("[CLS]", 2), ("[SEP]", 3)])  # fmt: skip
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=64, **named).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                        intermediate_size=64, max_position_embeddings=64)  # fmt: skip
    BertModel(config).save_pretrained(path)
    return path


# ------------------------------------------------------------------ the same number twice


def sacrebleu_command(metric: str, answers: list[str], references: list[str]) -> float:
    """What `sacrebleu` prints, to 10 decimals."""
    with tempfile.TemporaryDirectory() as folder:
        said, right = Path(folder) / "said.txt", Path(folder) / "right.txt"
        said.write_text("".join(f"{text}\n" for text in answers), encoding="utf-8")
        right.write_text("".join(f"{text}\n" for text in references), encoding="utf-8")
        command = [sys.executable, "-m", "sacrebleu", str(right), "-i", str(said), "-m", metric, "-b", "-w", "10"]
        command += ["--tokenize", "zh"] if metric == "bleu" else []
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parity(there: set[str]) -> list[tuple[str, str, int, str, str]]:
    """(metric, peer, texts compared, largest difference, bound) of each metric that has a source at hand."""
    from sklearn.metrics import accuracy_score, f1_score

    from posttrain.evals import generation

    answers, references = pairs(200)
    right, rows = [[text] for text in references], []
    for name, metric in (("bleu4", "bleu"), ("chrf", "chrf")):
        ours = generation.corpus_score(name, generation.corpus_stats(name, answers, right))
        away = abs(ours - sacrebleu_command(metric, answers, references))
        rows.append((f"{name} ({ours:.4f})", "sacrebleu's command", len(answers), f"{away:.1e}", "0.01"))
    both = [i for i, answer in enumerate(answers) if answer]
    for name, split in (("rouge_l_char", generation.characters), ("rouge_l_jieba", generation.words)):
        found = "not measured: --peers"
        if "rouge_chinese" in there:
            from rouge_chinese import Rouge

            ours = [generation.rouge_l(split(answers[i]), split(references[i])) for i in both]
            theirs = Rouge(metrics=["rouge-l"]).get_scores([" ".join(split(answers[i])) for i in both],
                                                           [" ".join(split(references[i])) for i in both])  # fmt: skip
            found = f"{max(abs(a - b['rouge-l']['f']) for a, b in zip(ours, theirs, strict=True)):.1e}"
        rows.append((name, "rouge_chinese 1.0.3", len(both), found, "1e-6"))
    rng, classes = random.Random(1), [f"类{i}" for i in range(7)]
    gold, said = rng.choices(classes, k=500), rng.choices([*classes, "?"], k=500)
    table = generation.confusion([s if s in classes else None for s in said], gold, classes)
    theirs = f1_score(gold, said, labels=classes, average="macro")
    of_table = {"accuracy": (table.trace() / table.sum(), accuracy_score(gold, said)),
                "macro_f1": (generation.macro_f1(table), theirs)}  # fmt: skip
    rows += [(name, "scikit-learn", 500, f"{abs(a - b):.1e}", "1e-12") for name, (a, b) in of_table.items()]
    return rows + bert_scores([answers[i] for i in both], [references[i] for i in both], "bert_score" in there)


def bert_scores(answers: list[str], references: list[str], is_there: bool) -> list[tuple[str, str, int, str, str]]:
    """BERTScore with and without the weights of rare tokens."""
    from posttrain.evals import bert_score as ours
    from posttrain.evaluation_blocks import BertScore

    rows = []
    for idf in (False, True):
        found = "not measured: --peers"
        if is_there:
            import bert_score as theirs

            with tempfile.TemporaryDirectory() as folder:
                encoder = make_encoder(Path(folder), answers + references)
                how = BertScore(model=encoder, num_layers=2, idf=idf)
                values = ours.f1_items(ours.Encoder(how), answers, [[text] for text in references])
                _, _, f1 = theirs.score(answers, references, model_type=str(encoder), num_layers=2, idf=idf,
                                        device="cpu", nthreads=0, use_fast_tokenizer=True)  # fmt: skip
            found = f"{max(abs(a - b) for a, b in zip(values, f1.tolist(), strict=True)):.1e}"
        rows.append((f"bertscore{', idf' if idf else ''}", "bert_score 0.3.13", len(answers), found, "1e-5"))
    return rows


# ------------------------------------------------------------------ long answers


def one_pair(tool: str, length: int) -> dict[str, float]:
    """ROUGE-L of two texts of `length` tokens: seconds (the best of up to 20), MiB added at the peak, and the score."""
    rng = random.Random(length)
    a, b = ([rng.choice(COMMON) for _ in range(length)] for _ in range(2))
    if tool == "ours":
        from posttrain.evals import generation

        generation.rouge_l(a[:9], b[:9])

        def score():
            return generation.rouge_l(a, b)
    else:
        from rouge_chinese import Rouge

        rouge, texts = Rouge(metrics=["rouge-l"]), (" ".join(a), " ".join(b))

        def score():
            return rouge.get_scores(*texts)[0]["rouge-l"]["f"]

    before, times = peak_mib(reset=True), []
    while len(times) < 20 and sum(times) < 2:
        began = time.perf_counter()
        value = score()
        times.append(time.perf_counter() - began)
    return {"seconds": min(times), "mib": peak_mib() - before, "score": value}


def peak_mib(reset: bool = False) -> float:
    """High-water mark of this process's resident memory in MiB; Linux lets a process set it back to the present."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def in_a_process(tool: str, length: int, peers: str) -> dict[str, float]:
    """`one_pair` in a fresh process."""
    command = [sys.executable, "-m", "bench.metrics", "--one", tool, str(length), "--peers", peers]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ).stdout
    return json.loads(out.splitlines()[-1])


def speed(rounds: int, peers: str, there: set[str]) -> list[str]:
    """Lines of the second table; ours and rouge_chinese take turns."""
    lines = ["| ROUGE-L, tokens | tool | ms | MiB | score | speed |", "|---|---|---|---|---|---|"]
    for length in LONG:
        runs: dict[str, list[dict]] = {"ours": [], "rouge_chinese": []}
        for _ in range(rounds):
            for tool in runs if "rouge_chinese" in there else ["ours"]:
                runs[tool].append(in_a_process(tool, length, peers))
        middle = {tool: {key: statistics.median(run[key] for run in some) for key in some[0]}
                  for tool, some in runs.items() if some}  # fmt: skip
        for tool, it in middle.items():
            times = f"{middle['rouge_chinese']['seconds'] / it['seconds']:,.0f} x" if len(middle) > 1 else "-"
            lines.append(f"| {length:,} | {tool} | {1000 * it['seconds']:,.2f} | {it['mib']:,.1f} | "
                         f"{it['score']:.8f} | {times} |")  # fmt: skip
        if len(middle) == 1:
            lines.append(f"| {length:,} | rouge_chinese | not measured: --peers | | | |")
    return lines


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="", help="directory of rouge_chinese and bert_score")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peers:
        sys.path.append(args.peers)  # last: the packages of the environment are not overridden
    if args.one:
        print(json.dumps(one_pair(args.one[0], int(args.one[1]))))
        return
    there = {name for name in PEERS if args.peers and (Path(args.peers) / name).is_dir()}
    print("| metric | held against | texts | largest difference | asked |\n|---|---|---|---|---|")
    for row in parity(there):
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    print("\n" + "\n".join(speed(args.rounds, args.peers, there)))


if __name__ == "__main__":
    main()
