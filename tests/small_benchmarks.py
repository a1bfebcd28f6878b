"""A little of each benchmark in its published format, for the tests of evaluation; the items are sums."""

from pathlib import Path

from conftest import write_rows

LETTERS = "ABCD"


def write_csv(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(row) + "\n" for row in rows), encoding="utf-8")


def write_benchmarks(folder: Path) -> Path:
    """A little of each benchmark in its published format; the items are sums."""
    header = ["", "Question", *LETTERS, "Answer"]
    for subject, count in (("anatomy", 9), ("virology", 6)):
        rows = [
            [str(i), f"{i}加{i}等于多少", str(2 * i), str(2 * i + 1), "0.50", "NA", LETTERS[i % 4]]
            for i in range(count)
        ]
        write_csv(folder / f"cmmlu/test/{subject}.csv", [header, *rows])
        write_csv(folder / f"cmmlu/dev/{subject}.csv", [header, *rows[:5]])
    header = ["id", "question", *LETTERS, "answer"]
    write_csv(folder / "ceval-valid/val/law_val.csv", [header, ["0", "一加一", "1", "2", "3", "4", "B"]])
    write_rows(
        folder / "gsm8k/test.jsonl", [{"question": f"What is {i}+1?", "answer": f"#### {i + 1}"} for i in range(2)]
    )
    write_rows(folder / "gsm8k/train.jsonl", [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(9)])
    endings = ["is", "was", "be", "am"]
    swag = [{"activity_label": "Sums", "ctx_a": f"{i} and", "ctx_b": "one", "endings": endings, "label": i % 4}
            for i in range(5)]  # fmt: skip
    write_rows(folder / "hellaswag/hellaswag_val.jsonl", swag)
    grande = [{"qID": str(i), "sentence": f"The {i} was more than _ by one.", "option1": "zero", "option2": "two",
               "answer": "12"[i % 2]} for i in range(5)]  # fmt: skip
    write_rows(folder / "winogrande/dev.jsonl", grande)
    return folder
