"""`recsys prepare` as a program for spark-submit, which says where and with how much it runs.

spark-submit --master 'local[8]' --driver-memory 8g training/spark_prepare.py \
  data=events data.path=/shared/log data.spill=/shared/tmp split=temporal
spark-submit --master spark://HOST:7077 --driver-memory 8g --executor-memory 16g \
  training/spark_prepare.py data=events data.path=/shared/log data.spill=/shared/tmp

The log and `data.spill` are folders that the driver and every executor mount under one path; the
dataset is written by the driver into RECSYS_HOME. Only the driver needs recsys installed.
"""

import sys

from recsys.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "data.engine=spark", *sys.argv[1:]]))
