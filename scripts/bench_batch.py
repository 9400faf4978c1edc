"""Time `recsys recommend --all-users` on a made-up shop: people a second and peak memory.

    python scripts/bench_batch.py                           # 1 M users × 100 k items, top 50
    python scripts/bench_batch.py --ways index exact --kill # beside exact search; killed half-way

Each way is a process of its own, its loading and manifest included in the time. Memory: `peak_mib`
is all that was mapped in, the events' pages too, which the system may drop; `own_mib` is what it
may not. --kill sends SIGKILL when half of the parts are there, starts again and compares.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from bench.big_bundle import big_bundle
from recsys.artifacts import read_manifest

Json = dict[str, Any]
WAYS: dict[str, list[str]] = {
    "index": [],
    "exact": ["--exact"],
    "one thread": ["--threads", "1"],
}
"""What each measured way adds to the command."""
NOW = "1720000000"


def started(bundle: Path, out: Path, given: argparse.Namespace, way: str) -> psutil.Popen:
    typed = [sys.executable, "-m", "recsys.cli", "recommend", "--all-users", str(bundle), "--json"]
    typed += ["--out", str(out), "--top-k", str(given.top_k), "--now", NOW, *WAYS[way]]
    if given.listed:
        typed += ["--users", str(given.listed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    return psutil.Popen(typed, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, text=True)


def watched(process: psutil.Popen) -> tuple[Json, Json]:
    """Return what a process said at its end, and its peak memory in MiB."""
    peak, own = 0, 0
    while process.poll() is None:
        try:
            memory = process.memory_info()
        except psutil.Error:
            break
        peak, own = max(peak, memory.rss), max(own, memory.rss - memory.shared)
        used = process.cpu_times()
        time.sleep(0.1)
    text = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(process.args)}: ended with {process.returncode}")
    said: Json = json.loads(text.splitlines()[-1])
    seconds = {"cpu_seconds": round(used.user + used.system, 1)}
    return said, {"peak_mib": peak >> 20, "own_mib": own >> 20, **seconds}


def measured(bundle: Path, out: Path, given: argparse.Namespace, way: str) -> Json:
    shutil.rmtree(out, ignore_errors=True)
    load = os.getloadavg()[0]
    said, used = watched(started(bundle, out, given, way))
    rate = round(said["users"] / said["seconds"])
    size = sum(part.stat().st_size for part in out.glob("*.parquet"))
    named = {"way": way, "users": said["users"], "seconds": said["seconds"], "users_a_second": rate}
    return {**named, **used, "output_mb": round(size / 1e6), "load_before": round(load, 1)}


def killed(bundle: Path, out: Path, given: argparse.Namespace, whole: Path) -> Json:
    """Kill a run half-way, start it again, and compare with one that was left alone."""
    shutil.rmtree(out, ignore_errors=True)
    half = len(list(whole.glob("*.parquet"))) // 2
    process = started(bundle, out, given, "index")
    while len(list(out.glob("*.parquet"))) < half:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list(out.glob("*.parquet")))
    watched(started(bundle, out, given, "index"))
    hashes = [read_manifest(one, "recommendations")["fingerprint"] for one in (whole, out)]
    return {"killed_with_parts": there, "of": half * 2, "same_bytes": hashes[0] == hashes[1]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--users", type=float, default=1e6)
    parser.add_argument("--items", type=float, default=1e5)
    parser.add_argument("--mean-length", type=float, default=20.0, help="events of a user")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["index"])
    parser.add_argument("--share", type=float, default=1.0, help="of the users, answered")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work, kept; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as temporary:
        work = given.folder or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        users = int(given.users)
        bundle = big_bundle(work, users, int(given.items), given.mean_length)
        given.listed = listed(work / "some.txt", users, given.share)
        for way in given.ways:
            print(json.dumps(measured(bundle, work / way, given, way)), flush=True)
        if given.kill:
            print(json.dumps(killed(bundle, work / "killed", given, work / "index")), flush=True)


def listed(file: Path, users: int, share: float) -> Path | None:
    """Write a file of some users, spread evenly; None for all."""
    if share >= 1:
        return None
    step = round(1 / share)
    file.write_text("\n".join(f"user-{user:09d}" for user in range(0, users, step)))
    return file


if __name__ == "__main__":
    main()
