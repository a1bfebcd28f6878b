"""
Look at this machine and say what stands in the way, with the remedy beside it. Changes nothing; needs no package.

    python scripts/doctor.py                the machine, the packages, the card
    python scripts/doctor.py --network      whether the hubs answer, too

Exit 0 if the demo and the tests can run here, 2 if something blocks them. Python 3.8 is enough to be told so.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OK, NOTE, BLOCKS = "ok", "note", "BLOCKS"
GIB = 2**30
# A line of the table: (state, what, found, remedy).


def python_lines():
    """The interpreter and where it comes from."""
    found = f"{platform.python_version()} ({sys.executable})"
    new_enough = sys.version_info >= (3, 11)
    remedy = ("TRL needs 3.11. Ubuntu 22.04: sudo add-apt-repository -y ppa:deadsnakes/ppa && sudo apt install -y "
              "python3.11 python3.11-venv; or: uv python install 3.11; or: conda create -n posttrain python=3.11")
    yield (OK, "python", found, "") if new_enough else (BLOCKS, "python", found, remedy)
    if (ROOT / ".venv").is_dir() and not sys.prefix.startswith(str(ROOT)):
        yield NOTE, "environment", "not .venv, which is there", "source scripts/setup_env.sh (or .venv/bin/python ...)"


def package_lines():
    """What is installed against the pins of requirements.txt."""
    missing, other, count = [], [], 0
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        pin = re.match(r"([A-Za-z0-9_.-]+)==([^\s#]+)", line)
        if not pin:
            continue
        count += 1
        try:
            version = importlib.metadata.version(pin[1]).split("+")[0]  # 2.13.0+cpu is 2.13.0
        except importlib.metadata.PackageNotFoundError:
            missing.append(pin[1])
            continue
        if version != pin[2]:
            other.append(f"{pin[1]} {version} (pinned: {pin[2]})")
    install = "pip install -r requirements.txt"
    if missing:
        yield BLOCKS, "packages", "missing: " + ", ".join(missing), install
    if other:
        yield NOTE, "packages", "other versions: " + ", ".join(other), install + " (only the pins were tried together)"
    if not missing and not other:
        yield OK, "packages", f"all {count} as pinned", ""


def cards():
    """[(name, GiB, driver, compute capability)] as nvidia-smi tells it; None if it cannot be run."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[part.strip() for part in line.split(",")] for line in out.stdout.decode().splitlines() if line.strip()]
    return [(name, float(mib) / 1024, driver, float(cap)) for name, mib, driver, cap in rows]


def card_lines():
    """The card, its driver, and whether this torch can use it."""
    found = cards()
    torch_there = importlib.util.find_spec("torch") is not None
    if not found:
        remedy = ("the demo and the tests run on the CPU, real training does not. Rented box: was it started with its "
                  "GPU? WSL2: the driver is installed in Windows, not in Linux")
        yield NOTE, "card", "no NVIDIA card (nvidia-smi does not answer)", remedy
        if torch_there:
            import torch

            yield OK, "torch", f"{torch.__version__}, {torch.get_num_threads()} threads", ""
        return
    for name, gib, driver, cap in found:
        yield OK, "card", f"{name}, {gib:.1f} GiB, driver {driver}, compute capability {cap}", ""
    name, gib, driver, cap = found[0]
    if cap >= 8.0:
        yield OK, "precision", "bf16", ""
    else:
        yield NOTE, "precision", "fp16: this card has no bf16", "nothing to do; hardware files for such cards say fp16"
    if torch_there:
        yield torch_line(name, driver, cap)
    if sys.version_info >= (3, 11) and importlib.util.find_spec("pydantic") and importlib.util.find_spec("yaml"):
        sys.path.insert(0, str(ROOT))
        from posttrain.config import pick_hardware

        yield OK, "hardware", f"`hardware: auto` takes configs/hardware/{pick_hardware((name, gib))}.yaml", ""


def torch_line(name, driver, cap):
    """Whether the installed torch and the card belong together."""
    import torch

    built = f"{torch.__version__}, built for CUDA {torch.version.cuda}"
    select = "choose the build at https://pytorch.org/get-started/locally for the CUDA version that nvidia-smi prints"
    if torch.version.cuda is None:
        return BLOCKS, "torch", f"{torch.__version__} is a CPU build, and there is a card", select
    if not torch.cuda.is_available():
        remedy = "a newer driver, or an older CUDA build of torch: " + select
        return BLOCKS, "torch", f"{built}; it does not reach the card with driver {driver}", remedy
    kernels = torch.cuda.get_arch_list()
    majors = {int(re.sub(r"\D", "", arch)[:-1]) for arch in kernels}
    if int(cap) not in majors and not any(arch.startswith("compute") for arch in kernels):
        return BLOCKS, "torch", f"{built}, without kernels for {name} (has {' '.join(kernels)})", select
    return OK, "torch", f"{built}, reaches the card", ""


def extra_lines():
    """What makes things faster or smaller."""
    if importlib.util.find_spec("flash_attn"):
        yield OK, "attention", "flash-attn is installed", ""
    else:
        yield OK, "attention", "sdpa (flash-attn is not installed; it is not needed)", ""


def memory_lines():
    """Memory and disk."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (ValueError, OSError, AttributeError):
        total = 0.0
    few = "merging a 4B base needs about 10 GiB, a 7B base 17 GiB; export the adapter alone, or add swap"
    yield (OK, "memory", f"{total:.1f} GiB", "") if total >= 16 else (NOTE, "memory", f"{total:.1f} GiB", few)
    for what, path in (("disk, project", ROOT), ("disk, bases", hub_home())):
        there = next(p for p in [path] + list(path.parents) if p.exists())
        free = shutil.disk_usage(str(there)).free / GIB
        found = f"{free:.1f} GiB free at {there}"
        if free < 2:
            yield BLOCKS, what, found, "free some space: even the demo needs 1 GiB"
        elif free < 30:
            remedy = "a 4B base takes 8 GiB, its merged copy 8 GiB; HF_HOME and output_dir may name another disk"
            yield NOTE, what, found, remedy
        else:
            yield OK, what, found, ""
    if not os.access(str(ROOT), os.W_OK):
        yield BLOCKS, "project", f"{ROOT} is not writable", "copy the project to a directory of your own"
    if "microsoft" in platform.release().lower() and str(ROOT).startswith("/mnt/"):
        yield NOTE, "WSL2", "the project lies on a Windows drive", "reading it is slow; clone it into the Linux home"


def hub_home():
    """Where downloaded bases are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface")


def hub_lines(network):
    """Bases on disk, the endpoint, the login."""
    cached = sorted(p.name[8:].replace("--", "/") for p in (hub_home() / "hub").glob("models--*"))
    yield OK, "bases on disk", ", ".join(cached) or f"none in {hub_home()}", ""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    shown = re.sub(r"//[^/@]*@", "//", endpoint)
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    if offline:
        yield NOTE, "hub", "HF_HUB_OFFLINE is set: nothing is downloaded", "unset HF_HUB_OFFLINE, to download"
    else:
        yield OK, "hub", shown + ("" if network else " (not asked; --network asks)"), ""
    token = "HF_TOKEN" in os.environ or (hub_home() / "token").is_file()
    yield OK, "login", "a token is set" if token else "none (only gated sets need one: hf auth login)", ""
    if network and not offline:
        yield reach("huggingface", endpoint, shown)
        yield reach("modelscope", "https://modelscope.cn", "https://modelscope.cn")


def reach(hub, address, shown):
    """Whether a hub answers, and how fast."""
    began = time.time()
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError) as error:
        remedy = "source scripts/setup_env.sh --mirror https://hf-mirror.com, or hub: modelscope, or lay files by hand"
        reason = getattr(error, "reason", error)
        return NOTE, hub, f"{shown} does not answer ({reason})", remedy
    return OK, hub, f"{shown} answers in {time.time() - began:.1f} s", ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="store_true", help="ask the hubs whether they answer")
    parser.add_argument("--dry-run", nargs="?", help="accepted as everywhere; this only looks in any case")
    args = parser.parse_args()
    lines = []
    for group in (python_lines, package_lines, card_lines, extra_lines, memory_lines):
        lines.extend(group())
    lines.extend(hub_lines(args.network))
    width = max(len(what) for _, what, _, _ in lines)
    table = []
    for state, what, found, remedy in lines:
        table.append(f"{state:<6}  {what:<{width}}  {found}")
        table += [f"{'':<6}  {'':<{width}}  -> {remedy}"] if remedy else []
    blocking = sum(state == BLOCKS for state, _, _, _ in lines)
    print("\n".join([*table, "", f"{blocking} of these block the demo (exit 2)" if blocking else "nothing blocks"]))
    return 2 if blocking else 0


if __name__ == "__main__":
    sys.exit(main())
