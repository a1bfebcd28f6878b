"""
bitsandbytes, imported without PyTorch's compiler.

PEFT imports bitsandbytes for every adapter, also on a base that is not quantised, and bitsandbytes 0.50 wraps four
functions in torch.compile while it is imported, which loads dynamo and inductor: 1.5 to 2 CPU seconds at every start
(bench/eval.py). Here they are compiled when one of them is first called, with the same arguments.
"""

import functools
import sys
from collections.abc import Callable

import torch


def import_bitsandbytes() -> None:
    """Import it once, where it is installed; later imports find it loaded."""
    if "bitsandbytes" in sys.modules:
        return
    compile_now, torch.compile = torch.compile, _compile_later(torch.compile)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        pass  # PEFT does without it as well
    finally:
        torch.compile = compile_now


def _compile_later(compile_now: Callable) -> Callable:
    """A torch.compile that returns at once and compiles at the first call."""

    def later(function=None, **how):
        if function is None:
            return functools.partial(later, **how)

        @functools.cache
        def compiled():
            return compile_now(function, **how)

        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    return later
