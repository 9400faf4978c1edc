"""One answer in the terminal, from a bundle, with no server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from recsys.serving.engine import Engine
from recsys.serving.messages import RecommendRequest, converted


def ask(path: Path, **request: Any) -> tuple[dict[str, Any], Path]:
    """Answer one request as the server would; return the answer as plain values, and the bundle.

    Raises InputError where the bundle or the request is wrong.
    """
    given = {name: value for name, value in request.items() if value is not None}
    answer = Engine.load(path).recommend([converted(given, RecommendRequest)])[0]
    return msgspec.to_builtins(answer), path


def answer_table(answer: dict[str, Any], title: str = "Recommended") -> None:
    """Print an answer's items with their titles and scores."""
    table = Table(title=f"{title} ({answer['source']}, {answer['bundle']})")
    extra = [c for c in ("title", "category") if any(c in item for item in answer["items"])]
    for column in ("item_id", *extra, "score"):
        table.add_column(column, justify="right" if column == "score" else "left")
    for item in answer["items"]:
        cells = (str(item.get(column, "")) for column in extra)
        table.add_row(item["item_id"], *cells, f"{item['score']:.3f}")
    Console().print(table)
    if ignored := answer.get("ignored"):
        Console().print(f"Not known and ignored: {', '.join(ignored['first_items'])}")
