"""
datatrove 0.10.1 on the work of tests/reference.py: read, its row filter, MinHash in four stages, write.

    PYTHONPATH=<checkout> <venv>/bin/python bench/peers/datatrove_run.py records.jsonl work_directory ids.json

No more work than ours: no exact duplicates apart, and no verification, which datatrove lacks (records that share a band
are duplicates). Its n-grams are of words, so a tokenizer of characters is put in their place. One worker: then it runs
in this process, which costs less CPU than a pool.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import minhash
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.text import TextNormConfig

from tests import reference

# The key is folded already.
AS_IT_IS = TextNormConfig(lowercase=False, norm_whitespace=False, remove_punctuation=False,
                          norm_unicode_diacritics=False, norm_numbers=False)  # fmt: skip
SETTING = minhash.MinhashConfig(n_grams=reference.SHINGLE, num_buckets=reference.BANDS,
                                hashes_per_bucket=reference.ROWS, norm_config=AS_IT_IS)  # fmt: skip


class Characters:
    """A tokenizer whose words are characters."""

    def word_tokenize(self, text: str) -> list[str]:
        return list(text)


class Rules(BaseFilter):
    """The rules of tests/reference.py; the text becomes the key."""

    name = "reference"

    def __init__(self):
        super().__init__()
        self.has_keyword = None  # an automaton cannot be copied; made where it is used

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        self.has_keyword = self.has_keyword or reference.keyword_search()
        record = reference.read(document.id, document.metadata.pop("row"))
        if isinstance(record, str):
            return False, record
        body = reference.body_of(record)
        reason = reference.reason_to_drop(record, body, self.has_keyword)
        document.text = reference.key_of(body)
        document.metadata["messages"] = [{"role": role, "content": text} for role, text in record.turns]
        return (False, reason) if reason else True


def as_document(reader, row: dict, path: str, number: int) -> dict:
    """A row of the input as datatrove wants it; its line is its id."""
    return {"text": "-", "id": str(number + 1), "metadata": {"row": row}}


def signatures(output: str) -> minhash.MinhashDedupSignature:
    """The signature stage over characters; the default tokenizer of its constructor needs spaCy."""
    minhash.load_word_tokenizer = lambda language: Characters()
    return minhash.MinhashDedupSignature(output, config=SETTING)


def main(records: Path, work: Path, ids: Path) -> None:
    """Run the stages one after the other and write the ids of the kept records."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "in").mkdir(parents=True)
    (work / "in" / records.name).symlink_to(records)  # alone: the reader takes every file whose name ends alike
    filtered = JsonlReader(f"{work}/filtered")
    stages = {
        "filter": (1, [JsonlReader(f"{work}/in", adapter=as_document), Rules(),
                       JsonlWriter(f"{work}/filtered", compression=None)]),
        "signatures": (1, [filtered, signatures(f"{work}/signatures")]),
        "buckets": (reference.BANDS, [minhash.MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets",
                                                                  config=SETTING)]),
        "cluster": (1, [minhash.MinhashDedupCluster(f"{work}/buckets", f"{work}/gone", config=SETTING)]),
        "write": (1, [filtered, minhash.MinhashDedupFilter(f"{work}/gone"),
                      JsonlWriter(f"{work}/out", compression=None)]),
    }  # fmt: skip
    for name, (tasks, pipeline) in stages.items():
        began = time.process_time()
        LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=f"{work}/log_{name}").run()
        print(f"{name} {time.process_time() - began:.2f} s CPU", flush=True)
    source = records.name.split(".")[0]
    lines = (line for path in sorted(Path(work, "out").glob("*.jsonl")) for line in open(path, encoding="utf-8"))
    ids.write_text(json.dumps({"kept": [f"{source}:{json.loads(line)['id']}" for line in lines]}), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
