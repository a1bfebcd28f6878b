"""
Where the work is done: in this process, in several on this machine, or on a Ray cluster. One function, many jobs.

A job is (what is its own, *what all jobs share); of the shared things a cluster is sent one copy. Whatever ends the
work early (Ctrl-C, a fault, kill -9 of the parent) ends the workers at once: they leave at most half a part, which the
next run makes again.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.config import ROOT
from posttrain.errors import UserFault, WontFit

Map = Callable[[Callable[..., Any], Iterable[tuple]], Iterator[Any]]

ENDINGS = (signal.SIGINT, signal.SIGTERM)
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
KILLED = (
    "a worker process was killed; most often the machine ran out of memory (dmesg says so)\n"
    "  the same command goes on: what is done is not done again\n"
    "  fewer processes: --set workers=1; smaller pieces, which are all made anew: --set block_mib=1"
)


@contextmanager
def workers(executor: str, count: int, ray_address: str = "auto") -> Iterator[Map]:
    """Gives map(function, jobs): the results of function(*job) in the order of the jobs, which are made a few ahead of
    what is done and no more.

    count: processes, 0 for one per core (with ray: tasks at a time, 0 for as many as the cluster has cores).
    What a function raises arrives as it was raised. WontFit: a worker was killed.
    """
    if executor == "ray":
        with _on_ray(count, ray_address) as mapped:
            yield mapped
    elif (count or cores()) == 1:
        yield lambda function, jobs: (function(*job) for job in jobs)
    else:
        with _on_processes(count or cores()) as mapped:
            yield mapped


def cores() -> int:
    """Cores that this process may use: of a container with a share of a large machine, its share."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def _ahead(submit: Callable, result: Callable, jobs: Iterable[tuple], ahead: int) -> Iterator[Any]:
    waiting: deque = deque()
    for job in jobs:
        waiting.append(submit(job))
        if len(waiting) >= ahead:
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())


# ------------------------------------------------------------------ processes of this machine


@contextmanager
def _on_processes(count: int) -> Iterator[Map]:
    # Forked children begin with the imports of the parent. macOS has libraries that do not survive a fork.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_ready)
    others, own = set(multiprocessing.active_children()), set()

    def submit(function: Callable[..., Any], *arguments: Any) -> Future:
        # Blocked while processes start: a Ctrl-C in this moment is the parent's, and not a child's that is half made.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
        try:
            future = pool.submit(function, *arguments)
            if len(own) < count:
                own.update(set(multiprocessing.active_children()) - others)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
        return future

    try:
        submit(int)  # forks now, before a progress bar starts its thread
        yield lambda function, jobs: _ahead(lambda job: submit(_call, function, *job), Future.result, jobs, 2 * count)
    except BaseException as error:
        for process in own:
            process.kill()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise WontFit(KILLED) from None
        raise
    pool.shutdown()


def _ready() -> None:
    """In a new worker: signals are the parent's affair, and it does not outlive its parent."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(function: Callable[..., Any], *job: Any) -> Any:
    """In a worker. An exception that cannot travel would look like a killed process."""
    try:
        return function(*job)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise


# ------------------------------------------------------------------ a Ray cluster


@contextmanager
def _on_ray(count: int, address: str) -> Iterator[Map]:
    """Tasks on a Ray cluster; those of a node that dies are run again elsewhere. All nodes see one directory with the
    project and its data, under one path: nothing is uploaded."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when a cluster starts: no telemetry
    try:
        import ray
    except ImportError:
        raise UserFault("executor: ray: it is not installed\n  pip install -r requirements-cluster.txt; or "
                        "--set executor=local") from None  # fmt: skip
    connected = ray.is_initialized()
    if not connected:
        _connect(ray, count, address)
    ahead = count or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}

    def mapped(function: Callable[..., Any], jobs: Iterable[tuple]) -> Iterator[Any]:
        task = ray.remote(num_cpus=1, max_retries=5, runtime_env=environment)(_call)
        sent: dict[int, tuple] = {}  # id -> (the object, which keeps its id its own; its reference)

        def submit(job: tuple) -> Any:
            for shared in job[1:]:
                if id(shared) not in sent:
                    sent[id(shared)] = shared, ray.put(shared)
            return task.remote(function, job[0], *(sent[id(shared)][1] for shared in job[1:]))

        return _ahead(submit, ray.get, jobs, ahead)

    try:
        yield mapped
    except ray.exceptions.RayTaskError as error:
        raise _cause(error) from None
    except ray.exceptions.RayError as error:
        raise WontFit(f"the Ray cluster gave up a task: {type(error).__name__}: {_first_line(error)}\n"
                      "  the same command goes on: what is done is not done again") from None  # fmt: skip
    finally:
        if not connected:
            ray.shutdown()  # ends the tasks that are under way


def _connect(ray: Any, count: int, address: str) -> None:
    own = {"num_cpus": count or cores(), "include_dashboard": False} if address == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)  # ray.init puts its own there
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserFault(f"ray_address: {address}: no Ray cluster of this version answers: {_first_line(error)}\n"
                        "  start one with .venv/bin/ray start --head (docs/scale.md), or --set ray_address=local"
                        ) from None  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, handler)


def _knock(address: str) -> None:
    """OSError if nobody listens at host:port; ray.init tries for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=5).close()


def _cause(error: Any) -> Exception:
    """What a task raised on its node."""
    cause = error.cause
    if isinstance(cause, FileNotFoundError):
        return UserFault(f"{cause.filename}: not there on a node of the cluster\n"
                         "  executor: ray needs the project, raw_dir and output_dir on a file system that all nodes "
                         "see under the same path; or --set executor=local")  # fmt: skip
    return cause if isinstance(cause, Exception) else error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
