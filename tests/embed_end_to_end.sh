#!/usr/bin/env bash
# examples/embed as its users meet it: people who chat over TCP, a moderator that comes, is killed and is replaced.
# usage: embed_end_to_end.sh DIRECTORY    where chat-server, chat-server-moderated and chat-moderator are
set -u
# shellcheck source=tests/end_to_end.sh
. "$(dirname "$0")/end_to_end.sh"

programs=$1
server=
moderator=
port=

trap cleanup EXIT
cleanup() {
  [ -n "$server" ] && kill -9 "$server" 2>/dev/null
  [ -n "$moderator" ] && kill -9 "$moderator" 2>/dev/null
  rm -rf "$scratch"
}

nothing_left() { ! compgen -G "/dev/shm/strait-chat.$port.*" >/dev/null; }

start_server() {  # PROGRAM
  : >"$scratch/out"
  "$programs/$1" 0 >"$scratch/out" 2>"$scratch/err" &
  server=$!
  eventually grep -q listening "$scratch/out" || give_up "$1 does not start"
  port=$(sed -n 's/.*127\.0\.0\.1://p' "$scratch/out")
}

start_moderator() {
  : >"$scratch/moderator"
  "$programs/chat-moderator" "$port" 'darn' >"$scratch/moderator" 2>&1 &
  moderator=$!
  eventually grep -q moderating "$scratch/moderator" || give_up 'the moderator does not start'
}

kill_moderator() {
  kill -9 "$moderator"
  wait "$moderator" 2>/dev/null
  moderator=
}

stop_server() {  # WHEN
  kill -TERM "$server"
  eventually is_over "$server" || give_up "the server is still there: $1"
  wait "$server"
  local status=$?
  [ $status -eq 0 ] || fail "the server ended with status $status: $1"
  server=
}

# Two people: descriptors 3 and 4.
say() { printf '%s\n' "$2" >&"$1"; }  # WHO LINE
hears() {  # WHO LINE: the next one
  local line=
  IFS= read -r -t $patience -u "$1" line
  [ "$line" == "$2" ] || fail "expected '$2', found '$line'"
}
both_hear() { hears 3 "$1" && hears 4 "$1"; }
enter() {
  exec 3<>"/dev/tcp/127.0.0.1/$port" 4<>"/dev/tcp/127.0.0.1/$port"
  say 3 ann
  say 4 bob
}

step 'the server as it was'
start_server chat-server
enter
# A name is not answered, so nobody knows yet that both are in. Bob is when he hears himself.
say 4 'hello'
hears 4 'bob: hello'
say 3 'darn'
hears 4 'ann: darn'
exec 3>&- 4>&-
stop_server 'plain'

step 'what is said waits for the moderator'
start_server chat-server-moderated
exec 4<>"/dev/tcp/127.0.0.1/$port"
say 4 bob
say 4 'anybody here?'
start_moderator
hears 4 'bob: anybody here?'
exec 3<>"/dev/tcp/127.0.0.1/$port"
say 3 ann
say 3 'me'
both_hear 'ann: me'

step 'a moderator moderates'
say 3 'darn it, darn!'
both_hear 'ann: **** it, ****!'
say 4 'look at http://example.org'
say 4 'well'
both_hear 'bob: well'

step 'in the order in which it was said, all of it and once'
for i in {1..300}; do say 3 "$i"; done
for i in {1..300}; do hears 4 "ann: $i"; done
for i in {1..300}; do hears 3 "ann: $i"; done

step 'kill -9 of the moderator: the lines wait for the next one'
for round in {1..5}; do
  kill -STOP "$moderator"
  eventually is_stopped "$moderator" || give_up 'the moderator does not stop'
  for i in {1..20}; do say 3 "$round.$i darn"; done
  kill_moderator
  start_moderator
  for i in {1..20}; do both_hear "ann: $round.$i ****"; done
done

step 'kill -9 of the moderator while it works'
for round in {1..5}; do
  for i in {1..100}; do say 3 "$round.$i"; done &
  speaker=$!
  hears 4 "ann: $round.1"
  kill_moderator
  start_moderator
  for i in {2..100}; do hears 4 "ann: $round.$i"; done
  for i in {1..100}; do hears 3 "ann: $round.$i"; done
  wait $speaker
done

step 'people who leave and people who do not read'
for _ in {1..20}; do
  exec 5<>"/dev/tcp/127.0.0.1/$port"
  printf 'eve\nhi\nhalf a li' >&5
  exec 5>&-
done
head -c 10000 /dev/zero | tr '\0' 'x' >"/dev/tcp/127.0.0.1/$port" 2>/dev/null
say 3 'still here'
for who in 3 4; do
  while IFS= read -r -t $patience -u $who line && [ "$line" == 'eve: hi' ]; do :; done
  [ "$line" == 'ann: still here' ] || fail "found '$line'"
done

step 'SIGTERM: the moderator ends, too'
stop_server moderated
eventually is_over "$moderator" || give_up 'the moderator is still there'
wait "$moderator"
status=$?
[ $status -eq 0 ] || fail "the moderator ended with status $status"
moderator=
eventually nothing_left || fail 'left in /dev/shm'
exec 3>&- 4>&-

step 'kill -9 of the server: the moderator ends and clears up'
start_server chat-server-moderated
start_moderator
enter
say 4 'hello'
hears 4 'bob: hello'
kill -9 "$server"
wait "$server" 2>/dev/null
server=
eventually is_over "$moderator" || give_up 'the moderator is still there'
wait "$moderator"
status=$?
[ $status -eq 1 ] || fail "the moderator ended with status $status"
moderator=
eventually nothing_left || fail 'left in /dev/shm'
exec 3>&- 4>&-

all_was_well
