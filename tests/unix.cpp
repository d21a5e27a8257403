// `unix:` between processes: deaths on both sides, users, forks, and what a listener leaves that was killed.
#include <strait/asio.hpp>

#include <doctest/doctest.h>
#include <grp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/co_spawn.hpp>
#include <asio/detached.hpp>
#include <asio/io_context.hpp>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <exception>
#include <optional>
#include <random>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "coroutines.hpp"
#include "other_process.hpp"
#include "strangers.hpp"

import strait;

namespace {

using namespace std::chrono_literals;
using clock = std::chrono::steady_clock;
using test::other_process;
using test::own_directory;

using number = std::uint64_t;
using door_type = strait::listener<number, number>;
using pair_type = strait::duplex<number, number>;

clock::time_point soon() {
  return clock::now() + 30s;
}

std::string word_in(std::string& line) {
  const std::size_t space = line.find(' ');
  std::string word = line.substr(0, space);
  line = space == std::string::npos ? std::string{} : line.substr(space + 1);
  return word;
}

/// What this end does when the other is killed.
enum class state { streaming, full, parked_thread, parked_hub };

/// The other end: sends for ever, or says nothing. Takes everything, or nothing.
void play_other_end(pair_type pair, const std::string& what) {
  test::tell_parent("in");
  if (what == "streams") {
    for (number i = 0;; ++i) pair.blocking_send(i);
  }
  if (what == "takes") {
    for (;;) (void)pair.blocking_recv();
  }
  (void)test::parent_says();  // silent, until the test ends
}

/// Uses `pair` until the other process's death is told; returns when that was.
clock::time_point told_of_death(pair_type& pair, state in, std::atomic<bool>& ready) {
  std::error_code error;
  switch (in) {
    case state::streaming: {
      number expected = 0;
      for (;;) {
        const auto got = pair.blocking_recv_until(soon(), error);
        if (!got) break;
        if (*got != expected++) FAIL_CHECK("out of order");
        ready = expected > 1000;
      }
      break;
    }
    case state::full:
      for (number i = 0; !error; ++i) {
        ready = i >= pair.out.capacity();
        (void)pair.blocking_send_until(i, soon(), error);
      }
      break;
    case state::parked_thread:
      ready = true;
      (void)pair.blocking_recv_until(soon(), error);
      break;
    case state::parked_hub: {
      asio::io_context context{1};
      asio::co_spawn(
          context,
          [](pair_type& from, std::error_code& why, std::atomic<bool>& asleep_soon) -> asio::awaitable<void> {
            asleep_soon = true;
            (void)co_await from.recv(why);
          }(pair, error, ready),
          asio::detached);
      context.run();
      break;
    }
  }
  const auto now = clock::now();
  CHECK_MESSAGE(error == strait::errc::peer_died, error.message());
  return now;
}

const char* other_end_for(state in) {
  return in == state::streaming ? "streams" : "silent";
}

/// Kills the other process while this end is in that state. Returns how long after its end this one was told.
std::chrono::nanoseconds kill_and_time(other_process& other, pair_type& pair, state in) {
  std::atomic<bool> ready{false};
  clock::time_point told;
  std::thread survivor{[&] { told = told_of_death(pair, in, ready); }};
  REQUIRE(eventually([&] { return ready.load(); }));
  if (in != state::streaming) std::this_thread::sleep_for(2ms);  // asleep by now, or not: both must be right
  ::kill(other.pid(), SIGKILL);
  // From when the process has ended: how long the kernel takes to dismantle it is not ours.
  REQUIRE(other.has_ended());
  const auto ended = clock::now();
  survivor.join();
  // And then it is closed, without an error for who receives.
  std::error_code error;
  if (in != state::full) {
    CHECK_FALSE(pair.blocking_recv_until(soon(), error));
    CHECK_FALSE(error);
  } else {
    CHECK_FALSE(pair.blocking_send_until(1, soon(), error));
    CHECK(error == strait::errc::closed);
  }
  return std::max<std::chrono::nanoseconds>(told - ended, 0ns);
}

const strait::channel_options lanes{.capacity = 256};

}  // namespace

TEST_CASE("child: connects" * doctest::skip()) {
  if (!test::is_child()) return;
  std::string line = test::parent_says();
  const std::string name = word_in(line);
  play_other_end(strait::blocking_connect<number, number>(name), line);
}

TEST_CASE("child: listens" * doctest::skip()) {
  if (!test::is_child()) return;
  std::string line = test::parent_says();
  door_type door{word_in(line), {.lanes = lanes}};
  test::tell_parent("listens");
  play_other_end(door.blocking_accept(), line);
}

TEST_CASE("kill -9 of the client, or of the listener, is told, whatever the survivor does") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  std::vector<std::chrono::nanoseconds> times;
  for (int round = 0; round < 8; ++round) {
    for (const state in : {state::streaming, state::full, state::parked_thread, state::parked_hub}) {
      CAPTURE(static_cast<int>(in));
      {
        door_type door{name, {.lanes = lanes}};
        other_process client{"child: connects"};
        client.say(name + " " + other_end_for(in));
        REQUIRE(client.hears() == "in");
        auto peer = door.blocking_accept_until(soon());
        CHECK(peer.peer().process == static_cast<std::uint32_t>(client.pid()));
        times.push_back(kill_and_time(client, peer, in));
      }
      {
        other_process listens{"child: listens"};
        listens.say(name + " " + other_end_for(in));
        REQUIRE(listens.hears() == "listens");
        auto link = strait::blocking_connect_until<number, number>(name, soon(), {.lanes = lanes});
        REQUIRE(listens.hears() == "in");
        times.push_back(kill_and_time(listens, link, in));
      }
    }
  }
  std::ranges::sort(times);
  const auto at = [&](double part) {
    return std::chrono::duration<double, std::micro>(
               times[static_cast<std::size_t>(part * static_cast<double>(times.size() - 1))])
        .count();
  };
  MESSAGE("told after the end of the process, us: median " << at(0.5) << ", p99 " << at(0.99) << ", longest "
                                                           << at(1.0));
  // A quarter of a second is for a machine that is busy with something else; the contract is measured by tests/death.cpp
  // on a quiet one.
  CHECK(at(1.0) < 250'000);
}

TEST_CASE("a stopped peer is never taken for dead") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name, {.lanes = lanes}};
  other_process client{"child: connects"};
  client.say(name + " streams");
  REQUIRE(client.hears() == "in");
  auto peer = door.blocking_accept_until(soon());
  ::kill(client.pid(), SIGSTOP);
  ::siginfo_t info{};
  ::waitid(P_PID, static_cast<::id_t>(client.pid()), &info, WSTOPPED);
  std::error_code error;
  number expected = 0;
  while (const auto got = peer.blocking_recv_until(clock::now() + 300ms, error)) REQUIRE(*got == expected++);
  CHECK(error == std::errc::timed_out);
  ::kill(client.pid(), SIGCONT);
  for (int i = 0; i < 1000; ++i) REQUIRE(peer.blocking_recv_until(soon(), error).value_or(0) == expected++);
}

TEST_CASE("child: connects and forks" * doctest::skip()) {
  if (!test::is_child()) return;
  std::string line = test::parent_says();
  auto link = strait::blocking_connect<number, number>(line);
  if (const ::pid_t child = ::fork(); child == 0) {
    ::prctl(PR_SET_PDEATHSIG, 0);
    std::error_code error;
    (void)link.try_recv(error);
    if (error != strait::errc::inherited) ::_exit(1);
    link.close();  // the parent's; nothing happens to it
    test::tell_parent(std::to_string(::getpid()));
    ::pause();
    ::_exit(0);
  }
  link.blocking_send(1);
  (void)test::parent_says();
}

TEST_CASE("a child made by fork keeps neither the lock nor the line: its parent's death is told") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  door_type door{name, {.lanes = lanes}};
  other_process client{"child: connects and forks"};
  client.say(name);
  auto peer = door.blocking_accept_until(soon());
  const auto grandchild = static_cast<::pid_t>(std::stol(client.hears()));
  CHECK(peer.blocking_recv_until(soon()) == number{1});
  client.kill();
  CHECK(::kill(grandchild, 0) == 0);
  std::error_code error;
  CHECK_FALSE(peer.blocking_recv_until(soon(), error));
  CHECK(error == strait::errc::peer_died);
  ::kill(grandchild, SIGKILL);
}

TEST_CASE("child: listens and forks" * doctest::skip()) {
  if (!test::is_child()) return;
  door_type door{test::parent_says()};
  if (const ::pid_t child = ::fork(); child == 0) {
    ::prctl(PR_SET_PDEATHSIG, 0);
    door.close();  // the parent's; its socket stays
    test::tell_parent(std::to_string(::getpid()));
    ::pause();
    ::_exit(0);
  }
  (void)test::parent_says();
}

TEST_CASE("a child made by fork does not listen in its parent's place") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  other_process listens{"child: listens and forks"};
  listens.say(name);
  const auto grandchild = static_cast<::pid_t>(std::stol(listens.hears()));
  {
    auto link = strait::blocking_connect_until<number, number>(name, soon());
  }
  listens.kill();
  std::error_code error;
  (void)strait::blocking_connect_until<number, number>(name, soon(), error);
  CHECK(error == std::errc::connection_refused);
  {
    door_type next{name};
  }
  CHECK(here.empty());
  ::kill(grandchild, SIGKILL);
}

TEST_CASE("child: forks beside a listener and an attempt" * doctest::skip()) {
  if (!test::is_child()) return;
  std::string line = test::parent_says();
  door_type door{word_in(line)};
  auto attempt = std::make_optional(strait::connect<number, number>(line));
  const ::pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    // These get the numbers of what the fork closed.
    std::array<int, 32> files{};
    for (int& file : files) file = ::memfd_create("of the child", MFD_CLOEXEC);
    door.close();
    attempt.reset();
    for (const int file : files) {
      struct ::stat facts{};
      if (::fstat(file, &facts) != 0 || facts.st_size != 0) ::_exit(1);
    }
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK(status == 0);
}
TEST_CASE("a child made by fork that closes its copy of a listener, and of an attempt, writes to no file of its own") {
  const own_directory here;
  const test::raw_listener silent{here.path("silent.sock")};
  other_process child{"child: forks beside a listener and an attempt"};
  child.say("unix:" + here.path("app.sock") + " unix:" + here.path("silent.sock"));
  CHECK(child.finish() == 0);
}

TEST_CASE("child: starts to listen" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string name = test::parent_says();
  test::tell_parent("goes");
  for (;;) door_type door{name};
}

TEST_CASE("a listener killed at any moment of coming and going is in nobody's way, and leaves nothing to the next") {
  const own_directory here;
  const std::string name = "unix:" + here.path("app.sock");
  std::minstd_rand random{20261124};
  int left = 0;
  for (int round = 0; round < 60; ++round) {
    other_process starter{"child: starts to listen"};
    starter.say(name);
    REQUIRE(starter.hears() == "goes");
    std::this_thread::sleep_for(std::chrono::microseconds{random() % 3000});
    starter.kill();
    if (!here.empty()) ++left;
    {
      door_type next{name};
      auto link = strait::blocking_connect_until<number, number>(name, soon());
      (void)next.blocking_accept_until(soon());
    }
    REQUIRE(here.empty());
  }
  CHECK(left > 0);  // some were killed while their socket lay there
}

// ---- users ----------------------------------------------------------------------------------------------------------

TEST_CASE("child: connects as another user" * doctest::skip()) {
  if (!test::is_child()) return;
  std::string line = test::parent_says();
  const std::string name = word_in(line);
  const auto user = static_cast<::uid_t>(std::stoul(word_in(line)));
  const auto group = static_cast<::gid_t>(std::stoul(word_in(line)));
  const auto more = static_cast<::gid_t>(std::stoul(word_in(line)));
  const bool trusts_root = word_in(line) == "root";
  REQUIRE(::setgroups(1, &more) == 0);
  REQUIRE(::setgid(group) == 0);
  REQUIRE(::setuid(user) == 0);
  try {
    strait::connect_options options;
    if (trusts_root) options.users = {0};
    auto link = strait::blocking_connect<number, number>(name, options);
    link.blocking_send(user);
    test::tell_parent("in");
    test::tell_parent(std::to_string(link.blocking_recv().value_or(0)));
  } catch (const std::system_error& error) {
    test::tell_parent(error.code() == strait::errc::no_permission ? error.what()
                                                                  : "wrong: " + std::string{error.what()});
  }
}

TEST_CASE("users and groups: who may come in is the kernel's word and the options'") {
  if (::geteuid() != 0) {
    MESSAGE("not root: nobody else to be");
    return;
  }
  const own_directory here;
  REQUIRE(::chmod(here.text().c_str(), 0755) == 0);
  const std::string name = "unix:" + here.path("app.sock");
  /// What a client of user 12345 (group 12346, and 12347) meets.
  const auto meets = [&](const strait::listener_options& options, const char* trusts = "root") {
    door_type door{name, options};
    other_process client{"child: connects as another user"};
    client.say(name + " 12345 12346 12347 " + trusts);
    std::string said = client.hears();
    if (said == "in") {
      auto peer = door.blocking_accept_until(soon());
      CHECK(peer.peer().user == 12345);
      CHECK(peer.peer().group == 12346);
      CHECK(peer.blocking_recv_until(soon()) == number{12345});
      peer.blocking_send(7);
      CHECK(client.hears() == "7");
    }
    CHECK(client.finish() == 0);
    return said;
  };
  const auto contains = [](const std::string& text, std::string_view part) {
    return text.find(part) != std::string::npos;
  };
  CHECK(contains(meets({}), "expected a socket that user 12345 may write to"));
  CHECK(contains(meets({.mode = 0666}), "found one of user 12345 and group 12346"));
  CHECK(meets({.mode = 0666, .users = {11, 12345}}) == "in");
  CHECK(contains(meets({.mode = 0666, .users = {11}, .groups = {12}}), "found one of user 12345"));
  CHECK(meets({.mode = 0666, .groups = {12346}}) == "in");
  CHECK(meets({.mode = 0666, .groups = {12347}}) == "in");  // one of its other groups
  CHECK(meets({.mode = 0660, .group = 12347, .users = {12345}}) == "in");
  CHECK(contains(meets({.mode = 0660, .group = 1, .users = {12345}}), "may write to"));
  CHECK(contains(meets({.mode = 0666, .users = {12345}}, "nobody"), "expected a listener of user 12345"));
}
