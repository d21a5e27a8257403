/// What others got wrong, where no room's own test holds it: docs/design/lessons.md has all of it, by number.
#include <doctest/doctest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "other_process.hpp"
#include "segment_files.hpp"

import strait;

using namespace std::chrono_literals;

namespace {

/// How long this thread has had a CPU.
std::chrono::nanoseconds cpu_time() {
  ::timespec spent{};
  if (::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &spent) != 0) {
    throw std::system_error{errno, std::system_category(), "clock_gettime"};
  }
  return std::chrono::seconds{spent.tv_sec} + std::chrono::nanoseconds{spent.tv_nsec};
}

/// From here on any system call but those of a process that ends kills the process, whichever thread makes it.
bool forbid_system_calls() {
  std::array<::sock_filter, 5> rules{{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(::seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_sigreturn, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  const ::sock_fprog program{static_cast<unsigned short>(rules.size()), rules.data()};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0;
}

}  // namespace

TEST_CASE("lesson 1: a name that was removed by hand, or by RemoveIPC, leaves its ends together and newcomers apart") {
  const test::channel_name name{"removed"};
  auto tx = strait::open_sender<std::uint64_t>(name.text(), {.capacity = 64});
  auto rx = strait::open_receiver<std::uint64_t>(name.text());
  REQUIRE(tx.try_send(1U));
  REQUIRE(::unlink(name.path().c_str()) == 0);

  // The ends hold each other by their memory, which needs no name.
  REQUIRE(tx.try_send(2U));
  CHECK(rx.try_recv() == 1U);
  CHECK(rx.try_recv() == 2U);
  // Both roles are free under the name, and whoever takes them meets in a channel of their own, of another size.
  auto new_rx = strait::open_receiver<std::uint64_t>(name.text(), {.capacity = 8});
  auto new_tx = strait::open_sender<std::uint64_t>(name.text(), {.capacity = 8});
  REQUIRE(new_tx.try_send(3U));
  REQUIRE(tx.try_send(4U));
  CHECK(new_rx.try_recv() == 3U);
  CHECK(rx.try_recv() == 4U);
  // Leaving, the old ends take away nothing that is not theirs.
  rx.close();
  tx.close();
  CHECK(name.exists());
  REQUIRE(new_tx.try_send(5U));
  CHECK(new_rx.try_recv() == 5U);
  new_tx.close();
  new_rx.close();
  CHECK_FALSE(name.exists());
}

TEST_CASE("child: sends until it is killed" * doctest::skip()) {
  if (!test::is_child()) return;
  auto tx = strait::open_sender<std::uint64_t>(test::parent_says());
  REQUIRE(tx.try_send(1U));
  test::tell_parent("sent");
  (void)test::parent_says();
}

TEST_CASE("lesson 18, 33: a zombie is dead") {
  const test::channel_name name{"zombie"};
  auto rx = strait::open_receiver<std::uint64_t>(name.text(), {.capacity = 64});
  test::other_process peer{"child: sends until it is killed"};
  peer.say(name.text());
  REQUIRE(peer.hears() == "sent");
  REQUIRE(::kill(peer.pid(), SIGKILL) == 0);
  REQUIRE(peer.has_ended());
  REQUIRE(::kill(peer.pid(), 0) == 0);
  CHECK(rx.blocking_recv() == 1U);
  std::error_code error;
  CHECK_FALSE(rx.blocking_recv(error).has_value());
  CHECK(error == strait::errc::peer_died);
}

TEST_CASE("lesson 22: who waits in vain leaves the CPU alone, as a thread and as a hub") {
  // Far more than the longest spin, far less than the wait.
  constexpr auto much = 20ms;
  constexpr auto wait = 200ms;

  auto [tx, rx] = strait::make_channel<std::uint64_t>({.capacity = 64});
  const auto before = cpu_time();
  std::error_code error;
  CHECK_FALSE(rx.blocking_recv_until(std::chrono::steady_clock::now() + wait, error).has_value());
  CHECK(error == std::errc::timed_out);
  CHECK(cpu_time() - before < much);

  std::atomic<std::int64_t> spent{-1};
  std::atomic<bool> waits{false};
  {
    strait::runtime rt{{.cpus = std::vector<unsigned>{strait::topology::machine().nodes().front().cpus.front()}}};
    rt.spawn([](strait::receiver<std::uint64_t> from, std::atomic<bool>& begins,
                std::atomic<std::int64_t>& result) -> strait::task<> {
      const auto began = cpu_time();
      begins = true;
      (void)co_await from.recv();
      result = (cpu_time() - began).count();
    }(std::move(rx), waits, spent));
    test::eventually([&] { return waits.load(); });
    std::this_thread::sleep_for(wait);  // the length of the wait is what is measured
    tx.blocking_send(1U);
    rt.join();
  }
  CHECK(spent >= 0);
  CHECK(std::chrono::nanoseconds{spent} < much);
}

TEST_CASE("child: may make no system call" * doctest::skip()) {
  if (!test::is_child()) return;
  constexpr std::uint64_t count = 200'000;
  const std::string name = test::parent_says();
  const strait::channel_options options{.capacity = 256, .wait = strait::wait_policy::busy};
  auto tx = strait::open_sender<std::uint64_t>(name, options);
  auto rx = strait::open_receiver<std::uint64_t>(name, options);
  std::atomic<bool> forbidden{false};
  std::thread sending{[&] {
    for (std::uint64_t i = 0; i < count; ++i) {
      tx.blocking_send(i);
      if (i == 0) {
        while (!forbidden) strait::cpu_relax();  // what an end does once, at its first look, is done
      }
    }
    for (;;) strait::cpu_relax();  // a thread's end is a system call
  }};
  bool in_order = rx.blocking_recv() == 0;
  // From here on it cannot say anything: its status has to.
  if (!forbid_system_calls()) std::_Exit(77);
  forbidden = true;
  for (std::uint64_t i = 1; i < count; ++i) in_order = in_order && rx.blocking_recv() == i;
  std::_Exit(in_order ? 0 : 1);
}

TEST_CASE(
    "lesson 23: while both ends are awake a message costs no system call, so nothing of the kernel's can slow it") {
  const test::channel_name name{"no-calls"};
  test::other_process both{"child: may make no system call"};
  both.say(name.text());
  const int status = both.finish();
  if (status == 77) {
    MESSAGE("skipped: seccomp filters cannot be had here");
    return;
  }
  CHECK_MESSAGE(status == 0, "expected 0, found ", status, "; 159 is a system call");
}
