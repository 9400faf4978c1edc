#!/usr/bin/env bash
# One new hour, as `continual_daily.sh` does a day: one epoch, and more of the old in each batch.
#   training/continual_hourly.sh CHAIN LOG [RUN]
#   5 * * * * cd /srv/shop && training/continual_hourly.sh shop logs/$(date -d '1 hour ago' +\%F-\%H).parquet first
# The first dataset should be split by hours, too: split=days split.validation_days=0.125
# split.test_days=0.125 keeps three hours for each. Once a week train from scratch, and begin another chain.
set -euo pipefail
export TRAIN=${TRAIN:-trainer.max_epochs=1 patience=null replay=0.5}
export NEW_BOUND=${NEW_BOUND:-0.05} # an hour's test part is small
exec "$(dirname "$0")/continual_daily.sh" "$@"
