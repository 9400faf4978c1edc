"""Memory of a training: large CPU buffers are kept between steps, and what to do without enough."""

from __future__ import annotations

import ctypes
import math
import re
import resource
import sys

import torch
from omegaconf import DictConfig

from recsys.schema import InputError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEPT_BYTES = 1 << 30


def keep_large_buffers() -> bool:
    """Tell glibc's allocator to reuse big blocks; return whether this system could be told.

    Without it every step's logits are mapped, zeroed and unmapped again, which costs more than a
    third of a CPU training step (mallopt(3)).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: KEPT_BYTES, M_TOP_PAD: 64 << 20}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])  # noqa: C419 (every setting is tried)


def peak_memory_gib() -> float:
    """Return the most memory this process has held so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = r"([\d.]+) (bytes|[KMGT]iB)"


def out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of a GPU, of torch on a CPU, or of numpy."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def what_to_lower(error: BaseException, config: DictConfig) -> InputError:
    """Return an error that says which setting to lower, and to what."""
    factor = _times_too_much(str(error))
    said = next((line for line in str(error).splitlines() if re.search(SIZE, line)), str(error))
    lower = [f"batches.size={max(1, config.batches.size // factor)} (now {config.batches.size})"]
    for name in ("chunk", "negatives"):
        if name in (config.get("loss") or {}):
            lower.append(f"loss.{name}={max(1, config.loss[name] // factor)}")
    return InputError(
        f"out of memory: {said[:300]}\nLower {', then '.join(lower)}; "
        f"trainer.accumulate_grad_batches={factor} with the smaller batch keeps what a step sees. "
        "A smaller model.dim or model.max_length takes less, too"
    )


def _times_too_much(said: str) -> int:
    """Return by which power of two the memory asked for is too much, at least 2.

    >>> _times_too_much("Tried to allocate 20.00 GiB. ... of which 4.00 GiB is free.")
    8
    """
    asked = re.search(rf"allocate {SIZE}", said)
    free = re.search(rf"of which {SIZE} is free", said)
    if not asked or not free:
        return 2
    wanted, there = (float(m[1]) * UNITS[m[2]] for m in (asked, free))
    return int(2 ** max(1, math.ceil(math.log2(wanted / max(1.0, there)))))
