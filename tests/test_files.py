"""Files of every kind -> rows with their line numbers, and the files that cannot be read."""

import gzip
import io
import json
import tarfile
import zipfile

import pytest
import zstandard

from posttrain.data.files import data_files, read_rows
from posttrain.errors import UserFault

ROWS = [{"instruction": f"问题{i}", "input": "", "output": "答案，\n第二行"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, ensure_ascii=False).encode()


def as_parquet(path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def as_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", LINES)


def as_tar(path):
    with tarfile.open(path, "w:gz") as archive:
        for number, row in enumerate(ROWS):
            content = json.dumps(row).encode()
            member = tarfile.TarInfo(f"chats/{number}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def as_table(delimiter):
    quoted = [f'问题{i}{delimiter}{delimiter}"答案，\n第二行"' for i in range(3)]
    return "\n".join([delimiter.join(("instruction", "input", "output")), *quoted]).encode()


FILES = {
    "a.jsonl": LINES, "lines.json": LINES, "array.json": ARRAY, "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "bom.json": b"\xef\xbb\xbf" + ARRAY, "pretty.json": json.dumps(ROWS, ensure_ascii=False, indent=2).encode(),
    "pretty_values.json": b"\n".join(json.dumps(row, ensure_ascii=False, indent=2).encode() for row in ROWS),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}).encode(), "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "blank.jsonl": LINES.replace(b"\n", b"\n\n"), "a.jsonl.gz": gzip.compress(LINES), "a.json.gz": gzip.compress(ARRAY),
    "a.jsonl.zst": zstandard.compress(LINES), "a.csv": as_table(","), "a.tsv": as_table("\t"),
    "bom.csv": b"\xef\xbb\xbf" + as_table(","), "a.csv.gz": gzip.compress(as_table(",")), "a.parquet": as_parquet,
    "a.zip": as_zip, "a.tar.gz": as_tar,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_file_kinds(tmp_path, name):
    content = FILES[name]
    content(tmp_path / name) if callable(content) else (tmp_path / name).write_bytes(content)
    assert data_files(tmp_path) == [tmp_path / name]
    assert [row for _, row in read_rows(tmp_path / name)] == ROWS


def test_big_array_is_read_as_a_stream(tmp_path):
    rows = [{"instruction": "问" * (i % 900), "output": "答" * 1000} for i in range(1500)]
    rows += [{"output": "长" * 600_000}]
    path = tmp_path / "big.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    found = list(read_rows(path))
    assert [row for _, row in found] == rows
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(lines[number - 1].strip().startswith("{") for number, _ in found)


def test_a_list_of_turns_is_one_row(tmp_path):
    turns = [{"role": "user", "content": "问"}, {"role": "bot", "content": "答"}]
    (tmp_path / "one.json").write_text(json.dumps(turns))
    (tmp_path / "lists.jsonl").write_text(json.dumps(["问", "答"]) + "\n" + json.dumps(["问", "不"]) + "\n")
    assert len(list(read_rows(tmp_path / "one.json"))) == 1
    assert [row for _, row in read_rows(tmp_path / "lists.jsonl")] == [["问", "答"], ["问", "不"]]


def test_a_directory_is_read_in_order_without_notes(tmp_path):
    for name in ("b/2.jsonl", "b/1.json", "a.jsonl", ".cache/x.json", "SOURCE.json", "README.md", "c/.hidden.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    assert [str(p.relative_to(tmp_path)) for p in data_files(tmp_path)] == ["a.jsonl", "b/1.json", "b/2.jsonl"]
    assert [p.name for p in data_files(tmp_path, ["b/*.jsonl"])] == ["2.jsonl"]
    assert len(data_files(tmp_path, ["nothing/*.parquet"])) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES * 2000)[:-20], r"cut.jsonl.gz: cut off or damaged after line \d+"),
        ("cut.jsonl.zst", zstandard.compress(LINES * 50)[:60], "cut.jsonl.zst"),
        ("not.jsonl.gz", b"plain text", "not.jsonl.gz: cut off or damaged"),
        ("page.json", b"<html><body>404</body></html>", "page.json:1: not JSON at all.*a web page"),
        ("pointer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("cut.json", ARRAY[:-20], "cut.json:1: "),
        ("broken.json", b'[\n{"a": 1},\n{"a" 2}\n]', "broken.json:3: not JSON"),
        ("empty.jsonl", b"", "holds no rows"),
        ("empty.json", b"[]", "holds no rows"),
        ("blank.jsonl", b"\n \n", "holds no rows"),
        ("wide.json", json.dumps(ROWS).encode("utf-16"), "UTF-16"),
        ("gbk.csv", as_table(",").decode().encode("gb18030"), "GB18030"),
        ("quote.csv", as_table(",") + b'\n"never closed,,', "quote.csv: after line .*not readable as CSV"),
        ("cut.tar.gz", gzip.compress(b"x" * 5000)[:30], "cut.tar.gz: cut off or damaged"),
        ("not.parquet", b"plain text", "not a readable parquet file"),
        ("cut.zip", b"PK\x03\x04", "cut.zip: cut off or damaged"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserFault, match=message):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "not_json"),
        (b'{"a": "\xff\xfe"}', "not_utf8"),
        (b"[" * 100_000, "not_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not_json"),
    ],
)
def test_one_broken_line_is_a_fault_with_its_number(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES + line + b"\n" + LINES)
    found = list(read_rows(path))
    assert len(found) == 7 and found[3][0] == 4 and found[3][1].reason == reason


def test_nan_is_read_as_null(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"score": NaN}\n')
    assert [row for _, row in read_rows(tmp_path / "rows.jsonl")] == [{"score": None}]
