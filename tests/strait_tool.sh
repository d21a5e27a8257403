#!/usr/bin/env bash
# The tool strait as its users meet it: channels of two processes, which are then killed; strange names; misuse.
# usage: strait_tool.sh STRAIT PEER [DEMO]    the tool, tests/tool_peer.cpp, and the demo
#
# `rm --stale` clears the whole machine, and `ls` looks into every process, so this runs where /dev/shm, System V memory and
# the processes are its own: in namespaces.
set -u

if [ "${STRAIT_TOOL_OWN_SHM:-}" != 1 ]; then
  command -v jq >/dev/null || { echo 'jq is not installed (apt install jq)'; exit 77; }
  own=(unshare -mipf --mount-proc --kill-child)
  "${own[@]}" mount -t tmpfs none /dev/shm 2>/dev/null || own=(unshare -Urmipf --mount-proc --kill-child)
  "${own[@]}" mount -t tmpfs none /dev/shm 2>/dev/null || { echo 'no mount namespace can be had'; exit 77; }
  # shellcheck disable=SC2016
  STRAIT_TOOL_OWN_SHM=1 exec "${own[@]}" bash -c 'mount -t tmpfs none /dev/shm && exec "$@"' sh "$0" "$@"
fi

# shellcheck source=tests/end_to_end.sh
. "$(dirname "$0")/end_to_end.sh"
strait=$1
peer=$2
demo=${3:-}
pids=()

trap cleanup EXIT
cleanup() {
  ((${#pids[@]} == 0)) || kill -9 "${pids[@]}" 2>/dev/null
  rm -rf "$scratch"
}

# run STATUS ARGUMENT...: the tool; what it says is in $out and $err.
run() {
  local expected=$1 status=0
  shift
  "$strait" "$@" >"$scratch/out" 2>"$scratch/err" || status=$?
  out=$(<"$scratch/out")
  err=$(<"$scratch/err")
  expect "the status of strait $*" "$expected" "$status"
}

# query FILTER: what the last output holds, as jq sees it.
query() { jq -r "$1" "$scratch/out" 2>&1; }

enter() {  # ROLE NAME: starts an end and waits until it has entered; its process is in $entered
  local word
  # One process says both words, or they could come in either order.
  exec 9< <(exec bash -c 'echo $$; exec "$@"' sh "$peer" "$1" "$2" 2>>"$scratch/peers")
  # Known before it has entered: one that does not must be killed as well, or ctest waits for what it has open.
  read -r -t 30 entered <&9 && pids+=("$entered")
  read -r -t 30 word <&9 && [ "$word" == in ] || {
    cat "$scratch/peers"
    fail "$1 of $2 did not enter"
    exit 1
  }
  exec 9<&-
}

gone() {  # PID...: waits until the processes are no more
  local pid end=$((SECONDS + 30))
  for pid in "$@"; do
    while kill -0 "$pid" 2>/dev/null; do
      if [ $SECONDS -ge $end ]; then
        fail "process $pid does not end"
        return
      fi
      sleep 0.01
    done
  done
}

# ----------------------------------------------------------------------------------------------------------------------

step 'nothing there'
run 0 ls
expect 'an empty list' 'no channels' "$out"
run 0 ls --json
expect 'an empty array' 0 "$(query length)"
run 0 rm --stale
expect 'nothing to remove' '' "$out$err"

step 'a live channel'
enter receiver readings
receiver=$entered
enter sender posix:readings
sender=$entered
run 0 ls
expect_match ls "*posix:readings*live*Reading v2, 24 B*64*$sender *$receiver *" "$out"
run 0 ls --json
expect 'the channel' 'readings posix Reading 64 live number' \
  "$(query '.[] | "\(.name) \(.scheme) \(.type) \(.capacity) \(.state) \(.depth | type)"')"
expect 'its ends' "sender $sender true receiver $receiver true" \
  "$(query '[.[0].ends[] | "\(.role) \(.pid) \(.alive)"] | join(" ")')"
run 0 stat readings
expect_match stat '*Reading version 2*24 bytes*64 messages*parks*wakes*' "$out"
run 0 stat posix:readings --json
expect 'stat --json' 1 "$(query length)"
run 0 top --once --interval 0.2
expect_match top '*SENT/s*posix:readings*live*%*' "$out"
run 0 --json top --once --interval 0.2
expect 'rates' 'true true' "$(query '.[0] | "\(.sent_per_second > 0) \(.taken_per_second > 0)"')"
run 1 rm readings
expect_match 'rm of a live channel' "*$sender*$receiver*" "$err"
run 0 rm --stale
expect 'rm --stale beside a live channel' '' "$out$err"
run 0 ls --json
expect 'still there' live "$(query '.[0].state')"

step 'both ends are killed'
kill -9 "$sender" "$receiver"
gone "$sender" "$receiver"
run 0 ls --json
expect 'killed' 'stale dead dead' "$(query '.[0] | "\(.state) \(.ends[0].state) \(.ends[1].state)"')"
run 0 ls
expect_match 'killed' '*posix:readings*stale*dead*dead*' "$out"
run 0 rm --stale
expect 'rm --stale' 'removed posix:readings' "$out"
run 0 ls --json
expect 'removed' 0 "$(query length)"
[ ! -e /dev/shm/readings ] || fail 'rm --stale left the file'

step 'the other memories'
enter receiver sysv:readings
receiver=$entered
enter sender "file:$scratch/readings.ring"
sender=$entered
run 0 ls
expect_match 'ls of the other memories' "*file:$scratch/readings.ring*live*sysv:readings*live*" "$out"
run 0 ls --json
expect 'their schemes' "file $scratch/readings.ring live sysv readings live" \
  "$(query '[.[] | "\(.scheme) \(.name) \(.state)"] | join(" ")')"
run 0 top --once --interval 0.05
expect_match 'top of the other memories' '*file:*sysv:*' "$out"
run 1 rm sysv:readings "file:$scratch/readings.ring"
expect_match 'rm of live channels' "*$receiver*$sender*" "$err"
kill -9 "$sender" "$receiver"
gone "$sender" "$receiver"
run 0 ls --json
expect 'a file is found by ls only while somebody lives in it' 'sysv stale' "$(query '[.[] | "\(.scheme) \(.state)"] | join(" ")')"
run 0 stat "file:$scratch/readings.ring" --json
expect 'a file is known by its name' 'stale dead' "$(query '.[0] | "\(.state) \(.ends[0].state)"')"
run 0 rm --stale
expect 'rm --stale' 'removed sysv:readings' "$out"
[ -e "$scratch/readings.ring" ] || fail 'rm --stale removed a file, which is to outlive everybody'
run 0 rm "file:$scratch/readings.ring"
[ ! -e "$scratch/readings.ring" ] || fail 'rm left the file'
[ -z "$(ls -A /dev/shm)" ] || fail "left in /dev/shm: $(ls -A /dev/shm)"
expect 'System V segments' 1 "$(wc -l </proc/sysvipc/shm)"

step 'halves of System V channels'
enter receiver sysv:torn
kill -9 "$entered"
gone "$entered"
rm /dev/shm/.strait-sysv-torn
run 0 ls --json
expect 'a segment without companion' 'torn sysv unfinished' "$(query '.[] | "\(.name) \(.scheme) \(.state)"')"
run 0 rm --stale
expect 'rm --stale' 'removed sysv:torn' "$out"
expect 'System V segments' 1 "$(wc -l </proc/sysvipc/shm)"
enter receiver sysv:torn
kill -9 "$entered"
gone "$entered"
ipcrm -M "$(awk 'NR == 2 {printf "0x%08x", $1 < 0 ? $1 + 4294967296 : $1}' /proc/sysvipc/shm)"
run 0 ls --json
expect 'a companion without segment' 'torn sysv unfinished' "$(query '.[] | "\(.name) \(.scheme) \(.state)"')"
run 0 rm --stale
expect 'rm --stale' 'removed sysv:torn' "$out"
[ -z "$(ls -A /dev/shm)" ] || fail "left in /dev/shm: $(ls -A /dev/shm)"

if [ -n "$demo" ]; then
  step 'the demo is killed'
  "$demo" --rounds 1000 --subject strait >"$scratch/demo" 2>&1 &
  conductor=$!
  pids+=("$conductor")
  # Of posix: alone: /dev/shm is ours, and files of others on this machine are shown as well.
  both_ends_live() {
    "$strait" ls --json >"$scratch/out" &&
      [ "$(query 'any(.[]; .scheme == "posix" and .state == "live" and all(.ends[]; .alive))')" == true ]
  }
  all_are_stale() {
    "$strait" ls --json >"$scratch/out" &&
      [ "$(query '[.[] | select(.scheme == "posix").state] | unique | join(" ")')" == stale ]
  }
  eventually both_ends_live || { cat "$scratch/demo"; fail 'ls does not show the channels of the demo'; }
  mapfile -t both < <(query '[.[] | select(.scheme == "posix").ends[] | select(.alive).pid] | unique[]')
  # Its conductor first, which would clear away after them; any that it has started since die with it.
  kill -9 "$conductor" "${both[@]}"
  gone "$conductor" "${both[@]}"
  eventually all_are_stale || fail "the demo, killed: expected stale channels, found $(cat "$scratch/out")"
  expect 'its ends' 'false' "$(query '[.[] | select(.scheme == "posix").ends[].alive] | unique | join(" ")')"
  mapfile -t stale < <(query '.[] | select(.scheme == "posix") | "\(.scheme):\(.name)"')
  run 0 rm --stale
  expect 'rm --stale after the demo' "$(printf 'removed %s\n' "${stale[@]}")" "$out"
  run 0 ls --json
  expect 'removed' 0 "$(query '[.[] | select(.scheme == "posix")] | length')"
  [ -z "$(ls -A /dev/shm)" ] || fail "the demo left in /dev/shm: $(ls -A /dev/shm)"
fi

step 'a strange name'
strange=$'\e[31mred "\\\n\xff\u202e'
enter receiver "posix:$strange"
run 0 ls
expect_match 'a strange name' 'NAME*posix:\\x1b\[31mred "\\\\\\x0a\\xff\\xe2\\x80\\xae *live*' "$out"
run 0 ls --json
expect 'a strange name in JSON' $'\e[31mred "\\\n\ufffd\u202e' "$(query '.[0].name')"
kill -9 "$entered"
gone "$entered"
run 0 rm --json "$strange"
expect 'removed by its name' 1 "$(query length)"
run 0 ls --json
expect 'the strange name' 0 "$(query length)"

step 'rubbish'
head -c 100000 /dev/urandom >/dev/shm/rubbish
printf 'sem' >/dev/shm/sem.small
mkdir /dev/shm/directory
run 0 ls
expect 'what is not ours' 'no channels' "$out"
run 1 rm rubbish
expect_match 'rm of what is not ours' '*not a strait segment*' "$err"
run 0 rm --stale
[ -e /dev/shm/rubbish ] || fail 'rubbish that is not ours was removed'

step 'misuse'
run 2
run 2 frobnicate
expect_match 'an unknown word' '*expected one of ls, stat, top, rm; found*frobnicate*' "$err"
run 2 stat
run 2 rm
run 2 rm readings --stale
run 2 ls too many
run 2 top --interval nonsense
run 1 stat nothing
expect_match 'an unknown name' '*posix:nothing*' "$err"
run 1 stat tcp:nothing
expect_match 'an unknown scheme' '*unknown memory scheme*' "$err"
run 1 rm nothing
run 1 stat ''
run 0 --help
run 0 rm --help
if [ -e /dev/full ]; then
  status=0
  "$strait" ls >/dev/full 2>"$scratch/err" || status=$?
  expect 'the status where nothing can be written' 1 "$status"
fi

step 'the lanes of a socket'
enter listener "unix:$scratch/door"
listener=$entered
enter client "unix:$scratch/door"
client=$entered
run 0 ls --json
lanes='[.[] | select(.scheme == "unix")]'
expect 'two lanes' 2 "$(query "$lanes | length")"
expect_match 'their names' "$scratch/door#*" "$(query "$lanes[0].name")"
expect 'they live' 'live live' "$(query "$lanes | map(.state) | join(\" \")")"
expect 'the ends of both' "$(printf '%s\n' "$listener" "$listener" "$client" "$client" | sort)" \
  "$(query "$lanes[].ends[].pid" | sort)"
run 1 stat "unix:$scratch/door"
expect_match 'what has no name' '*expected a channel with a name of its own*' "$err"
kill -9 "$listener" "$client"
gone "$listener" "$client"
run 0 ls --json
expect 'nothing of them is left' 0 "$(query "$lanes | length")"

all_was_well
