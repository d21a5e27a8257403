#!/usr/bin/env bash
# examples/fanout as its users meet it: subscribers that are fast, slow, stopped, killed and late, and a feed that dies.
# usage: fanout_end_to_end.sh FEED SUBSCRIBER
set -u

# shellcheck source=tests/end_to_end.sh
. "$(dirname "$0")/end_to_end.sh"

feed=$1
subscriber=$2
name=unix:$scratch/prices.sock
all=()

trap cleanup EXIT
cleanup() {
  for id in "${all[@]}"; do kill -9 "$id" 2>/dev/null; done
  rm -rf "$scratch"
}

start_feed() {  # ARGUMENTS...: its process is $run
  "$feed" "$name" "$@" 2>"$scratch/feed.err" &
  run=$!
  all+=("$run")
  eventually test -S "$scratch/prices.sock" || give_up "the feed does not listen"
}

start() {  # NAME ARGUMENTS...: its process is $last
  local who=$1
  shift
  "$subscriber" "$name" "$@" >"$scratch/$who.out" 2>"$scratch/$who.err" &
  last=$!
  all+=("$last")
}

ends() {  # PROCESS STATUS WHO
  eventually is_over "$1" || give_up "it is still there: $3"
  wait "$1"
  local status=$?
  [ $status -eq "$2" ] || give_up "expected status $2, found $status: $3"
}

said() { grep -q "$2" "$scratch/$1"; }  # FILE TEXT
expect_said() { said "$1" "$2" || fail "$1: expected '$2', found: $(cat "$scratch/$1")"; }
field() { sed -n "s/.*$2 \([0-9]*\).*/\1/p" "$scratch/$1.out" | tail -n 1; }  # WHO WORD

step "everybody gets everything that he asked for, in order"
start_feed --count 20000 --rate 50000 --subscribers 3 --lane 32768
start all; a=$last
start some --symbols 3 6; b=$last
start none --symbols 99 12; c=$last
ends "$run" 0 feed
for id in $a $b $c; do ends "$id" 0 "a subscriber"; done
expect_said all.out 'the feed ended: got 20000, missed 0, from 0 to 19999'
expect_said some.out 'the feed ended: got 5000, missed 0, from 3 to 19990'
expect_said none.out 'got 0, missed 0'
[ -z "$(ls "$scratch" | grep sock)" ] || fail "the socket is left"

step "one that is slow, one that is stopped and one that is killed hold nobody up; one that is late gets the rest"
# The lanes hold what comes in 1.6 seconds: so long may the fast one be kept from running without missing anything.
start_feed --rate 20000 --subscribers 4 --lane 32768
start fast; fast=$last
start slow --work 20000; slow=$last
start stopped; stopped=$last
start killed; killed=$last
number_of() { sed -n "s/^feed: subscriber \([0-9]*\) is process $1\$/\1/p" "$scratch/feed.err"; }  # PROCESS
eventually said feed.err '^feed: begins$' || give_up "not all of them came in"
kill -9 "$killed"
kill -STOP "$stopped"
wait "$killed" 2>/dev/null  # what the shell has to say about that is not ours
eventually said feed.err "subscriber $(number_of "$killed") the process at the other end of the channel died" ||
  give_up "the feed was not told of the death"
for id in $stopped $slow; do
  eventually said feed.err "subscriber $(number_of "$id") is too slow" || give_up "its lane does not become full: $id"
done
start late; late=$last
eventually said feed.err "is process $late\$" || give_up "the late one did not come in"
eventually said feed.err "subscriber $(number_of "$late") wants" || give_up "the late one does not say what it wants"
kill -CONT "$stopped"
# What comes behind the gap it can only have taken after all that was in its lane.
eventually said stopped.out '^missed' || give_up "the stopped one was not told that it missed something"
kill -TERM "$run"
ends "$run" 0 feed
for id in $fast $late $stopped; do ends "$id" 0 "a subscriber"; done
published=$(sed -n 's/^feed: published \([0-9]*\) ticks$/\1/p' "$scratch/feed.err")
to_the_end="to $((published - 1))\$"
expect_said fast.out "the feed ended: got $published, missed 0, from 0 $to_the_end"
expect_said late.out "the feed ended: got $((published - $(field late from))), missed 0, .*$to_the_end"
[ "$(field late from)" -gt 0 ] || fail "the late one got what came before it"
expect_said stopped.out "$to_the_end"
[ "$(field stopped missed)" -gt 0 ] || fail "the stopped one missed nothing"
[ $(($(field stopped got) + $(field stopped missed))) -eq "$published" ] || fail "the stopped one was not told all that it missed"
expect_said feed.err "^feed: subscriber $(number_of "$slow") stays, having missed [1-9]"
kill -9 "$slow"
wait "$slow" 2>/dev/null

step "a feed is killed: its subscribers are told, and find the next one"
start_feed --rate 20000 --subscribers 2
start once; once=$last
start again --again; again=$last
eventually said feed.err '^feed: begins$' || give_up "not both of them came in"
kill -9 "$run"
wait "$run" 2>/dev/null
ends "$once" 2 once
expect_said once.out 'the feed died: got'
[ -S "$scratch/prices.sock" ] || fail "a killed feed cannot have removed its socket"
start_feed --count 1000 --rate 50000 --subscribers 1
ends "$run" 0 "the second feed"
ends "$again" 0 again
expect_said again.out 'the feed died: got'
expect_said again.out 'the feed ended: got 1000, missed 0, from 0 to 999'
[ -z "$(ls "$scratch" | grep sock)" ] || fail "the socket is left"

step "a second feed is refused, and says why"
start_feed --subscribers 1
"$feed" "$name" 2>"$scratch/second.err" && fail "two feeds at one socket"
expect_said second.err "expected no living listener, found one in process $run"
kill -TERM "$run"
ends "$run" 0 "a feed that was told to end"

all_was_well
