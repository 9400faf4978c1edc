"""Files as a bad disk or a broken copy leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq


def damage(file: Path, group: int, columns: Sequence[str] = ()) -> None:
    """Overwrite the pages of a row group of a Parquet file; its footer stays.

    columns: () for all.
    """
    said = pq.read_metadata(file).row_group(group)
    with file.open("r+b") as stream:
        for place in range(said.num_columns):
            column = said.column(place)
            if columns and column.path_in_schema not in columns:
                continue
            pages = (column.dictionary_page_offset, column.data_page_offset)
            start = min(offset for offset in pages if offset is not None)
            stream.seek(start)
            stream.write(b"\xff" * column.total_compressed_size)
