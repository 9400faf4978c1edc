"""Whether sharded tables can be trained here."""

from __future__ import annotations

from recsys.schema import InputError
from recsys.training.shards import check_torchrec


def lacking() -> str:
    """Return what is missing for it, or nothing."""
    try:
        check_torchrec()
    except InputError as error:
        return f"make sharded: {error}"
    return ""
