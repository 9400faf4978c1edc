"""`recsys recommend --all-users` on Spark: each task writes some of the parts into one folder.

    spark-submit --master 'local[2]' training/spark_recommend.py BUNDLE --top-k 50 --out /shared/out

Takes the arguments of `recsys recommend --all-users`. Executors need `pip install 'recsys[serve]'`,
and BUNDLE (with --dataset or --users what they name) and --out under the same path as the driver.
A task that is tried again writes only what is missing; submitted again, the job goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from pyspark.sql import SparkSession

from recsys.artifacts import Workspace
from recsys.cli import parser
from recsys.serving.batch import Batch
from recsys.serving.engine import use_one_core
from recsys.serving.terminal import batch_of


def opened(words: list[str]) -> Batch:
    """Open what some arguments of `recsys recommend --all-users` name."""
    return batch_of(parser().parse_args(["recommend", "--all-users", *words]), Workspace())


def main() -> None:
    """Write the parts that are missing, then the manifest."""
    words = sys.argv[1:]
    batch = opened(words)

    def write(parts: Iterable[int]) -> Iterator[str]:
        use_one_core()
        own = opened([*words, "--out", out])
        return (own.write(part).name for part in parts if not own.path(part).is_file())

    out, parts = str(batch.out.resolve()), batch.missing()
    context = SparkSession.builder.appName("recsys recommend").getOrCreate().sparkContext
    tasks = max(1, min(len(parts), context.defaultParallelism))
    written = context.parallelize(parts, tasks).mapPartitions(write).collect()
    manifest = batch.finish()
    print(f"{manifest['users']:,} users in {batch.out}: {len(written)} parts written now")


if __name__ == "__main__":
    main()
