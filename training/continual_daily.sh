#!/usr/bin/env bash
# One new day: append its log, go on from the newest run, hold the result against bounds, promote it.
#   training/continual_daily.sh CHAIN LOG [RUN]
# CHAIN: a name; what is newest is kept in $RECSYS_HOME/continual/CHAIN. LOG: the day's events.
# RUN: the finished run that the chain begins with, the first time; its dataset is what grows.
#   15 3 * * * cd /srv/shop && training/continual_daily.sh shop logs/$(date -d yesterday +\%F).parquet first
# Safe to repeat: a day that is done is not done again, and a run that was cut off goes on.
# Ends with 3 where the run is worse than the bounds: it is then not exported, the day stays in the
# dataset, and the next day goes on from the last run that was good. 75: another one is at work.
#
# From the environment:
#   SOURCE      how LOG is read (data=events), as in SOURCE="data=served data.source.impressions=false"
#   KEEP_DAYS   older events expire (null: none)
#   TRAIN       settings of each training ("trainer.max_epochs=3 patience=null replay=0.7")
#   NEW_BOUND   how much worse than the run before, untrained on the new days, it may be (0.02)
#   OLD_BOUND   the same on the test part of the run before: what was forgotten (0.05)
#   SERVER      promote there, as in http://localhost:8000; else in MLflow's registry
set -euo pipefail
usage="training/continual_daily.sh CHAIN LOG [RUN]"
chain=${1:?name the chain: $usage}
log=${2:?name the log of the new day: $usage}
first=${3:-}
read -ra source <<<"${SOURCE:-data=events}"
read -ra settings <<<"${TRAIN:-trainer.max_epochs=3 patience=null replay=0.7}"

home=${RECSYS_HOME:-workspace}
state=$home/continual/$chain
mkdir -p "$state"
exec 9>"$state/lock"
if ! flock --nonblock 9; then
  echo "$chain: another one is at work; it holds $state/lock" >&2
  exit 75
fi

day='' dataset='' run=$first
if [[ -f $state/newest ]]; then
  { read -r day && read -r dataset && read -r run; } <"$state/newest"
elif [[ -z $first ]]; then
  echo "$chain: nothing there yet; name the run that it begins with: $usage" >&2
  exit 2
fi

keep() { # all three at once or not at all
  printf '%s\n' "$day" "$dataset" "$run" >"$state/.newest"
  mv "$state/.newest" "$state/newest"
}

field() { # of the last line of what `recsys … --json` says
  tail -n 1 | python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}

today=$(basename "$log") # without the ending that says what kind of file it is
for ending in .gz .parquet .csv .tsv .txt .jsonl .json; do today=${today%"$ending"}; done
name=$chain-$today
if [[ $day != "$today" ]]; then
  if [[ -z $dataset ]]; then
    dataset=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["dataset"]["path"])' \
      "$home/runs/$run/manifest.json")
  fi
  dataset=$(recsys prepare "${source[@]}" "data.path=$log" "grow.onto=$dataset" \
    "grow.keep_days=${KEEP_DAYS:-null}" --json | tee /dev/stderr | field dataset)
  day=$today
  keep
fi

if [[ $run != "$name" ]]; then
  if [[ -f $home/runs/$name/run.json && ! -f $home/runs/$name/manifest.json ]]; then
    recsys train "resume=$name"
  elif [[ ! -f $home/runs/$name/manifest.json ]]; then
    recsys train "resume_from=$run" "data.dataset=$dataset" "name=$name" "${settings[@]}"
  fi
  python3 -m recsys.training.gate "$name" --new "${NEW_BOUND:-0.02}" --old "${OLD_BOUND:-0.05}"
  run=$name
  keep
fi

if [[ ! -f $state/promoted || $(<"$state/promoted") != "$name" ]]; then
  recsys export "$name"
  if [[ -n ${SERVER:-} ]]; then
    recsys promote "$name" --server "$SERVER"
  else
    recsys promote "$name"
  fi
  echo "$name" >"$state/promoted"
fi
echo "$chain: $name is promoted"
