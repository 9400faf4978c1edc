"""How fast this device multiplies large matrices: what model FLOP/s are held against."""

from __future__ import annotations

import json
import platform
import statistics
import sys

import torch
from step_clock import moment


def rate(device: str, dtype: torch.dtype, size: int, repeats: int = 10, blocks: int = 5) -> float:
    """Return the median FLOP/s of blocks of square products of random numbers."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = left @ right
    spent = []
    # The first block only warms up.
    for _ in range(blocks + 1):
        began = moment()
        for _ in range(repeats):
            torch.mm(left, right, out=out)
        spent.append(moment() - began)
    return 2 * size**3 * repeats / statistics.median(spent[1:])


def main() -> None:
    """Print the rate in the number format that `trainer=gpu` or `trainer=cpu` trains in."""
    gpu = sys.argv[1] == "gpu"
    name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    given = ("cuda", torch.bfloat16, 8192) if gpu else ("cpu", torch.float32, 768)
    facts = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    matrices = {"format": str(given[1]).removeprefix("torch."), "size": given[2]}
    print(json.dumps({**facts, **matrices, "matrix_flops": rate(*given)}))


if __name__ == "__main__":
    main()
