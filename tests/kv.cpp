// examples/kv without its sockets and channels: the protocol, the commands, and messages in slots.
#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "message.hpp"
#include "resp.hpp"
#include "store.hpp"

using kv::resp::command;
using kv::resp::parser;
using kv::resp::protocol_error;
using namespace std::string_literals;

namespace {

std::vector<command> all_of(parser& reader) {
  std::vector<command> requests;
  while (auto request = reader.next()) requests.push_back(std::move(*request));
  return requests;
}

std::vector<command> parse(std::string_view bytes, const kv::resp::limits& limits = {}) {
  parser reader(limits);
  reader.feed(bytes);
  return all_of(reader);
}

/// The complaint about `bytes`, the same whether they come at once or one by one.
std::string complaint(std::string_view bytes, const kv::resp::limits& limits = {}) {
  std::string at_once;
  try {
    parse(bytes, limits);
  } catch (const protocol_error& error) {
    at_once = error.what();
  }
  std::string one_by_one;
  try {
    parser reader(limits);
    for (const char byte : bytes) {
      reader.feed({&byte, 1});
      all_of(reader);
    }
  } catch (const protocol_error& error) {
    one_by_one = error.what();
  }
  CHECK(at_once == one_by_one);
  return at_once;
}

std::string binary(std::size_t length) {
  std::mt19937 random(1);
  std::string bytes(length, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

class client {
 public:
  std::string operator()(std::initializer_list<std::string> request) { return store_.execute(command(request)); }

 private:
  kv::store store_;
};

}  // namespace

TEST_CASE("kv: arrays and inline commands are requests") {
  CHECK(parse("*1\r\n$4\r\nPING\r\n") == std::vector<command>{{"PING"}});
  CHECK(parse("PING\r\n") == std::vector<command>{{"PING"}});
  CHECK(parse("PING\n") == std::vector<command>{{"PING"}});
  CHECK(parse("  set  key\tvalue \r\n") == std::vector<command>{{"set", "key", "value"}});
  CHECK(parse("*2\r\n$3\r\nGET\r\n$0\r\n\r\n") == std::vector<command>{{"GET", ""}});
  CHECK(parse("*3\r\n$3\r\nSET\r\n$2\r\n\r\n\r\n$1\r\n\0\r\n"s) == std::vector<command>{{"SET", "\r\n", "\0"s}});
}

TEST_CASE("kv: what asks for nothing gets no answer") {
  CHECK(parse("").empty());
  CHECK(parse("\r\n\n   \r\n").empty());
  CHECK(parse("*0\r\n*-1\r\n").empty());
  CHECK(parse("*0\r\nPING\r\n") == std::vector<command>{{"PING"}});
}

TEST_CASE("kv: inline words may be quoted") {
  CHECK(kv::resp::split_inline(R"(a "b c" 'd e')") == command{"a", "b c", "d e"});
  CHECK(kv::resp::split_inline(R"("\x00\xfF\n\"\\" 'it\'s' "")") == command{"\0\xff\n\"\\"s, "it's", ""});
  CHECK(kv::resp::split_inline(R"("\xzz")") == command{"xzz"});
  for (const auto* unbalanced : {R"("a)", R"('a)", R"("a"b)", R"('a'b)", R"("a\)", R"("\x4)"}) {
    CHECK_THROWS_WITH_AS(kv::resp::split_inline(unbalanced), "Protocol error: unbalanced quotes in request",
                         protocol_error);
  }
}

TEST_CASE("kv: a pipelined stream is understood wherever it is split") {
  const std::vector<command> expected{
      {"SET", "key", binary(40)}, {"PING"}, {"GET", "key"}, {"MGET", "", "\r\n", "*3\r\n"}, {"DEL", "a", "b"}};
  const auto stream = kv::resp::encode(expected[0]) + "PING\r\n" + kv::resp::encode(expected[2]) + "\r\n*0\r\n" +
                      kv::resp::encode(expected[3]) + "DEL a 'b'\n";
  for (std::size_t first = 0; first <= stream.size(); ++first) {
    for (std::size_t second = first; second <= stream.size(); ++second) {
      parser reader;
      std::vector<command> requests;
      for (const auto& piece : {stream.substr(0, first), stream.substr(first, second - first), stream.substr(second)}) {
        reader.feed(piece);
        std::ranges::move(all_of(reader), std::back_inserter(requests));
      }
      REQUIRE(requests == expected);
    }
  }
}

TEST_CASE("kv: a stream that is no RESP is refused in Redis' words") {
  CHECK(complaint("*a\r\n") == "Protocol error: invalid multibulk length");
  CHECK(complaint("*\r\n") == "Protocol error: invalid multibulk length");
  CHECK(complaint("*1 \r\n") == "Protocol error: invalid multibulk length");
  CHECK(complaint("*99999999999999999999\r\n") == "Protocol error: invalid multibulk length");
  CHECK(complaint("*1\r\nPING\r\n") == "Protocol error: expected '$', got 'P'");
  CHECK(complaint("*1\r\n*1\r\n") == "Protocol error: expected '$', got '*'");
  CHECK(complaint("*1\r\n\r\n") == "Protocol error: expected '$', got ' '");
  CHECK(complaint("*1\r\n$-1\r\n") == "Protocol error: invalid bulk length");
  CHECK(complaint("*1\r\n$x\r\n") == "Protocol error: invalid bulk length");
  CHECK(complaint("*1\r\n$99999999999999999999\r\n") == "Protocol error: invalid bulk length");
  CHECK(complaint("*1\r\n$4\r\nPINGPONG") == "Protocol error: expected CRLF after bulk");
  CHECK(complaint("\"\r\n") == "Protocol error: unbalanced quotes in request");
}

TEST_CASE("kv: requests have limits") {
  const kv::resp::limits limits{.line = 16, .bulk = 8, .arguments = 3, .request = 12};
  CHECK(complaint("*3\r\n$4\r\n1234\r\n$8\r\n12345678\r\n$0\r\n\r\n", limits) == "");
  CHECK(complaint("*4\r\n", limits) == "Protocol error: invalid multibulk length");
  CHECK(complaint("*1\r\n$9\r\n", limits) == "Protocol error: invalid bulk length");
  CHECK(complaint("*2\r\n$5\r\n12345\r\n$8\r\n", limits) == "Protocol error: too big request");
  CHECK(complaint(std::string(17, 'a'), limits) == "Protocol error: too big inline request");
  CHECK(complaint("*" + std::string(17, '1'), limits) == "Protocol error: too big mbulk count string");
  CHECK(complaint("*1\r\n$" + std::string(17, '1'), limits) == "Protocol error: too big bulk count string");
  CHECK(complaint(std::string(16, 'a') + "\n", limits) == "");
  // A line end makes no too long line acceptable.
  CHECK_THROWS_AS(parse(std::string(17, 'a') + "\n", limits), protocol_error);
}

TEST_CASE("kv: rubbish is refused or understood, and never more") {
  std::mt19937 random(2);
  const std::string_view alphabet = "*$0123456789-\r\n\r\n\"'x PINGSET\\";
  std::uniform_int_distribution<std::size_t> letter(0, alphabet.size() - 1);
  for (std::size_t round = 0; round < 20'000; ++round) {
    std::string rubbish(round % 50, '\0');
    for (char& byte : rubbish) byte = round % 2 == 0 ? alphabet[letter(random)] : static_cast<char>(random());
    try {
      for (const auto& request : parse(rubbish)) REQUIRE_FALSE(kv::store().execute(request).empty());
    } catch (const protocol_error&) {
    }
  }
}

TEST_CASE("kv: what is encoded is decoded, and nothing else is") {
  const command request{"SET", "", binary(1000)};
  CHECK(kv::resp::decode(kv::resp::encode(request)) == request);
  CHECK_THROWS_AS(kv::resp::decode(""), protocol_error);
  CHECK_THROWS_AS(kv::resp::decode("PING\r\nPING\r\n"), protocol_error);
}

TEST_CASE("kv: an error is one line, whatever it quotes") {
  std::string reply;
  kv::resp::append_error(reply, "ERR a\r\nb");
  CHECK(reply == "-ERR a  b\r\n");
}

TEST_CASE("kv: connections are answered") {
  client ask;
  CHECK(ask({"PING"}) == "+PONG\r\n");
  CHECK(ask({"ping", "hello"}) == "$5\r\nhello\r\n");
  CHECK(ask({"PING", "a", "b"}) == "-ERR wrong number of arguments for 'ping' command\r\n");
  CHECK(ask({"ECHO", "\r\n\0"s}) == "$3\r\n\r\n\0\r\n"s);
  CHECK(ask({"QUIT"}) == "+OK\r\n");
  CHECK(ask({"CLIENT", "SETNAME", "me"}) == "+OK\r\n");
  CHECK(ask({"CLIENT", "KILL"}) == "-ERR unknown subcommand 'KILL'. Try CLIENT HELP.\r\n");
  CHECK(ask({"CONFIG", "GET", "save"}) == "*2\r\n$4\r\nsave\r\n$0\r\n\r\n");
  CHECK(ask({"CONFIG", "GET", "APPENDONLY"}) == "*2\r\n$10\r\nappendonly\r\n$2\r\nno\r\n");
  CHECK(ask({"CONFIG", "GET", "no-such-thing"}) == "*0\r\n");
  CHECK(ask({"CONFIG", "GET", "*"}).starts_with("*6\r\n"));
  CHECK(ask({"CONFIG", "GET"}) == "-ERR wrong number of arguments for 'config|get' command\r\n");
  CHECK(ask({"CONFIG", "SET", "a", "b"}) == "-ERR unknown subcommand 'SET'. Try CONFIG HELP.\r\n");
}

TEST_CASE("kv: COMMAND tells what there is") {
  client ask;
  const auto count = ask({"COMMAND", "COUNT"});
  CHECK(count.starts_with(":"));
  CHECK(ask({"COMMAND"}).starts_with("*" + count.substr(1)));
  CHECK(ask({"COMMAND", "DOCS"}) == "*0\r\n");
  CHECK(ask({"COMMAND", "INFO", "get", "nothing"}) ==
        "*2\r\n*6\r\n$3\r\nget\r\n:2\r\n*1\r\n+readonly\r\n:1\r\n:1\r\n:1\r\n$-1\r\n");
  CHECK(ask({"COMMAND", "DANCE"}) == "-ERR unknown subcommand 'DANCE'. Try COMMAND HELP.\r\n");
}

TEST_CASE("kv: unknown commands and wrong numbers of arguments are refused in Redis' words") {
  client ask;
  CHECK(ask({"FOO", "a", "b c"}) == "-ERR unknown command 'FOO', with args beginning with: 'a' 'b c' \r\n");
  CHECK(ask({"FOO"}) == "-ERR unknown command 'FOO', with args beginning with: \r\n");
  CHECK(ask({""}) == "-ERR unknown command '', with args beginning with: \r\n");
  CHECK(ask({"FOO\r\n"}) == "-ERR unknown command 'FOO  ', with args beginning with: \r\n");
  CHECK(ask({std::string(1'000'000, 'x'), std::string(1'000'000, 'y'), "z"}).size() < 400);
  CHECK(ask({"GET"}) == "-ERR wrong number of arguments for 'get' command\r\n");
  CHECK(ask({"Get", "a", "b"}) == "-ERR wrong number of arguments for 'get' command\r\n");
  CHECK(ask({"DBSIZE", "a"}) == "-ERR wrong number of arguments for 'dbsize' command\r\n");
  for (const auto* name : {"set", "del", "exists", "mget", "incr", "echo", "config", "client"}) {
    CHECK(ask({name}) == fmt::format("-ERR wrong number of arguments for '{}' command\r\n", name));
  }
}

TEST_CASE("kv: values are kept, byte for byte") {
  client ask;
  const auto key = binary(64 * 1024);
  const auto value = binary(512 * 1024);
  CHECK(ask({"GET", key}) == "$-1\r\n");
  CHECK(ask({"SET", key, value}) == "+OK\r\n");
  CHECK(ask({"GET", key}) == "$524288\r\n" + value + "\r\n");
  CHECK(ask({"SET", "", ""}) == "+OK\r\n");
  CHECK(ask({"GET", ""}) == "$0\r\n\r\n");
  CHECK(ask({"DBSIZE"}) == ":2\r\n");
  CHECK(ask({"EXISTS", "", "", "none"}) == ":2\r\n");
  CHECK(ask({"DEL", "", "", "none", key}) == ":2\r\n");
  CHECK(ask({"DBSIZE"}) == ":0\r\n");
}

TEST_CASE("kv: SET knows NX and XX") {
  client ask;
  CHECK(ask({"SET", "k", "1", "XX"}) == "$-1\r\n");
  CHECK(ask({"SET", "k", "1", "nx"}) == "+OK\r\n");
  CHECK(ask({"SET", "k", "2", "NX"}) == "$-1\r\n");
  CHECK(ask({"GET", "k"}) == "$1\r\n1\r\n");
  CHECK(ask({"SET", "k", "2", "xx"}) == "+OK\r\n");
  CHECK(ask({"GET", "k"}) == "$1\r\n2\r\n");
  CHECK(ask({"SET", "k", "3", "NX", "XX"}) == "-ERR syntax error\r\n");
  CHECK(ask({"SET", "k", "3", "EX", "10"}) == "-ERR syntax error\r\n");
  CHECK(ask({"GET", "k"}) == "$1\r\n2\r\n");
}

TEST_CASE("kv: INCR counts, and refuses what is no integer") {
  client ask;
  CHECK(ask({"INCR", "n"}) == ":1\r\n");
  CHECK(ask({"INCR", "n"}) == ":2\r\n");
  CHECK(ask({"GET", "n"}) == "$1\r\n2\r\n");
  ask({"SET", "n", "-1"});
  CHECK(ask({"INCR", "n"}) == ":0\r\n");
  for (const auto* text : {"", "a", "1a", " 1", "1 ", "+1", "01", "-0", "1.0", "9223372036854775808"}) {
    ask({"SET", "n", text});
    CHECK(ask({"INCR", "n"}) == "-ERR value is not an integer or out of range\r\n");
    CHECK(ask({"GET", "n"}) == fmt::format("${}\r\n{}\r\n", std::string_view(text).size(), text));
  }
  ask({"SET", "n", "9223372036854775806"});
  CHECK(ask({"INCR", "n"}) == ":9223372036854775807\r\n");
  CHECK(ask({"INCR", "n"}) == "-ERR increment or decrement would overflow\r\n");
}

TEST_CASE("kv: MGET answers for each key, and has a limit") {
  client ask;
  ask({"SET", "a", "1"});
  CHECK(ask({"MGET", "a", "b", "a"}) == "*3\r\n$1\r\n1\r\n$-1\r\n$1\r\n1\r\n");
  ask({"SET", "big", binary(512 * 1024)});
  CHECK(ask({"MGET", "big", "big", "big"}).size() > 3 * 512 * 1024);
  CHECK(ask({"MGET", "big", "big", "big", "big"}) == "-ERR reply is longer than 2097152 bytes\r\n");
}

TEST_CASE("kv: a message of any length survives being cut into slots") {
  for (const std::size_t length : {std::size_t{0}, std::size_t{1}, kv::slot::room - 1, kv::slot::room,
                                   kv::slot::room + 1, 2 * kv::slot::room, std::size_t{100'000}}) {
    const auto bytes = binary(length);
    std::vector<kv::slot> slots;
    kv::cut({.session = 7, .request = 9}, bytes, slots);
    CHECK(slots.size() == std::max<std::size_t>(1, (length + kv::slot::room - 1) / kv::slot::room));

    kv::assembler incoming;
    for (std::size_t i = 0; i + 1 < slots.size(); ++i) REQUIRE_FALSE(incoming.add(slots[i]));
    const auto whole = incoming.add(slots.back());
    REQUIRE(whole);
    CHECK(whole->to == kv::address{7, 9});
    CHECK(whole->bytes == bytes);
  }
}

TEST_CASE("kv: messages follow each other") {
  std::vector<kv::slot> slots;
  for (std::uint64_t i = 0; i < 100; ++i) kv::cut({.session = 1, .request = i}, binary(i * 50), slots);
  kv::assembler incoming;
  std::uint64_t next = 0;
  for (const auto& slot : slots) {
    const auto whole = incoming.add(slot);
    if (!whole) continue;
    CHECK(whole->to.request == next);
    CHECK(whole->bytes == binary(next * 50));
    ++next;
  }
  CHECK(next == 100);
}

TEST_CASE("kv: slots that make no message are refused") {
  std::vector<kv::slot> slots;
  kv::cut({.session = 1, .request = 1}, binary(3 * kv::slot::room), slots);
  const auto refused = [&](auto spoil) {
    auto spoilt = slots;
    spoil(spoilt);
    kv::assembler incoming;
    for (const auto& slot : spoilt) incoming.add(slot);
  };
  CHECK_NOTHROW(refused([](auto&) {}));
  CHECK_THROWS_AS(refused([](auto& s) { s.erase(s.begin()); }), std::runtime_error);
  CHECK_THROWS_AS(refused([](auto& s) { s.erase(s.begin() + 1); }), std::runtime_error);
  CHECK_THROWS_AS(refused([](auto& s) { s[1].first = 1; }), std::runtime_error);
  CHECK_THROWS_AS(refused([](auto& s) { s[1].last = 1; }), std::runtime_error);
  CHECK_THROWS_AS(refused([](auto& s) { s[1].to.session = 2; }), std::runtime_error);
  CHECK_THROWS_AS(refused([](auto& s) { s[1].to.request = 2; }), std::runtime_error);
  CHECK_THROWS_AS(refused([](auto& s) { s[1].total = 1; }), std::runtime_error);
  CHECK_THROWS_AS(refused([](auto& s) { s[1].length = kv::slot::room + 1; }), std::runtime_error);
  CHECK_THROWS_AS(refused([](auto& s) { s[1].length = std::numeric_limits<std::uint16_t>::max(); }),
                  std::runtime_error);
  CHECK_THROWS_AS(refused([](auto& s) { s[0].total = std::numeric_limits<std::uint32_t>::max(); }), std::runtime_error);
  CHECK_THROWS_AS(refused([](auto& s) { s.push_back(s[1]); }), std::runtime_error);
}
