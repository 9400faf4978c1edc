"""What a shop of a given size needs: memory, time, machines and money, with the arithmetic.

    python scripts/plan.py --events 1e9 --items 1e8 --requests 1e6

Multiplies figures that docs/benchmarks.md measured on 2 cores; where it assumes, it says so. Prints
the tables of docs/scaling.md for your numbers. Any measured or assumed figure can be replaced by
yours, as in `--answers-a-core 2000 --gpu-hour 2.5`; --help lists them.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields

FLOAT, ID, HOUR, DAY = 4, 8, 3_600, 86_400
STEP = 6_400
"""Positions a training step: 128 histories of 50, as measured."""
Row = tuple[str, str, str]


def measured(value: float, source: str) -> float:
    """Return a field that stands for a measurement."""
    return field(default=value, metadata={"kind": "measured", "source": source})


def assumed(value: float, source: str) -> float:
    """Return a field that stands for an assumption."""
    return field(default=value, metadata={"kind": "assumed", "source": source})


@dataclass(frozen=True)
class Plan:
    """How much there is, what was measured, and what is assumed."""

    events: float = 1e9
    items: float = 1e8
    requests: float = 1e6

    users: float = assumed(5e7, "people: 20 events each of 1 B")
    dim: float = assumed(64, "numbers a vector, as the shipped configs have it")
    mean: float = assumed(0.3, "share of the peak that a day has on average")
    posts: float = assumed(0.04, "events posted a request: 1 B a day at that mean")
    path_events: float = assumed(50, "events kept of each person")
    lists_a_root: float = assumed(4, "IVF lists a root of the number of items")
    probes: float = assumed(32, "lists looked through; tuned at build, on your vectors")
    pq_bytes: float = assumed(16, "bytes of a PQ code; recall to be measured at build")
    busy: float = assumed(0.6, "share of a machine's answers at saturation that is planned for")
    machine_cores: float = assumed(64, "cores of a server")
    machine_gib: float = assumed(256, "memory of a server, GiB")
    gpu_gib: float = assumed(80, "memory of a GPU, GiB")
    gpu_bandwidth: float = assumed(3e12, "bytes/s that a GPU's memory moves")
    gpu_low: float = assumed(1e6, "positions/s of a GPU, low: not measured")
    gpu_high: float = assumed(5e6, "positions/s of a GPU, high: not measured")
    redis_reads: float = assumed(1e5, "reads/s of one Redis process, pipelined")
    request_bytes: float = assumed(500, "of a request, with its headers")
    answer_bytes: float = assumed(1_500, "of an answer of ten items, with its headers")
    core_hour: float = assumed(0.04, "$ for a core and its 4 GiB for an hour")
    gpu_hour: float = assumed(3.0, "$ for a GPU for an hour")
    gb_month: float = assumed(0.023, "$ to keep a GB for a month")

    prepare_rows: float = measured(1.54e6, "rows/s, DuckDB; Prepare, 2026-11-21")
    parquet_bytes: float = measured(22.25, "an event in Parquet, 445 MB / 20 M; Prepare")
    positions: float = measured(104_610, "positions/s, 100 k items; --scale, 2026-11-22")
    quick_step: float = measured(0.061, "s a step, 100 k items, Adam; --scale, 2026-11-22")
    slow_step: float = measured(2.84, "s a step, 5 M items, dense Adam; --scale, 2026-11-22")
    scan_exact: float = measured(90.9e6, "vectors/s, exact, 1 M in 11 ms; FAISS, 2026-11-21")
    scan_ivf: float = measured(62.7e6, "vectors/s, IVF, 11,908 in .19 ms; FAISS, 2026-11-21")
    build_ivf: float = measured(18e-6, "s a vector, 4,096 lists, 1 M in 18 s; FAISS, 2026-11-21")
    answers_a_core: float = measured(1_408, "answers/s, 2,817 on 2 cores; Serving, 2026-11-22")
    search_small: float = measured(84e-6, "s of IVF in such an answer; FAISS, 2026-11-21")
    lmdb_bytes: float = measured(126.3, "an event of a path in LMDB; Bytes, 2026-11-22")
    redis_bytes: float = measured(85.2, "an event of a path in Redis; Bytes, 2026-11-22")
    log_bytes: float = measured(29.1, "an event in the Parquet log; Bytes, 2026-11-22")
    answer_log_bytes: float = measured(113.3, "an answer of ten there; Bytes, 2026-11-22")

    @property
    def table(self) -> float:
        """Bytes of the item vectors."""
        return self.items * self.dim * FLOAT

    @property
    def lists(self) -> int:
        """Lists of the IVF index."""
        return round(self.lists_a_root * math.sqrt(self.items))

    @property
    def gpus(self) -> int:
        """GPUs that hold the table with dense Adam's gradient and moments."""
        return math.ceil(4 * self.table / self.gpu_room)

    @property
    def gpu_room(self) -> float:
        """Bytes of a GPU for the table; a fifth is for the rest."""
        return 0.8 * self.gpu_gib * 2**30

    @property
    def scanned(self) -> float:
        """Vectors that one search reads: the lists' centres, and the lists looked through."""
        return self.lists + self.items * self.probes / self.lists

    @property
    def search(self) -> float:
        """Seconds of a core for one search."""
        return self.scanned / self.scan_ivf

    @property
    def answers(self) -> float:
        """Answers/s of a core, with the larger index in the place of the measured one."""
        return 1 / (1 / self.answers_a_core - self.search_small + self.search)

    @property
    def servers(self) -> int:
        """Machines for the requests."""
        return math.ceil(self.requests / (self.answers * self.busy * self.machine_cores))


def si(number: float) -> str:
    """Return a count as a person writes it.

    >>> si(1e9), si(104_610), si(41.5), si(0.5)
    ('1 B', '105 k', '41.5', '0.5')
    """
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def size(number: float) -> str:
    """Return bytes as a person writes them, in decimal units.

    >>> size(25.6e9), size(128)
    ('25.6 GB', '128 B')
    """
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.3g} B"


def span(seconds: float) -> str:
    """Return a time as a person writes it.

    >>> span(649), span(0.0019), span(200_000)
    ('10.8 min', '1.9 ms', '2.31 days')
    """
    for unit, name in ((DAY, "days"), (HOUR, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"


def dollars(amount: float) -> str:
    """Return a price.

    >>> dollars(0.0144), dollars(1234.6)
    ('$0.014', '$1,235')
    """
    return f"${amount:,.0f}" if amount >= 10 else f"${amount:.2g}"


def prepare(p: Plan) -> Iterator[Row]:
    """Event log → dataset."""
    n, seconds = si(p.events), p.events / p.prepare_rows
    yield "log as Parquet", f"{n} × {p.parquet_bytes:.4g} B", size(p.events * p.parquet_bytes)
    yield "dataset: item, type, moment, value", f"{n} × (4 + 1 + 8 + 4) B", size(p.events * 17)
    yield "DuckDB, 2 cores", f"{n} / {si(p.prepare_rows)} rows/s", span(seconds)
    cost = seconds / HOUR * 2 * p.core_hour
    yield "cost", f"{span(seconds)} × 2 cores × {dollars(p.core_hour)}", dollars(cost)


def table(p: Plan) -> Iterator[Row]:
    """Item vectors in training."""
    cells, adam, adagrad = f"{si(p.items)} × {p.dim:.0f}", 4 * p.table, p.table + p.items * FLOAT
    narrow = f"{si(p.items)} × ({p.dim:.0f} + 1) × 4 B"
    yield "vectors, fp32", f"{cells} × 4 B", size(p.table)
    yield "with dense Adam: gradient, two moments", f"{cells} × 16 B", size(adam)
    yield "with row-wise Adagrad: a number a row", narrow, size(adagrad)
    yield "GPUs for dense Adam", f"{size(adam)} / {size(p.gpu_room)}", f"{p.gpus}"
    wide = math.ceil(adagrad / p.gpu_room)
    yield "GPUs for row-wise Adagrad", f"{size(adagrad)} / {size(p.gpu_room)}", f"{wide}"


def train(p: Plan) -> Iterator[Row]:
    """Dataset → run: a step, an epoch."""
    n, moved, more = si(p.events), 7 * p.table, p.slow_step - p.quick_step
    dense, cpu = p.quick_step + more * p.items / 5e6, p.events / p.positions
    steps, slow, quick = p.events / STEP, p.events / p.gpu_low, p.events / p.gpu_high
    yield "dense Adam moves, a step", f"7 × {size(p.table)}: reads 4, writes 3", size(moved)
    how = f"{p.quick_step:.3g} s + {more:.3g} s × {si(p.items)} / 5 M"
    yield "dense Adam, a step, 2 cores", how, span(dense)
    how = f"{n} / {STEP:,} × {span(dense)}"
    yield "dense Adam, an epoch, 2 cores", how, span(steps * dense)
    how = f"{size(moved)} / ({p.gpus} × {size(p.gpu_bandwidth)}/s)"
    yield (
        "dense Adam, a step, on the GPUs that hold it",
        how,
        span(moved / p.gpus / p.gpu_bandwidth),
    )
    how = f"2 × {STEP:,} rows × {p.dim * FLOAT:.0f} B × 3"
    yield "row-wise Adagrad moves, a step, at most", how, size(6 * STEP * p.dim * FLOAT)
    how = f"{n} / {si(p.positions)} positions/s"
    yield "an epoch, 2 cores, the table left out", how, span(cpu)
    how = f"{span(cpu)} × 2 cores × {dollars(p.core_hour)}"
    yield "cost", how, dollars(cpu / HOUR * 2 * p.core_hour)
    how = f"{n} / ({si(p.gpu_low)} to {si(p.gpu_high)} positions/s)"
    yield "an epoch, one GPU (**not measured**)", how, f"{span(quick)} to {span(slow)}"
    low, high = (dollars(seconds / HOUR * p.gpu_hour) for seconds in (quick, slow))
    yield "cost, one GPU", f"that × {dollars(p.gpu_hour)}", f"{low} to {high}"


def index(p: Plan) -> Iterator[Row]:
    """Vectors → index."""
    n, lists = si(p.items), si(p.lists)
    each = {"IVF flat, fp32": p.dim * FLOAT, "IVF, SQ8": p.dim, "IVF, PQ": p.pq_bytes}
    for name, code in each.items():
        yield name, f"{n} × ({code:.0f} + {ID}) B", size(p.items * (code + ID))
    yield "exact search, a core", f"{n} / {si(p.scan_exact)}/s", span(p.items / p.scan_exact)
    how = f"{lists} + {n} × {p.probes:.0f} / {lists}"
    yield "vectors that an IVF search reads", how, si(p.scanned)
    yield "IVF search, a core", f"{si(p.scanned)} / {si(p.scan_ivf)}/s", span(p.search)
    build = p.items * p.build_ivf * p.lists / 4_096
    how = f"{n} × {span(p.build_ivf)} × {lists} / 4,096 lists"
    yield "building IVF", how, span(build)
    cost = build / HOUR * 2 * p.core_hour
    yield "cost", f"{span(build)} × 2 cores × {dollars(p.core_hour)}", dollars(cost)


def serve(p: Plan) -> Iterator[Row]:
    """Bundle → answers, at the peak."""
    answer, rate = 1 / p.answers_a_core, p.answers * p.busy * p.machine_cores
    how = f"{span(answer)} - {span(p.search_small)} + {span(p.search)}"
    yield "an answer, a core", how, span(1 / p.answers)
    yield "answers/s of a core", f"1 / {span(1 / p.answers)}", si(p.answers)
    how = f"{si(p.answers)} × {p.machine_cores:.0f} cores × {p.busy}"
    yield "answers/s of a server", how, si(rate)
    yield "servers", f"{si(p.requests)} / {si(rate)}", f"{p.servers:,}"
    code = p.items * (p.dim + ID)
    how = f"{size(code)} + {size(p.table)}"
    yield "memory of each: SQ8 index, vectors mapped", how, size(code + p.table)
    traffic = p.requests * (p.request_bytes + p.answer_bytes)
    how = f"{si(p.requests)} × ({p.request_bytes:.0f} + {p.answer_bytes:,.0f}) B/s"
    yield "network", how, f"{size(traffic)}/s"
    gbit = traffic * 8 / p.servers / 1e9
    yield "network of a server", f"{size(traffic)}/s × 8 / {p.servers}", f"{gbit:.2g} Gbit/s"
    cost = p.servers * p.machine_cores * p.core_hour
    how = f"{p.servers:,} × {p.machine_cores:.0f} cores × {dollars(p.core_hour)}"
    yield "cost, an hour", how, dollars(cost)
    answers = p.requests * HOUR
    how = f"{dollars(cost)} / {si(answers)} × 1 M"
    yield "cost, a million answers at the peak", how, dollars(cost / answers * 1e6)


def state(p: Plan) -> Iterator[Row]:
    """What people do, and what was answered."""
    length = min(p.path_events, p.events / p.users)
    people, kept = f"{si(p.users)} × {length:.3g} events", p.users * length
    yield "paths in LMDB", f"{people} × {p.lmdb_bytes:.4g} B", size(kept * p.lmdb_bytes)
    yield "paths in Redis", f"{people} × {p.redis_bytes:.4g} B", size(kept * p.redis_bytes)
    readers = math.ceil(p.requests / p.redis_reads)
    yield "Redis processes to read them", f"{si(p.requests)} / {si(p.redis_reads)}", f"{readers:,}"
    answers = p.requests * p.mean * DAY
    yield "answers, a day", f"{si(p.requests)}/s × {p.mean:.2g} × 86,400 s", si(answers)
    posts = answers * p.posts
    yield "events posted, a day", f"{si(answers)} × {p.posts:.2g}", si(posts)
    logged, told = posts * p.log_bytes, answers * p.answer_log_bytes
    yield "event log, a day", f"{si(posts)} × {p.log_bytes:.4g} B", size(logged)
    yield "answer log, a day", f"{si(answers)} × {p.answer_log_bytes:.4g} B", size(told)
    cost = (logged + told) * 30 / 1e9 * p.gb_month
    how = f"30 × {size(logged + told)} × {dollars(p.gb_month)}/GB"
    yield "cost to keep both for 30 days, a month", how, dollars(cost)


def limits(p: Plan) -> Iterator[Row]:
    """The size at which each part outgrows one machine, and what takes over."""
    host, device, vector = 0.8 * p.machine_gib * 2**30, p.gpu_room, p.dim * FLOAT
    how, rows = f"8 h × {si(p.prepare_rows)} rows/s", 8 * HOUR * p.prepare_rows
    yield "DuckDB, 2 cores, a night → more cores, then Spark", how, f"{si(rows)} events"
    how = f"{size(device)} / {4 * vector:.0f} B"
    yield "dense Adam in a GPU → row-wise", how, f"{si(device / 4 / vector)} items"
    how = f"{size(device)} / {vector + FLOAT:.0f} B"
    yield "row-wise Adagrad in a GPU → sharded", how, f"{si(device / (vector + FLOAT))} items"
    how = f"10 ms × {si(p.scan_exact)}/s"
    yield "exact search within 10 ms → IVF", how, f"{si(0.01 * p.scan_exact)} items"
    how = f"{size(host)} / (2 × {vector:.0f} + {ID}) B"
    yield "IVF flat in a server → SQ8", how, f"{si(host / (2 * vector + ID))} items"
    how = f"{size(host)} / ({vector:.0f} + {p.dim:.0f} + {ID}) B"
    yield "SQ8 in a server → PQ, shards", how, f"{si(host / (vector + p.dim + ID))} items"
    how = f"{si(p.answers)} × {p.machine_cores:.0f} cores × {p.busy}"
    rate = p.answers * p.machine_cores * p.busy
    yield "one server → replicas, Redis", how, f"{si(rate)} requests/s"
    how = f"{size(host)} / ({p.path_events:.0f} × {p.redis_bytes:.4g} B)"
    people = host / p.path_events / p.redis_bytes
    yield "paths in one machine's Redis → a cluster", how, f"{si(people)} people"


SECTIONS = {
    "Prepare": prepare,
    "Item table": table,
    "Train": train,
    "Index": index,
    "Serve": serve,
    "State and log": state,
    "Where one machine ends": limits,
}


SUMMARY = """\
| step | memory | time or machines | cost | engine |
|---|---|---|---|---|
| prepare | 2 GB by setting | {Prepare/DuckDB}, 2 cores | {Prepare/cost} | DuckDB |
| an epoch | {Item table/with row-wise} for the table | {Train/an epoch, one GPU}, one GPU (**not \
measured**) | {Train/cost, one GPU} | row-wise Adagrad; sharded past one device |
| index | {Index/IVF, SQ8} as SQ8 | {Index/building}, 2 cores | {Index/cost} | FAISS IVF |
| serve, at the peak | {Serve/memory} a server | {Serve/servers} servers | {Serve/cost, an hour} \
an hour | replicas behind a balancer |
| paths | {State and log/paths in Redis} | {State and log/Redis} Redis processes \
| not reckoned | Redis |
| logs | {State and log/answer log} a day on disk | with the servers | {State and log/cost} \
a month | Parquet |"""


def summary(p: Plan) -> str:
    """Return what each step needs as Markdown: memory, time or machines, cost, engine."""

    def result(met: re.Match[str]) -> str:
        rows = SECTIONS[met[1]](p)
        return next(found for what, _, found in rows if what.startswith(met[2]))

    return re.sub(r"\{([^/]+)/([^}]+)\}", result, SUMMARY)


def tables(plan: Plan) -> str:
    """Return every section as Markdown."""
    parts = []
    for title, rows in SECTIONS.items():
        lines = [f"### {title}", "", "| what | arithmetic | |", "|---|---|---|"]
        lines += [f"| {what} | {how} | {result} |" for what, how, result in rows(plan)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def basis() -> str:
    """Return the measured and the assumed figures as Markdown."""
    parts = []
    for kind in ("measured", "assumed"):
        lines = [f"### {kind.capitalize()}", "", "| `--` | figure | what it is |", "|---|---|---|"]
        lines += [
            f"| {_flag(one)} | {one.default:,.10g} | {one.metadata['source']} |"
            for one in fields(Plan)
            if one.metadata.get("kind") == kind
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _flag(one: Field[float]) -> str:
    return one.name.replace("_", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    for one in fields(Plan):
        about = one.metadata.get("source", "how much there is")
        parser.add_argument(f"--{_flag(one)}", type=float, default=one.default, help=about)
    parser.add_argument("--document", action="store_true", help="all of docs/scaling.md's tables")
    given = vars(parser.parse_args())
    if given.pop("document"):
        print(summary(Plan(**given)), basis(), sep="\n\n", end="\n\n")
    print(tables(Plan(**given)))


if __name__ == "__main__":
    main()
