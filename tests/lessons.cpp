/// What others got wrong, where no room's own test holds it: docs/design/lessons.md has all of it, by number.
#include <strait/asio.hpp>

#include <doctest/doctest.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <asio/awaitable.hpp>
#include <asio/co_spawn.hpp>
#include <asio/io_context.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/this_coro.hpp>
#include <asio/use_awaitable.hpp>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "less_rights.hpp"
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

namespace {

/// A loop of the user's own kind: it waits for descriptors with epoll, and has never heard of Asio.
class own_loop {
 public:
  own_loop() : epoll_{::epoll_create1(EPOLL_CLOEXEC)} {}
  own_loop(const own_loop&) = delete;
  own_loop& operator=(const own_loop&) = delete;
  ~own_loop() { ::close(epoll_); }
  [[nodiscard]] int descriptor() const { return epoll_; }
  void watch(int descriptor) {
    ::epoll_event wanted{};
    wanted.events = EPOLLIN;
    wanted.data.fd = descriptor;
    if (::epoll_ctl(epoll_, EPOLL_CTL_ADD, descriptor, &wanted) != 0) {
      throw std::system_error{errno, std::system_category(), "epoll_ctl"};
    }
  }
  /// One turn, without waiting: reads what is ready, and counts it.
  void turn() {
    ++turns_;
    ::epoll_event ready{};
    while (::epoll_wait(epoll_, &ready, 1, 0) == 1) {
      std::uint64_t count = 0;
      if (::read(ready.data.fd, &count, sizeof count) == sizeof count) events_ += count;
    }
  }
  [[nodiscard]] std::uint64_t events() const { return events_; }
  [[nodiscard]] std::uint64_t turns() const { return turns_; }

 private:
  int epoll_;
  std::uint64_t events_ = 0;
  std::uint64_t turns_ = 0;
};

asio::awaitable<void> host(own_loop& loop, std::uint64_t events) {
  asio::posix::stream_descriptor readable{co_await asio::this_coro::executor, loop.descriptor()};
  while (loop.events() < events) {
    co_await readable.async_wait(asio::posix::stream_descriptor::wait_read, asio::use_awaitable);
    loop.turn();
  }
  (void)readable.release();  // it is the loop's
}

asio::awaitable<void> count_messages(strait::receiver<std::uint64_t> from, std::uint64_t& count) {
  while (co_await from.recv()) ++count;
}

}  // namespace

TEST_CASE("lesson 20: a loop of one's own that has a descriptor goes on beside channels, in one thread that sleeps") {
  constexpr std::uint64_t count = 500;
  const int source = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  REQUIRE(source >= 0);
  own_loop loop;
  loop.watch(source);
  auto [tx, rx] = strait::make_channel<std::uint64_t>({.capacity = 16});
  std::uint64_t messages = 0;
  asio::io_context context{1};
  const auto rethrow = [](std::exception_ptr error) {
    if (error) std::rethrow_exception(error);
  };
  asio::co_spawn(context, host(loop, count), rethrow);
  asio::co_spawn(context, count_messages(std::move(rx), messages), rethrow);
  std::thread others{[&, tx = std::move(tx)]() mutable {
    std::this_thread::sleep_for(200ms);  // how much CPU time this wait costs is what is measured
    for (std::uint64_t i = 0; i < count; ++i) {
      tx.blocking_send(i);
      const std::uint64_t one = 1;
      if (::write(source, &one, sizeof one) != sizeof one) std::abort();
    }
  }};
  const auto before = cpu_time();
  // Until something comes: the first turn of the loop, or the first message.
  while (loop.turns() == 0 && messages == 0) context.run_one();
  CHECK(cpu_time() - before < 20ms);
  context.run();
  others.join();
  CHECK(messages == count);
  CHECK(loop.events() == count);
  ::close(source);
}

namespace {

/// Everything that shortens the file behind a descriptor; how many of that were refused for the seals' sake.
int try_to_shorten(int memory) {
  const std::string again = "/proc/self/fd/" + std::to_string(memory);
  int refused = 0;
  const auto is_refused = [&](int result) { refused += result != 0 && errno == EPERM; };
  is_refused(::ftruncate(memory, 0));
  is_refused(::ftruncate(memory, 4096));
  is_refused(::truncate(again.c_str(), 0));
  const int fresh = ::open(again.c_str(), O_RDWR | O_CLOEXEC);
  is_refused(::ftruncate(fresh, 0));
  is_refused(::fcntl(fresh, F_ADD_SEALS, F_SEAL_WRITE));
  // Asked for and not done: a file that is shortened by its being opened.
  const int truncating = ::open(again.c_str(), O_RDWR | O_TRUNC | O_CLOEXEC);
  is_refused(truncating < 0 ? -1 : 0);
  if (truncating >= 0) ::close(truncating);
  ::close(fresh);
  return refused;
}
constexpr int ways_to_shorten = 6;

/// The descriptors of this process behind which there is memory that was handed over.
std::vector<int> handed_over() {
  std::vector<int> found;
  for (const auto& entry : std::filesystem::directory_iterator{"/proc/self/fd"}) {
    std::error_code gone;
    if (std::filesystem::read_symlink(entry.path(), gone).string().starts_with("/memfd:strait:")) {
      found.push_back(std::stoi(entry.path().filename().string()));
    }
  }
  return found;
}

}  // namespace

TEST_CASE("child: shortens what it was handed" * doctest::skip()) {
  if (!test::is_child()) return;
  auto link = strait::blocking_connect<std::uint64_t, std::uint64_t>(test::parent_says());
  const std::vector<int> memory = handed_over();
  CHECK(memory.size() == 2);
  for (const int one : memory) CHECK(try_to_shorten(one) == ways_to_shorten);
  for (std::uint64_t i = 0; i < 100; ++i) {
    link.blocking_send(i);
    REQUIRE(link.blocking_recv() == i);
  }
  test::tell_parent("whole");
  (void)test::parent_says();
  // No seal forbids holes: what was written is gone, and nothing else is.
  for (const int one : memory) {
    struct ::stat file{};
    REQUIRE(::fstat(one, &file) == 0);
    CHECK(::fallocate(one, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, file.st_size) == 0);
  }
  test::tell_parent("holes");
  (void)test::parent_says();
}

TEST_CASE("lesson 29: who was handed memory cannot cut it short, and what holes it makes are no signal to the other") {
  const test::channel_name name{"shortened", test::handed_over_scheme};
  strait::listener<std::uint64_t, std::uint64_t> door{name.text()};
  test::other_process client{"child: shortens what it was handed"};
  client.say(name.text());
  auto peer = door.blocking_accept();
  for (std::uint64_t i = 0; i < 100; ++i) {
    REQUIRE(peer.blocking_recv() == i);
    peer.blocking_send(i);
  }
  REQUIRE(client.hears() == "whole");
  client.say("go on");
  REQUIRE(client.hears() == "holes");
  // This process goes on, and both directions come to an end that is an error.
  std::error_code error;
  for (std::uint64_t i = 0; i < 2 * peer.out.capacity() && !error; ++i) (void)peer.try_send(i, error);
  std::error_code other_error;
  (void)peer.try_recv(other_error);
  client.say("end");
  CHECK(client.finish() == 0);
  const auto soon = std::chrono::steady_clock::now() + 30s;
  if (!error) peer.blocking_send_until(0, soon, error);
  if (!other_error) (void)peer.blocking_recv_until(soon, other_error);
  // Words of zero say that the other side has closed, or what cannot be; and then it was dead.
  for (const std::error_code& told : {error, other_error}) {
    CAPTURE(told.message());
    CHECK((told == strait::errc::closed || told == strait::errc::corrupt || told == strait::errc::peer_died));
  }
}

TEST_CASE(
    "lesson 29: a System V segment has no length to be changed, and cutting its companion short hurts nobody in it") {
  const test::channel_name name{"shortened", test::system_v_memory::scheme};
  auto tx = strait::open_sender<std::uint64_t>(name.text(), {.capacity = 64});
  auto rx = strait::open_receiver<std::uint64_t>(name.text());
  REQUIRE(::truncate(name.path().c_str(), 0) == 0);
  for (std::uint64_t i = 0; i < 200; ++i) {
    REQUIRE(tx.try_send(i));
    REQUIRE(rx.try_recv() == i);
  }
  test::check_refused(strait::errc::foreign_segment, {name.text()},
                      [&] { (void)strait::open_sender<std::uint64_t>(name.text()); });
}

TEST_CASE("child: another user" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string path = test::parent_says();
  test::become_nobody();
  CHECK(::truncate(path.c_str(), 0) != 0);
  CHECK(errno == EACCES);
  CHECK(::unlink(path.c_str()) != 0);
}

TEST_CASE_TEMPLATE(
    "lesson 29: the kernel seals no file that has a name, so the mode has to keep others from cutting it", memory,
    test::posix_memory, test::file_memory) {
  const test::channel_name name{"cut", memory::scheme};
  auto tx = strait::open_sender<std::uint64_t>(name.text(), {.capacity = 64});
  auto rx = strait::open_receiver<std::uint64_t>(name.text());
  const int file = ::open(name.path().c_str(), O_RDWR | O_CLOEXEC);
  REQUIRE(file >= 0);
  // On the day on which this can be had, the lesson is to be held for these memories as well.
  CHECK(::fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK) != 0);
  ::close(file);
  if (::geteuid() == 0) {
    test::other_process child{"child: another user"};
    child.say(name.path());
    CHECK(child.finish() == 0);
  }
  REQUIRE(tx.try_send(std::uint64_t{1}));
  CHECK(rx.try_recv() == 1U);
}
