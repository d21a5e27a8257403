#!/usr/bin/env bash
# examples/kv as its users meet it: the real redis-cli and redis-benchmark, rude clients, and processes that are killed.
# usage: kv_end_to_end.sh DIRECTORY    where kv-server and kv-demo are
set -u
# shellcheck source=tests/end_to_end.sh
. "$(dirname "$0")/end_to_end.sh"

server_program=$1/kv-server
demo_program=$1/kv-demo
server=  # process of the gateway
engine=  # process of the engine
port=

for tool in redis-cli redis-benchmark; do
  command -v $tool >/dev/null || { echo "$tool is not installed (apt install redis-tools)"; exit 77; }
done

trap cleanup EXIT
cleanup() {
  [ -n "$server" ] && kill -9 "$server" 2>/dev/null
  [ -n "$engine" ] && kill -9 "$engine" 2>/dev/null
  rm -rf "$scratch"
}

still_there() { kill -0 "$server" 2>/dev/null || give_up 'kv-server is no longer there'; }

# --- the server -------------------------------------------------------------------------------------------------------

says_listening() { grep -q listening "$scratch/out" || ! kill -0 "$server" 2>/dev/null; }
answers_ping() { [ "$(cli PING)" == PONG ]; }

start_server() {
  : >"$scratch/out"  # what the last server said
  "$server_program" --port 0 >"$scratch/out" 2>"$scratch/err" &
  server=$!
  eventually says_listening || give_up 'kv-server does not say that it listens'
  port=$(sed -n 's/.*127\.0\.0\.1:\([0-9]*\).*/\1/p' "$scratch/out")
  engine=$(sed -n 's/.*process \([0-9]*\).*/\1/p' "$scratch/out")
  [ -n "$port" ] && [ -n "$engine" ] || give_up 'kv-server does not start'
  eventually answers_ping || give_up 'kv-server does not answer PING'
}

nothing_left() { ! compgen -G "/dev/shm/*strait-kv.$port.*" >/dev/null; }

server_ends() {  # WHEN EXPECTED_STATUS: waits for both processes and looks behind them
  eventually is_over "$server" || give_up "the gateway is still there after $1"
  wait "$server"
  expect "status of the gateway after $1" "$2" $?
  eventually is_over "$engine" || give_up "the engine is still there after $1"
  eventually nothing_left || fail "left in /dev/shm after $1: $(ls /dev/shm)"
  server= engine=
}

# --- clients ----------------------------------------------------------------------------------------------------------

cli() { timeout $patience redis-cli -p "$port" "$@" 2>&1; }

check() {  # EXPECTED COMMAND...: what redis-cli would show a person
  local expected=$1
  shift
  expect "$*" "$expected" "$(cli --no-raw "$@")"
}

talk() {  # BYTES (for printf): sends them raw, and shows all that comes back until the server hangs up
  timeout $patience bash -c 'exec 3<>"/dev/tcp/127.0.0.1/$0" && printf "$1" >&3 && cat <&3' "$port" "$1" 2>/dev/null | tr -d '\r'
}

hang_up_after() {  # BYTES (for printf): sends them raw and is gone
  timeout $patience bash -c 'exec 3<>"/dev/tcp/127.0.0.1/$0" && printf "$1" >&3' "$port" "$1"
}

resident_kib() { sed -n 's/^VmRSS:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$1/status"; }

# --- what is tested ---------------------------------------------------------------------------------------------------

step 'every command'
start_server
check 'PONG' PING
check '"hello"' PING hello
check '"a b"' ECHO 'a b'
check '(nil)' GET k
check 'OK' SET k v
check '"v"' GET k
check '(nil)' SET k w NX
check 'OK' SET k w XX
check '(error) ERR syntax error' SET k w EX 10
check '(integer) 1' EXISTS k
check '(integer) 2' EXISTS k k none
check $'1) "w"\n2) (nil)' MGET k none
check '(integer) 1' DBSIZE
check '(error) ERR value is not an integer or out of range' INCR k
check '(integer) 1' INCR n
check '(integer) 2' INCR n
check 'OK' SET n 9223372036854775807
check '(error) ERR increment or decrement would overflow' INCR n
check '(integer) 2' DEL k n none
check '(integer) 0' DBSIZE
check $'1) "appendonly"\n2) "no"' CONFIG GET appendonly
check 'OK' CLIENT SETNAME me
check '(empty array)' COMMAND DOCS
expect_match 'COMMAND COUNT' '(integer) *' "$(cli --no-raw COMMAND COUNT)"
check "(error) ERR unknown command 'FLY', with args beginning with: 'to' 'the moon' " FLY to 'the moon'
check "(error) ERR wrong number of arguments for 'get' command" GET
check 'OK' QUIT
still_there

step 'binary values'
for size in 0 1 65536 524288; do
  head -c "$size" /dev/urandom >"$scratch/value"
  expect "SET of $size bytes" OK "$(cli -x SET "blob$size" <"$scratch/value")"
  cli --raw GET "blob$size" | head -c "$size" | cmp - "$scratch/value" || fail "GET of $size bytes"
done
head -c 65536 /dev/urandom >"$scratch/key"
expect 'a key of 64 KiB' OK "$(cli -X key SET key value <"$scratch/key")"
expect 'a key of 64 KiB' value "$(cli -x GET <"$scratch/key")"
expect 'a value too long' '-ERR Protocol error: invalid bulk length' \
  "$(talk '*3\r\n$3\r\nSET\r\n$4\r\nblob\r\n$524289\r\n')"
still_there

step 'pipelined requests are answered in order'
{ for i in {1..3000}; do printf 'ECHO %d\r\n' "$i"; done; printf 'QUIT\r\n'; } >"$scratch/pipelined"
{ for i in {1..3000}; do printf '$%d\n%d\n' ${#i} "$i"; done; printf '+OK\n'; } >"$scratch/expected"
timeout $patience bash -c 'exec 3<>"/dev/tcp/127.0.0.1/$0"; cat "$1" >&3 & cat <&3; wait' "$port" "$scratch/pipelined" |
  tr -d '\r' | cmp - "$scratch/expected" || fail 'the order of pipelined replies'
still_there

step 'clients that talk rubbish'
expect 'rubbish' '-ERR Protocol error: invalid multibulk length' "$(talk '*rubbish\r\n')"
expect 'rubbish' '-ERR Protocol error: invalid bulk length' "$(talk '*1\r\n$-5\r\n')"
expect 'rubbish' "-ERR Protocol error: expected '\$', got ':'" "$(talk '*1\r\n:1\r\n')"
expect 'rubbish' '-ERR Protocol error: unbalanced quotes in request' "$(talk 'GET "\r\n')"
expect 'rubbish behind requests' $'+PONG\n:0\n-ERR Protocol error: invalid multibulk length' \
  "$(talk 'PING\r\nDEL none\r\n*1x\r\nPING\r\n')"
expect 'a line without end' '-ERR Protocol error: too big inline request' "$(talk "$(printf '%065537d' 0)")"
for _ in {1..20}; do
  head -c 20000 /dev/urandom >"/dev/tcp/127.0.0.1/$port" 2>/dev/null
done
still_there
check 'PONG' PING
still_there

step 'clients that hang up half-way'
for _ in {1..20}; do
  hang_up_after '*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n$100000\r\nonly a little of it'
  hang_up_after 'GET blob524288\r\nGET blob524288\r\nGET blob524288\r\n'
  hang_up_after ''
done
check '(integer) 0' EXISTS half
still_there

step 'a client that does not read'
exec 4<>"/dev/tcp/127.0.0.1/$port"
yes 'GET blob524288' | head -n 20000 >&4 2>/dev/null &
slow=$!
for _ in {1..50}; do check 'PONG' PING; done
resident=$(resident_kib "$server")
[ "$resident" -lt $((256 * 1024)) ] || fail "a slow client makes the gateway hold $resident KiB"
kill $slow 2>/dev/null
exec 4>&-
wait $slow 2>/dev/null
check 'PONG' PING
still_there

step 'a second server on the same port'
expect_match 'the second server' '*cannot listen on 127.0.0.1:*Address already in use*' \
  "$(timeout $patience "$server_program" --port "$port" 2>&1)"
expect_match 'a port that is none' '*expected a port*' "$(timeout $patience "$server_program" --port 99999 2>&1)"
expect_match 'an unknown option' 'usage:*' "$(timeout $patience "$server_program" --fly 2>&1)"
check 'PONG' PING

step 'SIGTERM'
exec 4<>"/dev/tcp/127.0.0.1/$port"  # an idle client does not keep it
kill -TERM "$server"
server_ends SIGTERM 0
exec 4>&-

step 'SIGTERM to both processes'
start_server
kill -TERM "$engine" "$server"
server_ends 'SIGTERM to both' 0

step 'SIGTERM while there is more to do than the channel holds'
start_server
kill -STOP "$engine"
eventually is_stopped "$engine" || give_up 'the engine does not stop'
exec 4<>"/dev/tcp/127.0.0.1/$port"
for _ in {1..50}; do printf 'SET k %060000d\r\n' 0; done >&4 2>/dev/null &
asking=$!
for _ in {1..10}; do talk '*x\r\n' >/dev/null; done  # each round trip gives the gateway time to take some of it
exec 5<>"/dev/tcp/127.0.0.1/$port"
printf 'GET k\r\n' >&5  # finds no room any more
talk '*x\r\n' >/dev/null
kill -TERM "$server"
kill -CONT "$engine"
server_ends 'SIGTERM with requests under way' 0
kill $asking 2>/dev/null
wait $asking 2>/dev/null
exec 4>&- 5>&-

step 'SIGTERM under load'
for _ in {1..5}; do
  start_server
  timeout $patience redis-benchmark -p "$port" -t set,get -n 10000000 -c 20 -P 16 -q >/dev/null 2>&1 &
  load=$!
  for _ in {1..3}; do check 'PONG' PING; done
  kill -TERM "$server"
  server_ends 'SIGTERM under load' 0
  kill $load 2>/dev/null
  wait $load 2>/dev/null
done

step 'SIGINT'
start_server
kill -INT "$server"
server_ends SIGINT 0

step 'kill -9 of the engine'
start_server
kill -STOP "$engine"
eventually is_stopped "$engine" || give_up 'the engine does not stop'
exec 4<>"/dev/tcp/127.0.0.1/$port"
printf 'GET k\r\nGET k\r\n' >&4
# The gateway answers this by itself, and by then it has taken what was sent before.
expect 'rubbish without an engine' '-ERR Protocol error: invalid multibulk length' "$(talk '*x\r\n')"
kill -9 "$engine"
expect 'requests without an engine' $'-ERR engine is gone\n-ERR engine is gone' "$(timeout $patience cat <&4 2>/dev/null | tr -d '\r')"
exec 4>&-
server_ends 'kill -9 of the engine' 1
expect_match 'what the gateway says' '*the engine is gone*' "$(cat "$scratch/err")"

step 'kill -9 of the gateway'
start_server
kill -9 "$server"
server_ends 'kill -9 of the gateway' 137

step 'kv-demo'
timeout 300 "$demo_program" || fail 'kv-demo'

all_was_well
