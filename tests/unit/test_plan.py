"""The scaling plan: its arithmetic by hand, and the tables of docs/scaling.md."""

from __future__ import annotations

import doctest
import math
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
sys.path.append(str(CHECKOUT / "scripts"))

import plan  # noqa: E402
from plan import Plan  # noqa: E402

DOCUMENT = (CHECKOUT / "docs" / "scaling.md").read_text(encoding="utf-8")
SMALL = Plan(
    events=2e6,
    items=10_000,
    requests=1_000,
    users=1e5,
    dim=10,
    probes=2,
    prepare_rows=1e5,
    scan_ivf=1e6,
    answers_a_core=100,
    search_small=1e-3,
    busy=0.5,
    machine_cores=4,
)


def row(section: str, what: str, given: Plan = SMALL) -> str:
    """Return the result of the one row of a section that begins so."""
    (found,) = (
        result for name, _, result in plan.SECTIONS[section](given) if name.startswith(what)
    )
    return found


def test_units() -> None:
    assert doctest.testmod(plan).failed == 0
    assert doctest.testmod(plan).attempted >= 4


def test_by_hand() -> None:
    # 2 M rows at 100 k/s.
    assert row("Prepare", "DuckDB") == "20 s"
    # 10,000 vectors of 10 numbers: 400 kB; with gradient and moments four times that.
    assert row("Item table", "vectors") == "400 kB"
    assert row("Item table", "with dense Adam") == "1.6 MB"
    assert row("Item table", "with row-wise Adagrad") == "440 kB"
    # 4 × √10,000 = 400 lists; 400 + 10,000 × 2 / 400 = 450 vectors a search, .45 ms.
    assert (SMALL.lists, SMALL.scanned, SMALL.search) == (400, 450, 450e-6)
    # 10 - 1 + .45 ms an answer; 105.8/s × 4 cores × .5 = 211.6/s: five servers for 1,000/s.
    assert pytest.approx(1 / 9.45e-3) == SMALL.answers
    assert SMALL.servers == 5
    # 20 events of 100 k people.
    assert row("State and log", "paths in LMDB") == plan.size(1e5 * 20 * SMALL.lmdb_bytes)


def test_twice_the_requests_need_twice_the_servers() -> None:
    assert Plan(requests=2e6).servers == pytest.approx(2 * Plan().servers, abs=1)


def test_a_limit_is_where_the_part_is_full() -> None:
    """At the number of items that the limit names, dense Adam takes just the room of a GPU."""
    (how,) = (h for w, h, _ in plan.limits(Plan()) if w.startswith("dense Adam"))
    room, each = re.fullmatch(r"([\d.]+) GB / (\d+) B", how).groups()  # type: ignore[union-attr]
    items = float(room) * 1e9 / float(each)
    assert 4 * Plan(items=items).table == pytest.approx(Plan().gpu_room, rel=0.01)
    assert Plan(items=math.floor(items * 0.99)).gpus == 1
    assert Plan(items=math.ceil(items * 1.01)).gpus == 2


def test_the_document_has_these_tables() -> None:
    told = "docs/scaling.md differs: python scripts/plan.py --document"
    assert plan.tables(Plan()) in DOCUMENT, told
    assert plan.basis() in DOCUMENT, told
    assert plan.summary(Plan()) in DOCUMENT, told


def test_every_figure_says_where_it_is_from() -> None:
    for one in fields(Plan)[3:]:
        assert one.metadata["kind"] in ("measured", "assumed")
        assert one.metadata["source"]


def test_measured_figures_stand_in_the_benchmarks() -> None:
    text = (CHECKOUT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for figure in ("1.54 M rows/s", "445 MB", "104,610", "2.84", "2,817"):
        assert figure in text
    for name in ("lmdb_bytes", "redis_bytes", "log_bytes", "answer_log_bytes"):
        assert f"| {getattr(Plan(), name):.1f} |" in text


def test_the_commands_of_the_documents(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = DOCUMENT + (CHECKOUT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python (scripts/plan.py .*)$", texts, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        plan.main()
        assert capsys.readouterr().out.startswith("### Prepare")


def test_own_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--events", "2e9", "--gpu-hour", "1"])
    plan.main()
    printed = capsys.readouterr().out
    assert "| 2 B / 1.54 M rows/s |" in printed
    assert "| that × $1 |" in printed
