# What the tests share that use programs as people do; to be sourced. Where anything goes wrong they go on, unless there is
# nothing to go on with, and end in `all_was_well`.
# shellcheck shell=bash

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT  # until the test has more to clear up
patience=30           # seconds for anything to happen: only a broken program makes us wait that long
failures=0

fail() {
  printf 'FAILED: %s\n' "$*"
  failures=$((failures + 1))
}

give_up() {
  fail "$@"
  cat "$scratch"/{out,err} 2>/dev/null  # what the program said, where it was kept
  exit 1
}

expect() {  # WHAT EXPECTED FOUND
  [ "$2" == "$3" ] || fail "$(printf '%s: expected %q, found %q' "$1" "$2" "$3")"
}

expect_match() {  # WHAT PATTERN FOUND
  # shellcheck disable=SC2053
  [[ $3 == $2 ]] || fail "$(printf '%s: expected %q, found %q' "$1" "$2" "$3")"
}

eventually() {  # COMMAND...: until it succeeds
  local end=$((SECONDS + patience))
  until "$@"; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.01
  done
}

step() { printf '%s\n' "-- $*"; }

# A process whose parent has died stays a zombie until somebody else sees to it, and is over nevertheless.
is_over() { ! grep -q '^State:[[:space:]]*[^Z[:space:]]' "/proc/$1/status" 2>/dev/null; }
is_stopped() { ! grep -h ^State "/proc/$1"/task/*/status | grep -qv T; }

all_was_well() {
  if [ $failures -ne 0 ]; then
    printf '%d checks failed\n' $failures
    exit 1
  fi
  echo 'all was well'
}
