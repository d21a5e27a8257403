#!/usr/bin/env bash
# examples/pipeline as its users meet it: gunzip and cmp tell whether the file is the same, and workers are killed.
# usage: pipeline_end_to_end.sh PIPELINE
set -u
# shellcheck source=tests/end_to_end.sh
. "$(dirname "$0")/end_to_end.sh"

pipeline=$1
run=  # process of the pipeline

trap cleanup EXIT
cleanup() {
  [ -n "$run" ] && kill -9 "$run" 2>/dev/null
  exec 3>&-
  rm -rf "$scratch"
}

worker() { sed -n "s/^pipeline: worker $1 is process //p" "$scratch/err" | tail -n 1; }  # PLACE: who holds it now
has_worker() { [ -n "$(worker "$1")" ]; }
nothing_left() { ! compgen -G "/dev/shm/strait-pipeline.$1.*" >/dev/null; }

start() {  # ARGUMENTS...
  "$pipeline" "$@" 2>"$scratch/err" &
  run=$!
}

ends() {  # EXPECTED_STATUS WHEN
  local id=$run status
  eventually is_over "$run" || give_up "it is still there: $2"
  wait "$run"
  status=$?
  [ $status -eq "$1" ] || give_up "expected status $1, found $status: $2"
  eventually nothing_left "$id" || fail "left in /dev/shm: $2"
  run=
}

same() {  # FILE WHAT
  gunzip -c <"$scratch/out.gz" | cmp - "$1" || fail "gunzip yields something else: $2"
}

roundtrip() {  # FILE WORKERS WHAT
  step "$3"
  rm -f "$scratch/out.gz"
  start "$1" "$scratch/out.gz" --workers "$2"
  ends 0 "$3"
  same "$1" "$3"
  ! grep -v ' is process ' "$scratch/err" || fail "it complains: $3"
}

head -c $((10 * 1024 * 1024)) /dev/urandom >"$scratch/big"
seq 1400000 | head -c $((10 * 1024 * 1024)) >>"$scratch/big"
: >"$scratch/empty"
head -c $((2 * 128 * 1024)) "$scratch/big" >"$scratch/blocks"

roundtrip "$scratch/big" 3 'a file of 20 MiB'
roundtrip "$scratch/empty" 3 'an empty file'
roundtrip "$scratch/blocks" 2 'a file of exactly two blocks'
roundtrip "$pipeline" 1 'a program'

# The input is a pipe, so that the file cannot end before the worker was killed.
step 'kill -9 of a worker that has work'
mkfifo "$scratch/fifo"
start "$scratch/fifo" "$scratch/out.gz" --workers 2
exec 3>"$scratch/fifo"
head -c $((6 * 1024 * 1024)) "$scratch/big" >&3  # more than the channels hold: both workers have begun
first=$(worker 0)
[ -n "$first" ] || give_up 'no worker 0'
kill -STOP "$first"
eventually is_stopped "$first" || give_up 'the worker does not stop'
tail -c +$((6 * 1024 * 1024 + 1)) "$scratch/big" >&3 &
feeder=$!
exec 3>&-  # the feeder has it, too
kill -9 "$first"
wait $feeder
ends 0 'kill -9 of a worker'
same "$scratch/big" 'kill -9 of a worker'
grep -q 'worker 0 ended with status 137' "$scratch/err" || fail 'the death is not told'
[ "$(worker 0)" != "$first" ] || fail 'nobody took its place'

step 'workers that die again and again'
rm -f "$scratch/out.gz"
start "$scratch/fifo" "$scratch/out.gz" --workers 1
yes >"$scratch/fifo" 2>/dev/null &  # endless: only an error can end this
feeder=$!
killed=
kill_the_next() {
  local next
  next=$(worker 0)
  if [ -n "$next" ] && [ "$next" != "$killed" ]; then kill -9 "$next" && killed=$next; fi
  is_over "$run"
}
eventually kill_the_next || give_up 'it goes on without workers'
ends 1 'workers that die again and again'
wait $feeder 2>/dev/null
grep -q 'too many workers died' "$scratch/err" || fail "it does not say why it ends: $(cat "$scratch/err")"
! compgen -G "$scratch/out.gz*" >/dev/null || fail 'half a file is left'

step 'SIGTERM'
start "$scratch/fifo" "$scratch/out.gz" --workers 2
yes >"$scratch/fifo" 2>/dev/null &
feeder=$!
eventually has_worker 1 || give_up 'no worker 1'
kill -TERM "$run"
ends 1 SIGTERM
wait $feeder 2>/dev/null
grep -q 'interrupted' "$scratch/err" || fail 'it does not say that it was interrupted'
! compgen -G "$scratch/out.gz*" >/dev/null || fail 'half a file is left'

step 'kill -9 of the pipeline: its workers end, too, and the last one clears up'
start "$scratch/fifo" "$scratch/out.gz" --workers 2
yes >"$scratch/fifo" 2>/dev/null &
feeder=$!
eventually test -s "$scratch/out.gz.part" || give_up 'it writes nothing'
eventually has_worker 1 || give_up 'no worker 1'
workers="$(worker 0) $(worker 1)"
kill -9 "$run"
ends 137 'kill -9 of the pipeline'
for id in $workers; do eventually is_over "$id" || fail 'a worker is still there'; done
wait $feeder 2>/dev/null
rm -f "$scratch/out.gz.part"

step 'what cannot work'
complains() {  # PATTERN STATUS ARGUMENTS...
  local pattern=$1 expected=$2 said status
  shift 2
  said=$(timeout $patience "$pipeline" "$@" 2>&1)
  status=$?
  # shellcheck disable=SC2053
  [[ $status -eq $expected && $said == $pattern ]] || fail "$*: expected $pattern, found $status: $said"
}
complains '*none: No such file*' 1 "$scratch/none" "$scratch/out.gz"
complains '*Is a directory*' 1 "$scratch" "$scratch/out.gz"
complains '*is the input' 1 "$scratch/big" "$scratch/big"
complains '*not a regular file' 1 "$scratch/big" /dev/null
complains 'usage:*' 2 "$scratch/big"
complains 'usage:*' 2 "$scratch/big" "$scratch/out.gz" --workers 0
! compgen -G "$scratch/out.gz*" >/dev/null || fail 'an error leaves an output'

all_was_well
