// Listeners, and those who connect to them, in one process: every form, the socket's name, and strangers of every kind.
// Other processes and users, and deaths, are in tests/unix.cpp.
#include <strait/asio.hpp>

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/co_spawn.hpp>
#include <asio/detached.hpp>
#include <asio/io_context.hpp>
#include <asio/use_future.hpp>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <exception>
#include <fstream>
#include <future>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "coroutines.hpp"
#include "segment_files.hpp"
#include "strangers.hpp"

import strait;

namespace {

using namespace std::chrono_literals;
using test::bytes_of_welcome;
using test::check_refused;
using test::own_directory;
using test::raw_client;
using test::raw_listener;
using test::raw_socket;

struct request {
  std::uint64_t number;
};
struct reply {
  std::uint64_t number;
  std::uint64_t square;
};

using door_type = strait::listener<request, reply>;
using peer_type = strait::duplex<request, reply>;
using link_type = strait::duplex<reply, request>;

}  // namespace

template <>
struct strait::message_traits<request> {
  static constexpr std::string_view name = "door.request";
  static constexpr std::uint32_t version = 1;
};
template <>
struct strait::message_traits<reply> {
  static constexpr std::string_view name = "door.reply";
  static constexpr std::uint32_t version = 3;
};

namespace {

std::chrono::steady_clock::time_point soon() {
  return std::chrono::steady_clock::now() + 30s;
}

std::error_code system(int error) {
  return {error, std::system_category()};
}
bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

/// Answers requests until the client closes.
void serve(peer_type peer) {
  while (const auto asked = peer.blocking_recv()) peer.blocking_send({asked->number, asked->number * asked->number});
}

void ask(link_type& link, std::uint64_t count) {
  for (std::uint64_t i = 0; i < count; ++i) {
    link.blocking_send({i});
    const auto answer = link.blocking_recv_until(soon());
    REQUIRE(answer);
    REQUIRE(answer->square == i * i);
  }
}

strait::task<> serve_all(door_type& door, int peers, std::atomic<int>& served) {
  for (int i = 0; i < peers; ++i) {
    auto peer = co_await door.accept();
    while (const auto asked = co_await peer.recv()) co_await peer.send({asked->number, asked->number * asked->number});
    ++served;
  }
}

strait::task<> ask_in_task(std::string name, std::uint64_t count, std::atomic<std::uint64_t>& right) {
  auto link = co_await strait::connect<reply, request>(name);
  for (std::uint64_t i = 0; i < count; ++i) {
    co_await link.send({i});
    const auto answer = co_await link.recv();
    if (answer && answer->square == i * i) ++right;
  }
}

asio::awaitable<void> ask_in_asio(std::string name, std::uint64_t count, std::atomic<std::uint64_t>& right) {
  std::error_code error;
  auto link = co_await strait::connect<reply, request>(name, error);
  CHECK_FALSE(error);
  for (std::uint64_t i = 0; i < count; ++i) {
    co_await link.send({i}, error);
    const auto answer = co_await link.recv(error);
    if (answer && answer->square == i * i) ++right;
  }
}

}  // namespace

TEST_CASE("a client connects, both sides talk, and nothing is left") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  {
    door_type door{name};
    struct ::stat socket{};
    REQUIRE(::lstat(here.path("app.sock").c_str(), &socket) == 0);
    CHECK(S_ISSOCK(socket.st_mode));
    CHECK((socket.st_mode & 07777U) == 0600);
    std::thread server{[&] { serve(door.blocking_accept()); }};
    auto link = strait::blocking_connect<reply, request>(name);
    CHECK(link.peer().user == ::geteuid());
    CHECK(link.peer().process == static_cast<std::uint32_t>(::getpid()));
    ask(link, 1000);
    link.close();
    server.join();
    CHECK(door.refused() == 0);
  }
  CHECK(here.empty());
}

TEST_CASE("the ends of a pair are apart: one closes and the other goes on") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name};
  auto link = strait::blocking_connect<reply, request>(name);
  auto peer = door.blocking_accept_until(soon());
  CHECK(peer.peer().user == ::geteuid());
  link.out.close();
  CHECK_FALSE(peer.blocking_recv_until(soon()));
  peer.blocking_send({2, 4});
  const auto answer = link.blocking_recv_until(soon());
  REQUIRE(answer);
  CHECK(answer->square == 4);
  strait::receiver<reply> in = std::move(link.in);
  CHECK(peer.try_send({3, 9}));
  CHECK(in.blocking_recv_until(soon())->square == 9);
  in.close();
  std::error_code error;
  peer.blocking_send_until({4, 16}, soon(), error);
  CHECK(error == strait::errc::closed);
}

TEST_CASE("accept and connect are awaited in tasks and in asio::awaitable, in one context") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name};
  std::atomic<int> served{0};
  std::atomic<std::uint64_t> right{0};
  asio::io_context context{1};
  strait::spawn(context, serve_all(door, 2, served));
  strait::spawn(context, ask_in_task(name, 500, right));
  asio::co_spawn(context, ask_in_asio(name, 500, right), [](std::exception_ptr error) { CHECK_FALSE(error); });
  context.run();
  CHECK(served == 2);
  CHECK(right == 1000);
}

TEST_CASE("the ends of a connection wait on hubs of several contexts, parked and woken through the line") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  // Nobody spins: each message finds its receiver asleep in a reactor.
  door_type door{name, {.lanes = {.capacity = 8, .wait = strait::wait_policy::park}}};
  std::atomic<int> served{0};
  std::atomic<std::uint64_t> right{0};
  asio::io_context of_server{1};
  asio::io_context of_client{1};
  strait::spawn(of_server, serve_all(door, 1, served));
  asio::co_spawn(
      of_client,
      [](std::string to, std::atomic<std::uint64_t>& count) -> asio::awaitable<void> {
        auto link = co_await strait::connect<reply, request>(to, {.lanes = {.wait = strait::wait_policy::park}});
        CHECK(link.out.capacity() == 8);
        for (std::uint64_t i = 0; i < 1000; ++i) {
          co_await link.send({i});
          const auto answer = co_await link.recv();
          if (answer && answer->square == i * i) ++count;
        }
      }(name, right),
      [](std::exception_ptr error) { CHECK_FALSE(error); });
  std::thread server{[&] { of_server.run(); }};
  of_client.run();
  server.join();
  CHECK(right == 1000);
}

TEST_CASE("one end waits on one hub and then on another") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name, {.lanes = {.wait = strait::wait_policy::park}}};
  auto link = strait::blocking_connect<reply, request>(name);
  auto peer = door.blocking_accept_until(soon());
  for (std::uint64_t round = 0; round < 4; ++round) {
    // Each context is destroyed with its hub, whose bell's number is then nobody's.
    asio::io_context context{1};
    std::atomic<std::uint64_t> got{0};
    asio::co_spawn(
        context,
        [](peer_type& from, std::atomic<std::uint64_t>& into) -> asio::awaitable<void> {
          for (int i = 0; i < 3; ++i) into += (co_await from.recv())->number;
        }(peer, got),
        asio::detached);
    std::thread runner{[&] { context.run(); }};
    for (std::uint64_t i = 1; i <= 3; ++i) {
      link.blocking_send({i});
      REQUIRE(eventually([&] { return got == i * (i + 1) / 2; }));
    }
    runner.join();
  }
}

TEST_CASE("async_accept, async_connect, async_recv and async_send take completion tokens") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name};
  asio::io_context context{1};
  std::optional<peer_type> peer;
  std::optional<link_type> link;
  strait::async_accept(door, asio::bind_executor(context, [&](std::error_code error, peer_type came) {
                         CHECK_FALSE(error);
                         peer = std::move(came);
                       }));
  strait::async_connect<reply, request>(name, asio::bind_executor(context, [&](std::error_code error, link_type made) {
                                          CHECK_FALSE(error);
                                          link = std::move(made);
                                        }));
  context.run();
  REQUIRE(peer);
  REQUIRE(link);
  std::uint64_t got = 0;
  context.restart();
  strait::async_recv(*peer, asio::bind_executor(context, [&](std::error_code error, std::optional<request> asked) {
    CHECK_FALSE(error);
    got = asked ? asked->number : 0;
  }));
  strait::async_send(*link, request{42},
                     asio::bind_executor(context, [](std::error_code error) { CHECK_FALSE(error); }));
  context.run();
  CHECK(got == 42);
}

TEST_CASE("an accept that is cancelled loses nobody") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name};
  asio::io_context context{1};
  asio::cancellation_signal signal;
  std::error_code told;
  strait::async_accept(
      door, asio::bind_cancellation_slot(
                signal.slot(), asio::bind_executor(context, [&](std::error_code error, peer_type) { told = error; })));
  context.poll();
  signal.emit(asio::cancellation_type::terminal);
  context.run();
  CHECK(told == asio::error::operation_aborted);
  auto link = strait::blocking_connect<reply, request>(name);
  auto peer = door.blocking_accept_until(soon());
  link.blocking_send({1});
  CHECK(peer.blocking_recv_until(soon())->number == 1);
}

TEST_CASE("an attempt that is given up ends at once, answered or not") {
  const own_directory here;
  raw_listener silent{here.path("app.sock")};  // it accepts and never says anything
  const auto before = std::chrono::steady_clock::now();
  {
    auto never = strait::connect<reply, request>("unix:" + here.path("app.sock"));
    const raw_socket somebody = silent.accept();
  }
  CHECK(std::chrono::steady_clock::now() - before < 5s);
  std::error_code error;
  (void)strait::blocking_connect_until<reply, request>("unix:" + here.path("app.sock"),
                                                       std::chrono::steady_clock::now() + 20ms, error);
  CHECK(error == std::errc::timed_out);
}

TEST_CASE("accept and connect are selected, and bounded by a time") {
  const own_directory here;
  raw_listener silent{here.path("silent.sock")};
  door_type door{"unix:" + here.path("app.sock")};
  asio::io_context context{1};
  int late = 0;
  std::uint64_t got = 0;
  strait::spawn(
      context, [](own_directory const& in, door_type& at, int& timed_out, std::uint64_t& value) -> strait::task<> {
        try {
          (void)co_await (strait::connect<reply, request>("unix:" + in.path("silent.sock")) | strait::timeout(5ms));
        } catch (const std::system_error& error) {
          if (error.code() == std::errc::timed_out) ++timed_out;
        }
        std::error_code error;
        (void)co_await (at.accept(error) | strait::timeout(5ms));
        if (error == std::errc::timed_out) ++timed_out;
        auto [tx, rx] = strait::make_channel<int>();
        auto link = co_await strait::connect<reply, request>("unix:" + in.path("app.sock"));
        auto came = co_await strait::select(rx.recv(), at.accept());
        auto* peer = std::get_if<1>(&came.result);
        if (peer == nullptr) co_return;
        co_await link.send({21});
        value = (co_await peer->recv())->number;
      }(here, door, late, got));
  context.run();
  CHECK(late == 2);
  CHECK(got == 21);
}

TEST_CASE("forms that do not wait, or not for long") {
  const own_directory here;
  door_type door{"unix:" + here.path("app.sock")};
  CHECK_FALSE(door.try_accept());
  std::error_code error;
  (void)door.blocking_accept_until(std::chrono::steady_clock::now() + 5ms, error);
  CHECK(error == std::errc::timed_out);
  door.close();
  CHECK(door.is_closed());
  (void)door.blocking_accept(error);
  CHECK(error == strait::errc::closed);
  check_refused(strait::errc::closed, {}, [&] { (void)door.try_accept(); });
  asio::io_context context{1};
  std::error_code told;
  strait::async_accept(door, asio::bind_executor(context, [&](std::error_code why, peer_type) { told = why; }));
  context.run();
  CHECK(told == strait::errc::closed);
  CHECK(here.empty());
}

TEST_CASE("a client that was not accepted yet is hung up on when the listener closes") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  std::optional<door_type> door{name};
  auto link = strait::blocking_connect<reply, request>(name);
  door.reset();
  CHECK_FALSE(link.blocking_recv_until(soon()));
  check_refused(system(ENOENT), {}, [&] { (void)strait::blocking_connect<reply, request>(name); });
}

TEST_CASE("names: what cannot be a socket is refused, and so is a unix: name where none belongs") {
  const own_directory here;
  for (const char* bad : {"unix:", "unix:/", "unix:/tmp/.", "unix:/tmp/.."}) {
    CAPTURE(bad);
    check_refused(strait::errc::bad_name, {}, [&] { door_type door{bad}; });
    check_refused(strait::errc::bad_name, {}, [&] { (void)strait::blocking_connect<reply, request>(bad); });
  }
  check_refused(strait::errc::bad_name, {}, [&] { door_type door{"unix:/tmp/" + std::string(103, 'x')}; });
  check_refused(strait::errc::bad_name, {}, [&] { door_type door{"unix:/" + std::string(94, 'd') + "/x"}; });
  check_refused(strait::errc::unknown_scheme, {}, [&] { door_type door{"posix:orders"}; });
  check_refused(strait::errc::unknown_scheme, {},
                [&] { (void)strait::blocking_connect<reply, request>("posix:orders"); });
  check_refused(strait::errc::unknown_scheme, {},
                [&] { (void)strait::open_sender<request>("unix:" + here.path("app.sock")); });
  check_refused(system(ENOENT), {}, [&] { door_type door{"unix:" + here.path("no/such/directory")}; });
  check_refused(system(ENOENT), {},
                [&] { (void)strait::blocking_connect<reply, request>("unix:" + here.path("nobody")); });
  check_refused(strait::errc::bad_capacity, {}, [&] { door_type door{"unix:" + here.path("x"), {.backlog = 0}}; });
  CHECK(here.empty());
}

TEST_CASE("an abstract name needs no directory, and is one listener's at a time") {
  const std::string name = "unix:@strait-test-door-" + std::to_string(::getpid());
  {
    door_type door{name};
    check_refused(strait::errc::end_in_use, {name}, [&] { door_type other{name}; });
    auto link = strait::blocking_connect<reply, request>(name);
    auto peer = door.blocking_accept_until(soon());
    link.blocking_send({1});
    CHECK(peer.blocking_recv_until(soon())->number == 1);
  }
  check_refused(system(ECONNREFUSED), {}, [&] { (void)strait::blocking_connect<reply, request>(name); });
  door_type again{name};
}

TEST_CASE("the socket: a living listener's stays, a dead one's is replaced, anything else is not touched") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  SUBCASE("living") {
    door_type door{name};
    check_refused(strait::errc::end_in_use, {std::to_string(::getpid())}, [&] { door_type other{name}; });
    auto link = strait::blocking_connect<reply, request>(name);
    auto peer = door.blocking_accept_until(soon());
    link.blocking_send({7});
    CHECK(peer.blocking_recv_until(soon())->number == 7);
  }
  SUBCASE("dead, and one that died while it was made") {
    {
      const raw_listener left{here.path("app.sock")};
    }
    CHECK_FALSE(here.empty());
    check_refused(system(ECONNREFUSED), {}, [&] { (void)strait::blocking_connect<reply, request>(name); });
    {
      door_type door{name};
      auto link = strait::blocking_connect<reply, request>(name);
    }
    CHECK(here.empty());
  }
  SUBCASE("a plain file") {
    std::ofstream{here.path("app.sock")} << "precious";
    check_refused(strait::errc::foreign_segment, {"expected a socket or nothing"}, [&] { door_type door{name}; });
    check_refused(system(ECONNREFUSED), {}, [&] { (void)strait::blocking_connect<reply, request>(name); });
    std::string kept;
    std::ifstream{here.path("app.sock")} >> kept;
    CHECK(kept == "precious");
  }
  SUBCASE("a living socket of another kind") {
    const raw_listener stream{here.path("app.sock"), SOCK_STREAM};
    check_refused(strait::errc::foreign_segment, {}, [&] { door_type door{name}; });
    check_refused(strait::errc::foreign_segment, {}, [&] { (void)strait::blocking_connect<reply, request>(name); });
  }
  SUBCASE("one that was replaced by somebody else is left to him") {
    std::optional<door_type> door{name};
    REQUIRE(::unlink(here.path("app.sock").c_str()) == 0);
    door_type other{name};
    door.reset();
    auto link = strait::blocking_connect<reply, request>(name);
    (void)other.blocking_accept_until(soon());
  }
  SUBCASE("its mode is what was asked for, whatever the umask") {
    const ::mode_t mask = ::umask(077);
    door_type door{name, {.mode = 0666, .group = ::getegid()}};
    ::umask(mask);
    struct ::stat socket{};
    REQUIRE(::lstat(here.path("app.sock").c_str(), &socket) == 0);
    CHECK((socket.st_mode & 07777U) == 0666);
  }
}

TEST_CASE("two listeners start at once where a dead one's socket lies: one of them gets the name, and is reached") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  for (int round = 0; round < 20; ++round) {
    {
      const raw_listener left{here.path("app.sock")};
    }
    std::atomic<int> refused{0};
    std::array<std::optional<door_type>, 2> doors;
    std::vector<std::thread> starters;
    for (auto& door : doors) {
      starters.emplace_back([&] {
        try {
          door.emplace(name);
        } catch (const std::system_error& error) {
          if (error.code() == strait::errc::end_in_use) ++refused;
        }
      });
    }
    for (auto& starter : starters) starter.join();
    REQUIRE(refused == 1);
    auto link = strait::blocking_connect<reply, request>(name);
    (void)(doors[0] ? *doors[0] : *doors[1]).blocking_accept_until(soon());
  }
}

TEST_CASE("a client with other types, or another capacity, is told both sides") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name, {.lanes = {.capacity = 64}}};
  check_refused(strait::errc::type_mismatch,
                {"expected to send type \"door.reply\" version 3 of 16 bytes aligned to 8",
                 "found a client of type \"door.request\" version 1 of 8 bytes aligned to 8"},
                [&] { (void)strait::blocking_connect<request, request>(name); });
  check_refused(strait::errc::layout_mismatch, {"expected a capacity of 128 messages, found 64"},
                [&] { (void)strait::blocking_connect<reply, request>(name, {.lanes = {.capacity = 128}}); });
  std::error_code error;
  (void)strait::blocking_connect<request, request>(name, error);
  CHECK(error == strait::errc::type_mismatch);
  asio::io_context context{1};
  std::error_code told;
  strait::async_connect<request, request>(
      name, asio::bind_executor(context, [&](std::error_code why, strait::duplex<request, request>) { told = why; }));
  context.run();
  CHECK(told == strait::errc::type_mismatch);
  auto link = strait::blocking_connect<reply, request>(name, {.lanes = {.capacity = 64}});
  CHECK(link.in.capacity() == 64);
}

TEST_CASE("fences for those who may not call membarrier: the client's wish is the channel's") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name};
  std::thread server{[&] { serve(door.blocking_accept()); }};
  auto link = strait::blocking_connect<reply, request>(name, {.lanes = {.order = strait::ordering::fence}});
  ask(link, 200);
  link.close();
  server.join();
}

// ---- strangers at the listener --------------------------------------------------------------------------------------

TEST_CASE("clients that say nothing are in nobody's way, and are hung up on in time") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name, {.backlog = 4, .handshake = 60s}};
  std::vector<raw_socket> silent;
  for (int i = 0; i < 12; ++i) silent.push_back(raw_socket::connected(here.path("app.sock")));
  // Their time is far from up, and there are three times as many as may be on their way in.
  std::error_code error;
  auto link = strait::blocking_connect_until<reply, request>(name, std::chrono::steady_clock::now() + 20s, error);
  REQUIRE_FALSE(error);
  auto peer = door.blocking_accept_until(soon());
  link.blocking_send({5});
  CHECK(peer.blocking_recv_until(soon())->number == 5);
  CHECK(silent.front().hung_up());
  CHECK(door.refused() >= 8);

  const own_directory there;
  door_type impatient{"unix:" + there.path("app.sock"), {.handshake = 30ms}};
  raw_socket slow = raw_socket::connected(there.path("app.sock"));
  CHECK(slow.hung_up());
  raw_client half{there.path("app.sock")};
  half.greet<request, reply>();
  CHECK(half.take_welcome() == 3);
  CHECK(half.socket.hung_up());  // never said that it is in
  CHECK(eventually([&] { return impatient.refused() == 2; }));
}

TEST_CASE("clients that say rubbish, hang up half-way or bring descriptors are let go, and the next is served") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name};
  std::uint64_t refused = 0;
  const auto is_refused = [&] {
    ++refused;
    return eventually([&] { return door.refused() == refused; });
  };
  raw_socket rubbish = raw_socket::connected(here.path("app.sock"));
  rubbish.say(std::vector<std::byte>(184, std::byte{0xa5}));
  CHECK(rubbish.hung_up());
  CHECK(is_refused());
  raw_socket brief = raw_socket::connected(here.path("app.sock"));
  brief.say(std::vector<std::byte>(3));
  CHECK(brief.hung_up());
  CHECK(is_refused());
  raw_socket endless = raw_socket::connected(here.path("app.sock"));
  endless.say(std::vector<std::byte>(100'000));
  CHECK(endless.hung_up());
  CHECK(is_refused());
  {
    raw_socket gone = raw_socket::connected(here.path("app.sock"));
  }
  CHECK(is_refused());
  {
    raw_client half{here.path("app.sock")};
    half.greet<request, reply>();
    CHECK(half.take_welcome() == 3);
  }
  CHECK(is_refused());
  raw_client other{here.path("app.sock")};
  other.greet<request, reply>();
  CHECK(other.take_welcome() == 3);
  other.socket.say(std::vector<std::byte>(8, std::byte{1}));  // not what should come now
  CHECK(other.socket.hung_up());
  CHECK(is_refused());
  const std::size_t before = test::open_descriptors();
  raw_socket laden = raw_socket::connected(here.path("app.sock"));
  laden.say(std::vector<std::byte>(184, std::byte{0xa5}), std::vector<int>(32, 0));
  CHECK(laden.hung_up());
  CHECK(is_refused());
  CHECK(test::open_descriptors() == before + 1);  // the socket `laden`; none of the 32 has stayed
  raw_client old{here.path("app.sock")};
  old.greet<request, reply>(2);  // another protocol
  CHECK(old.take_welcome() == 0);
  CHECK(contains(old.reason, "expected a client of protocol 1"));
  CHECK(is_refused());

  auto link = strait::blocking_connect<reply, request>(name);
  auto peer = door.blocking_accept_until(soon());
  link.blocking_send({9});
  CHECK(peer.blocking_recv_until(soon())->number == 9);
}

TEST_CASE("more peers than the backlog wait in the kernel until somebody accepts") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name, {.lanes = {.capacity = 1}, .backlog = 2}};
  std::vector<std::thread> clients;
  std::atomic<int> answered{0};
  for (int i = 0; i < 12; ++i) {
    clients.emplace_back([&] {
      auto link = strait::blocking_connect<reply, request>(name);
      ask(link, 1);
      ++answered;
    });
  }
  for (int i = 0; i < 12; ++i) serve(door.blocking_accept_until(soon()));
  for (auto& client : clients) client.join();
  CHECK(answered == 12);
}

TEST_CASE("without descriptors the listener neither spins nor ends, and goes on when there are some") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name};
  raw_client waiting{here.path("app.sock")};  // in the kernel's queue or in: its descriptor is there
  REQUIRE(eventually([&] {
    waiting.greet<request, reply>();
    return waiting.take_welcome() == 3;
  }));
  raw_socket caller = raw_socket::made();
  const test::no_descriptors_left none;
  REQUIRE(caller.connect(here.path("app.sock")));
  const auto cpu = [] {
    ::rusage used{};
    ::getrusage(RUSAGE_SELF, &used);
    return std::chrono::seconds{used.ru_utime.tv_sec + used.ru_stime.tv_sec} +
           std::chrono::microseconds{used.ru_utime.tv_usec + used.ru_stime.tv_usec};
  };
  const auto before = cpu();
  std::this_thread::sleep_for(300ms);  // time is what is measured here
  CHECK(cpu() - before < 100ms);
  none.give_back();
  std::error_code error;
  auto link = strait::blocking_connect_until<reply, request>(name, soon(), error);
  CHECK_FALSE(error);
}

// ---- strangers who listen -------------------------------------------------------------------------------------------

TEST_CASE("a client believes nothing of what is handed over") {
  const own_directory here;
  const std::string path = here.path("app.sock");
  raw_listener listens{path};
  /// What a client says to a listener that answers like this.
  const auto client_meets = [&](const std::vector<std::byte>& answer, const std::vector<int>& descriptors) {
    std::thread listening{[&] {
      raw_socket client = listens.accept();
      (void)client.hears(1000);
      client.say(answer, descriptors);
      (void)client.hung_up();
    }};
    std::string text;
    std::error_code code;
    try {
      (void)strait::blocking_connect_until<reply, request>("unix:" + path, soon());
    } catch (const std::system_error& error) {
      code = error.code();
      text = error.what();
    }
    listening.join();
    return std::pair{code, text};
  };
  const auto expect = [&](const std::pair<std::error_code, std::string>& met, strait::errc code,
                          std::string_view part) {
    CHECK_MESSAGE(met.first == code, met.second);
    CHECK_MESSAGE(contains(met.second, part), met.second);
  };
  const strait::memory_name name = strait::parse_memory_name("unix:" + path);
  const auto lane = [&](strait::role mine, const strait::message_shape& shape) {
    return strait::endpoint::make_handed_over(mine, name, shape, {.capacity = 16}, true);
  };
  auto there = lane(strait::role::receiver, strait::shape_of<request>);
  auto back = lane(strait::role::sender, strait::shape_of<reply>);
  std::array<int, 2> line{};
  REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, line.data()) == 0);
  std::array<int, 2> pipe{};
  REQUIRE(::pipe2(pipe.data(), O_CLOEXEC) == 0);
  const raw_listener crowded{here.path("crowded.sock")};
  const raw_socket caller = raw_socket::connected(here.path("crowded.sock"));
  const int a = there.memory.get();
  const int b = back.memory.get();
  const std::size_t before = test::open_descriptors();

  const auto welcome = bytes_of_welcome();
  expect(client_meets(std::vector<std::byte>(12), {}), strait::errc::foreign_segment, "answers something else");
  expect(client_meets(welcome, {}), strait::errc::foreign_segment, "expected 3 descriptors to be handed over, found 0");
  expect(client_meets(welcome, {a, b}), strait::errc::foreign_segment, "found 2");
  expect(client_meets(welcome, {a, b, line[1], a}), strait::errc::foreign_segment, "found 4");
  expect(client_meets(welcome, std::vector<int>(40, a)), strait::errc::foreign_segment, "found more");
  expect(client_meets(welcome, {pipe[0], b, line[1]}), strait::errc::foreign_segment, "a descriptor of another kind");
  expect(client_meets(welcome, {a, b, pipe[0]}), strait::errc::foreign_segment, "a connected Unix socket");
  // Nor one that nobody can take its rings from: it would be readable for ever.
  auto more_there = lane(strait::role::receiver, strait::shape_of<request>);
  auto more_back = lane(strait::role::sender, strait::shape_of<reply>);
  expect(client_meets(welcome, {more_there.memory.get(), more_back.memory.get(), crowded.get()}),
         strait::errc::foreign_segment, "a connected Unix socket");
  more_there = {};
  more_back = {};
  // The first try above entered memory `a` and left it, so the sender has closed; each needs memory of its own.
  there = lane(strait::role::receiver, strait::shape_of<request>);
  expect(client_meets(welcome, {back.memory.get(), there.memory.get(), line[1]}), strait::errc::type_mismatch,
         "expected type \"door.request\"");

  // Memory whose size somebody can still change, or whose header lies about it.
  const auto forged = [&](int seals, ::off_t size, bool allocated, auto change) {
    const int made = ::memfd_create("forged", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    auto honest = lane(strait::role::receiver, strait::shape_of<request>);
    std::vector<std::byte> header(sizeof(strait::segment_header));
    REQUIRE(::pread(honest.memory.get(), header.data(), header.size(), 0) == static_cast<::ssize_t>(header.size()));
    change(*reinterpret_cast<strait::segment_header*>(header.data()));
    if (size < 0) size = static_cast<::off_t>(sizeof(strait::segment_header) + 16 * sizeof(request));
    REQUIRE(::ftruncate(made, size) == 0);
    if (allocated) REQUIRE(::fallocate(made, 0, 0, size) == 0);
    const auto n = std::min<std::size_t>(header.size(), static_cast<std::size_t>(size));
    REQUIRE(::pwrite(made, header.data(), n, 0) == static_cast<::ssize_t>(n));
    if (seals != 0) REQUIRE(::fcntl(made, F_ADD_SEALS, seals) == 0);
    const auto met = client_meets(welcome, {made, b, line[1]});
    ::close(made);
    return met;
  };
  constexpr int sealed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  const auto same = [](strait::segment_header&) {};
  expect(forged(0, -1, true, same), strait::errc::foreign_segment, "found it sealed against nothing");
  expect(forged(F_SEAL_GROW | F_SEAL_SEAL, -1, true, same), strait::errc::foreign_segment, "growing, further seals");
  expect(forged(F_SEAL_SHRINK | F_SEAL_GROW, -1, true, same), strait::errc::foreign_segment, "shrinking, growing");
  expect(forged(sealed, 4, true, same), strait::errc::foreign_segment, "does not begin like one");
  expect(forged(sealed, 400, true, same), strait::errc::truncated_segment, "found 400");
  expect(forged(sealed, sizeof(strait::segment_header) + 8, true, same), strait::errc::truncated_segment, "found 904");
  expect(forged(sealed, 1 << 20, true, same), strait::errc::layout_mismatch, "found 1048576");
  expect(forged(sealed, -1, true, [](strait::segment_header& h) { h.magic = 1; }), strait::errc::foreign_segment, "");
  expect(forged(sealed, -1, true, [](strait::segment_header& h) { h.layout_version += 1; }),
         strait::errc::version_mismatch, "layout version");
  expect(forged(sealed, -1, true, [](strait::segment_header& h) { h.capacity = 17; }), strait::errc::layout_mismatch,
         "agree with each other");
  expect(forged(sealed, -1, true, [](strait::segment_header& h) { h.message_version = 2; }),
         strait::errc::type_mismatch, "version 2");
  // A hole costs its maker nothing, and whoever touches it everything.
  const auto vast = [](strait::segment_header& h) {
    h.capacity = 1 << 22;
    h.segment_bytes = h.slots_offset + h.capacity * h.message_bytes;
  };
  expect(forged(sealed, sizeof(strait::segment_header) + (1 << 25), false, vast), strait::errc::truncated_segment,
         "and holes");
  CHECK(test::open_descriptors() == before);
  for (const int one : {line[0], line[1], pipe[0], pipe[1]}) ::close(one);
}

TEST_CASE("a listener that hangs up in the middle is one error, whenever it does") {
  const own_directory here;
  const std::string path = here.path("app.sock");
  raw_listener listens{path};
  const strait::memory_name name = strait::parse_memory_name("unix:" + path);
  const auto lane = [&](strait::role mine, const strait::message_shape& shape) {
    return strait::endpoint::make_handed_over(mine, name, shape, {.capacity = 16}, true);
  };
  const auto client_meets = [&](auto answer) {
    std::thread listening{[&] { answer(listens.accept()); }};
    check_refused(system(ECONNRESET), {},
                  [&] { (void)strait::blocking_connect_until<reply, request>("unix:" + path, soon()); });
    listening.join();
  };
  client_meets([](raw_socket) {});
  client_meets([](raw_socket client) { (void)client.hears(1000); });
  client_meets([](raw_socket client) { (void)client.hears(4); });
  // With everything that a client needs, and gone before it says that it is in.
  client_meets([&](raw_socket client) {
    (void)client.hears(1000);
    auto there = lane(strait::role::receiver, strait::shape_of<request>);
    auto back = lane(strait::role::sender, strait::shape_of<reply>);
    std::array<int, 2> line{};
    REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, line.data()) == 0);
    const raw_socket ours{line[0]};
    const raw_socket theirs{line[1]};
    ::shutdown(client.get(), SHUT_RD);
    client.say(bytes_of_welcome(), {there.memory.get(), back.memory.get(), theirs.get()});
  });
}

// ---- strangers who got in -------------------------------------------------------------------------------------------

TEST_CASE("a peer that fills, or half closes, its line makes nobody wait") {
  const own_directory here;
  const std::string path = here.path("app.sock");
  door_type door{"unix:" + path, {.lanes = {.capacity = 64, .wait = strait::wait_policy::park}}};
  raw_client stranger{path};
  stranger.greet<request, reply>();
  REQUIRE(stranger.take_welcome() == 3);
  stranger.enter();
  auto peer = door.blocking_accept_until(soon());

  // It says that it sleeps, reads no rings, and never looks: each of our sends rings.
  strait::segment_header& back = stranger.header(1);
  auto& receiver = back.ends[static_cast<std::size_t>(strait::role::receiver)];
  for (std::uint64_t i = 0; i < 5'000; ++i) {
    receiver.presence = static_cast<std::uint32_t>(strait::presence::hub_parked);
    back.lane.head = back.lane.tail.load();
    peer.blocking_send({i, i});
  }
  CHECK(back.lane.tail == 5'000);

  // It fills our line, and then says no more: a hub sleeps all the same, and other channels of it are served.
  while (stranger.socket.try_say_byte()) {
  }
  asio::io_context context{1};
  std::atomic<std::uint64_t> got{0};
  std::error_code error;
  asio::co_spawn(
      context,
      [](peer_type& from, std::error_code& why, std::atomic<std::uint64_t>& into) -> asio::awaitable<void> {
        while (auto asked = co_await from.recv(why)) into = asked->number;
      }(peer, error, got),
      asio::detached);
  std::thread runner{[&] { context.run(); }};
  strait::segment_header& there = stranger.header(0);
  auto& waiting = there.ends[static_cast<std::size_t>(strait::role::receiver)].presence;
  REQUIRE(eventually([&] { return parked(waiting); }));
  stranger.publish(request{77});        // without a ring: the hub sleeps until something else wakes it
  stranger.socket.shut_down_writing();  // nobody holds its lock
  runner.join();
  CHECK(got == 77);
  CHECK(error == strait::errc::peer_died);
}

TEST_CASE("a death is told once at each end, and then that it is closed; a lock that is held keeps a peer alive") {
  const own_directory here;
  const std::string path = here.path("app.sock");
  door_type door{"unix:" + path};
  raw_client stranger{path};
  stranger.come_in<request, reply>();
  auto peer = door.blocking_accept_until(soon());
  stranger.publish(request{1});
  stranger.hang_up();  // the lines end, the locks are held: it may live
  std::error_code error;
  CHECK(peer.blocking_recv(error)->number == 1);
  CHECK_FALSE(peer.blocking_recv_until(std::chrono::steady_clock::now() + 50ms, error));
  CHECK(error == std::errc::timed_out);
  CHECK(peer.try_send({1, 1}, error));
  stranger.drop_locks();
  CHECK_FALSE(peer.blocking_recv_until(soon(), error));
  CHECK(error == strait::errc::peer_died);
  CHECK_FALSE(peer.blocking_recv_until(soon(), error));
  CHECK_FALSE(error);  // the end of the stream
  CHECK(peer.in.is_closed());
  CHECK(eventually([&] {
    (void)peer.try_send({1, 1}, error);
    return error == strait::errc::peer_died;
  }));
  // Whoever still has the memory may say what it likes.
  stranger.header(1).ends[1].presence = static_cast<std::uint32_t>(strait::presence::awake);
  stranger.header(1).lane.head = 0;
  for (std::uint64_t i = 0; i < 5'000 && error != strait::errc::closed; ++i) (void)peer.try_send({i, i}, error);
  CHECK(error == strait::errc::closed);
}

TEST_CASE("a peer that pretends to have died, or closed, has, whatever it writes afterwards") {
  const own_directory here;
  const std::string path = here.path("app.sock");
  door_type door{"unix:" + path, {.lanes = {.capacity = 16}}};
  for (const bool dies : {true, false}) {
    CAPTURE(dies);
    raw_client stranger{path};
    stranger.come_in<request, reply>();
    auto peer = door.blocking_accept_until(soon());
    auto& mine = stranger.header(0).ends[0];
    std::error_code error;
    if (dies) {
      mine.last_death = 1;
      CHECK_FALSE(peer.blocking_recv_until(soon(), error));
      CHECK(error == strait::errc::peer_died);
      mine.last_death = 2;  // and once more
    } else {
      mine.presence = static_cast<std::uint32_t>(strait::presence::closed);
      CHECK_FALSE(peer.blocking_recv_until(soon(), error));
      CHECK_FALSE(error);
      mine.presence = static_cast<std::uint32_t>(strait::presence::awake);
    }
    for (int i = 0; i < 3; ++i) {
      CHECK_FALSE(peer.blocking_recv_until(std::chrono::steady_clock::now() + 1s, error));
      CHECK_FALSE(error);  // the end of the stream
      CHECK(peer.in.is_closed());
    }
  }
}

TEST_CASE("a peer that writes what cannot be poisons its channel for good, and only that") {
  const own_directory here;
  const std::string path = here.path("app.sock");
  door_type door{"unix:" + path, {.lanes = {.capacity = 16}}};
  const auto met_by = [&](auto change) {
    raw_client stranger{path};
    stranger.come_in<request, reply>();
    auto peer = door.blocking_accept_until(soon());
    const auto restore = change(stranger);
    std::error_code error;
    (void)peer.blocking_recv_until(soon(), error);
    CHECK(error == strait::errc::corrupt);
    restore();
    (void)peer.blocking_recv_until(soon(), error);
    CHECK(error == strait::errc::corrupt);
  };
  met_by([](raw_client& stranger) {
    stranger.header(0).lane.tail = 17;
    return [&stranger] {
      stranger.header(0).lane.tail = 0;
      stranger.header(0).poisoned = 0;
    };
  });
  met_by([](raw_client& stranger) {
    stranger.header(0).ends[0].presence = 4711;
    return [&stranger] {
      stranger.header(0).ends[0].presence = static_cast<std::uint32_t>(strait::presence::awake);
      stranger.header(0).poisoned = 0;
    };
  });
  met_by([](raw_client& stranger) {
    stranger.header(0).poisoned = 1;
    return [] {};
  });
  // Everything that the ends look at, at random, while both are used: nothing is reached outside the segment, and every
  // operation ends. What they come to is the stranger's own business.
  raw_client stranger{path};
  stranger.greet<request, reply>();
  REQUIRE(stranger.take_welcome() == 3);
  stranger.enter();
  auto peer = door.blocking_accept_until(soon());
  std::atomic<bool> over{false};
  std::thread rubbish{[&] {
    std::uint64_t x = 88172645463325252;
    while (!over) {
      for (const std::size_t lane : {0U, 1U}) {
        strait::segment_header& header = stranger.header(lane);
        for (auto& end : header.ends) {
          x ^= x << 13;
          x ^= x >> 7;
          x ^= x << 17;
          end.presence = static_cast<std::uint32_t>(x % 6);
          end.incarnation = static_cast<std::uint32_t>(x);
          end.last_death = static_cast<std::uint32_t>(x % 3);
          end.died_at = x;
          end.doorbell = x;
          end.process_high = x;
        }
        header.capacity = x;
        header.slots_offset = static_cast<std::uint32_t>(x);
        header.lane.tail = x % 40;
        header.lane.head = x % 40;
        header.poisoned = 0;
      }
      (void)stranger.socket.try_say_byte();
    }
  }};
  for (int i = 0; i < 2'000; ++i) {
    std::error_code error;
    (void)peer.try_recv(error);
    (void)peer.try_send({1, 1}, error);
  }
  over = true;
  rubbish.join();
}

TEST_CASE("many clients come and go at once, each with lanes of its own") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  constexpr int clients = 8;
  constexpr int rounds = 10;
  door_type door{name, {.lanes = {.capacity = 4}}};
  asio::io_context context{1};
  std::atomic<int> ended{0};
  asio::co_spawn(
      context,
      [](door_type& at, std::atomic<int>& count) -> asio::awaitable<void> {
        const auto executor = co_await asio::this_coro::executor;
        for (int i = 0; i < clients * rounds + 1; ++i) {
          asio::co_spawn(
              executor,
              [](peer_type peer, std::atomic<int>& done) -> asio::awaitable<void> {
                while (const auto asked = co_await peer.recv()) {
                  co_await peer.send({asked->number, asked->number * asked->number});
                }
                ++done;
              }(co_await at.accept(), count),
              asio::detached);
        }
      }(door, ended),
      asio::detached);
  std::thread server{[&] { context.run(); }};
  {
    auto first = strait::blocking_connect<reply, request>(name);
    ask(first, 1);
  }
  REQUIRE(eventually([&] { return ended == 1; }));
  const std::size_t before = test::open_descriptors();
  std::vector<std::thread> callers;
  for (int i = 0; i < clients; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < rounds; ++round) {
        auto link = strait::blocking_connect<reply, request>(name);
        ask(link, 20);
      }
    });
  }
  for (auto& caller : callers) caller.join();
  server.join();
  CHECK(ended == clients * rounds + 1);
  CHECK(test::open_descriptors() <= before + 1);  // the epoll for the lines, if nobody had to sleep in the first round
}
