"""
A public set from a hub into data_raw/<key>/: files only, never a loading script, with SOURCE.json beside them.

The files are collected in data_raw/.<key>.part/ and renamed at the end: a directory data_raw/<key>/ is always whole.
"""

import os
import shutil
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path

from posttrain.config import shown
from posttrain.data.files import data_files, is_data
from posttrain.errors import UserFault
from posttrain.hub import HubFile, Repo, check_disk, fetch_file, host, list_files, page, with_retries
from posttrain.runs import read_json, sha256, write_json


def local_files(directory: Path) -> list[Path]:
    """The data files that lie in data_raw/<key>/, sorted; empty if there is none."""
    return data_files(directory) if directory.is_dir() else []


def source_repo(key: str, entry: dict, raw_dir: Path, hub: str) -> Repo:
    """Where an entry of configs/datasets.yaml is downloaded from. UserFault if that hub does not have it."""
    field, other, other_field = ("modelscope", "huggingface", "hub") if hub == "modelscope" else (
        "hub", "modelscope", "modelscope")  # fmt: skip
    ways = [f"the other hub: --set hub={other}"] if entry.get(other_field) else []
    ways.append(f"without a hub: lay its files (jsonl, json, csv, parquet, also packed) into {shown(raw_dir / key)}/")
    if not entry.get(field):
        listed = "\n".join(f"    - {way}" for way in ways)
        raise UserFault(f"{key}: no id on {hub} in the catalogue ({field}: null)\n  choose:\n{listed}")
    # A commit of one hub means nothing on the other.
    revision = entry.get("revision") if hub == "huggingface" else entry.get("modelscope_revision")
    return Repo(hub, entry[field], "dataset", revision, key, tuple(ways))


def chosen(key: str, entry: dict, files: list[HubFile], repo: Repo) -> list[HubFile]:
    """The data files among a repository's files; `files:` of the catalogue entry narrows them down by pattern."""
    patterns = entry.get("files") or ["*"]
    picked = [f for f in files if is_data(Path(f.path)) and any(fnmatch(f.path, pattern) for pattern in patterns)]
    if not picked:
        listed = ", ".join(sorted(f.path for f in files)[:12]) or "nothing"
        raise UserFault(f"{key}: {repo.id} on {host(repo.hub)} has no data file that matches {patterns}\n"
                        f"  there: {listed}\n  correct `files:` of {key} in the catalogue, or {repo.ways[-1]}")
    return picked


def download_source(key: str, entry: dict, raw_dir: Path, hub: str, retries: int = 5) -> list[Path]:
    """Download one entry of the catalogue into raw_dir/<key>/ and return its data files, sorted.

    Files that already lie there win, and no socket is opened. `entry` uses hub (the id on Hugging Face), modelscope,
    revision, files and licence. Raises UserFault (gated, not found, rate limit, offline, no such id), WontFit (disk).
    """
    target, part = raw_dir / key, raw_dir / f".{key}.part"
    if present := local_files(target):
        return present
    repo = source_repo(key, entry, raw_dir, hub)
    commit, files = with_retries(repo, lambda: list_files(repo), retries)
    files = chosen(key, entry, files, repo)
    _begin(part, commit)
    missing = [f for f in files if not (part / f.path).is_file()]
    check_disk(repo, sum(f.bytes for f in missing), raw_dir)
    print(f"{key}: {repo.id} on {host(hub)}, {len(files)} files, {sum(f.bytes for f in files) / 2**20:.1f} MiB; "
          f"{sum(f.bytes for f in missing) / 2**20:.1f} MiB to download", flush=True)  # fmt: skip
    for number, file in enumerate(missing, 1):
        print(f"  {number}/{len(missing)} {file.path} ({file.bytes / 2**20:.1f} MiB)", flush=True)
        with_retries(repo, lambda f=file: fetch_file(repo, commit, f, part / f.path), retries)
    _finish(key, entry, repo, commit, files, part, target)
    return local_files(target)


def _begin(part: Path, commit: str) -> None:
    """A directory to collect in. What an earlier attempt left of another revision is thrown away."""
    mark = part / ".commit"
    if part.is_dir() and (not mark.is_file() or mark.read_text(encoding="utf-8") != commit):
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    mark.write_text(commit, encoding="utf-8")


def _finish(key: str, entry: dict, repo: Repo, commit: str, files: list[HubFile], part: Path, target: Path) -> None:
    """SOURCE.json, and the name under which the set is found."""
    described = [{"path": f.path, "bytes": f.bytes, "sha256": sha256(part / f.path)} for f in files]
    write_json(part / "SOURCE.json", {
        "key": key, "origin": page(repo), "downloaded_from": host(repo.hub), "revision": commit,
        "revision_asked": repo.revision, "licence": entry.get("licence"),
        "downloaded": datetime.now(UTC).isoformat(timespec="seconds"), "files": described,
    })  # fmt: skip
    for rest in part.glob(".*"):  # marks, and what ModelScope's library keeps for itself
        shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
    if target.is_dir():  # without a data file in it, but perhaps with somebody's notes
        for stray in target.iterdir():
            os.replace(stray, part / stray.name)
        target.rmdir()
    os.replace(part, target)


def source_of(directory: Path) -> dict | None:
    """SOURCE.json of data_raw/<key>/, or None where the files were laid there by hand."""
    return read_json(directory / "SOURCE.json")
