"""Cards as the forecast sees them: what a process takes before any tensor, and which attention kernels there are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """context: GiB of CUDA context and loaded kernels in a training process. flash: whether PyTorch has flash attention
    kernels for it (Ampere, sm80, and newer). measured: whether the context was measured on such a card."""

    name_contains: str
    context: float
    flash: bool = True
    measured: bool = False


CUBLAS_GIB = 32 / 1024  # workspace of cuBLAS, allocated through PyTorch: 8.1 MiB before Hopper, 32 on it, and leftovers
CPU_PROCESS_GIB = 0.75  # Python with torch, transformers, trl and datasets loaded: docs/forecast.md

# Only the T4's context was measured (141 MiB, 35 runs, research/memory.md); newer cards take more, about 0.3 GB by
# PyTorch's own developers (pytorch issue 107667), and half a GiB is booked for them.
CARDS = [
    Card("T4", 0.14, flash=False, measured=True),
    Card("V100", 0.5, flash=False),
    Card("GTX", 0.5, flash=False),
    Card("RTX 20", 0.5, flash=False),
    Card("RTX 3050", 0.3),
    Card("RTX 30", 0.4),
    Card("RTX 4090", 0.5),
    Card("RTX 5090", 0.5),
    Card("A100", 0.5),
    Card("H100", 0.5),
    Card("H200", 0.5),
]
UNKNOWN = Card("", 0.5)


def card_named(name: str | None) -> Card:
    """The card whose name is part of `name`; one of the newer ones where none is."""
    return next((card for card in CARDS if name and card.name_contains in name), UNKNOWN)
