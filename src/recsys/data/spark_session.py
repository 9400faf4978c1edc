"""Connect to Spark: a session that runs, `spark-submit`'s, a cluster by name, or this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.data.settings import PrepareSettings
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis
    from pyspark.sql import SparkSession

JAVA_NEEDED = (
    "data.engine=spark needs Java 17 or 21: apt-get install openjdk-17-jre-headless, or set "
    "JAVA_HOME to one. data.engine=duckdb needs none"
)
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@contextmanager
def opened(settings: PrepareSettings, scratch: Path) -> Iterator[ibis.BaseBackend]:
    """Connect to Spark: the session that runs, `spark-submit`'s, `data.master`, or this machine.

    A session that was there goes on; its own settings stay as they are.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise InputError(
            f"data.engine=spark needs PySpark ({error}): pip install 'recsys[spark]'. "
            "data.engine=duckdb does not"
        ) from error
    import ibis

    running = SparkSession.getActiveSession()
    session = running or _started(settings, scratch)
    _check_master(session, settings.master)
    own = session.newSession()
    own.conf.set("spark.sql.ansi.enabled", "true")
    own.conf.set("spark.sql.legacy.parquet.nanosAsLong", "true")
    try:
        yield ibis.pyspark.connect(own)
    finally:
        if running is None:
            session.stop()


def _started(settings: PrepareSettings, scratch: Path) -> SparkSession:
    """Start a session; what a submitted program was given stands before ours."""
    from pyspark.errors import PySparkRuntimeError
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName(f"recsys prepare {settings.name}")
    if settings.master:
        builder = builder.master(settings.master)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        _check_java()
        for name, value in _of_this_machine(settings, scratch).items():
            builder = builder.config(name, value)
    try:
        session = builder.getOrCreate()
    except PySparkRuntimeError as error:
        raise InputError(f"Spark does not start ({error}). {JAVA_NEEDED}") from error
    session.sparkContext.setLogLevel("ERROR")
    return session


def _of_this_machine(settings: PrepareSettings, scratch: Path) -> dict[str, str]:
    quiet = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
    memory = f"{max(512, _bytes(settings.memory_limit) >> 20)}m"
    here = {"spark.driver.memory": memory, "spark.local.dir": str(scratch / "spark")}
    if settings.master is None:
        alone = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
        here |= alone | {"spark.master": f"local[{settings.threads}]"}
    return quiet | here


def _bytes(size: str) -> int:
    """Return how many bytes a size as DuckDB writes it is.

    >>> _bytes("2GB")
    2000000000
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]+)\s*", size)
    if not found or found[2].upper() not in UNITS:
        raise InputError(f"data.memory_limit={size}: expected a size such as 2GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _check_java() -> None:
    """Raise InputError where there is no Java, or one that is too old."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else "java"
    if shutil.which(java) is None:
        raise InputError(f"no Java found at {java}; {JAVA_NEEDED}")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version and int(version[1]) < 17:
        raise InputError(f"Java {version[1]} found at {shutil.which(java)}; {JAVA_NEEDED}")


def _check_master(session: SparkSession, master: str | None) -> None:
    met = session.sparkContext.master
    if master is not None and met != master:
        raise InputError(
            f"data.master={master}: Spark already runs at {met}; leave data.master out, or stop "
            "that session"
        )
