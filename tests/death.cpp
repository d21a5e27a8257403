// kill -9, and every other way in which a process ends or merely seems to: what the survivor is told, what reaches it,
// and what is left behind. (Killed while an end comes or goes: kills.cpp.)
//
// The test process holds one end; the other lives in a child, which is this program again (by exec). A child keeps a
// ledger in memory of its own, shared with the test only: what it had sent or taken when it was killed stands there.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/co_spawn.hpp>
#include <asio/detached.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "segment_files.hpp"

#include <strait/asio.hpp>

import strait;

extern char** environ;

namespace death {

/// Travels in the line that announces it.
struct small_message {
  std::uint64_t key;
  std::uint64_t mix;
};
/// Does not.
struct large_message {
  std::uint64_t key;
  std::array<std::uint64_t, 7> mix;
};

}  // namespace death

template <>
struct strait::message_traits<death::small_message> {
  static constexpr std::string_view name = "strait.death.small";
  static constexpr std::uint32_t version = 1;
};
template <>
struct strait::message_traits<death::large_message> {
  static constexpr std::string_view name = "strait.death.large";
  static constexpr std::uint32_t version = 1;
};

namespace death {

using namespace std::chrono_literals;

constexpr std::uint64_t no_limit = ~std::uint64_t{0};
/// Every wait of this file ends after this long at the latest, with a failed check that says what it waited for.
constexpr auto patience = 20s;
/// The contract: a survivor has its answer within a second.
constexpr std::int64_t answer_bound_ns = 1'000'000'000;

// ---- messages: who sent it, which one it is, and enough of it everywhere to see a torn one --------------------------

constexpr std::uint64_t key_of(std::uint64_t generation, std::uint64_t sequence) {
  return generation << 48 | sequence;
}
constexpr std::uint64_t generation_in(std::uint64_t key) {
  return key >> 48;
}
constexpr std::uint64_t sequence_in(std::uint64_t key) {
  return key & ((std::uint64_t{1} << 48) - 1);
}
constexpr std::uint64_t mixed(std::uint64_t key, std::uint64_t word) {
  std::uint64_t x = key * 0x9e37'79b9'7f4a'7c15 + word;
  x ^= x >> 29;
  return x * 0xbf58'476d'1ce4'e5b9;
}

template <class T>
T make(std::uint64_t key) {
  if constexpr (sizeof(T) == sizeof(small_message)) {
    return {key, mixed(key, 0)};
  } else {
    T made{key, {}};
    for (std::size_t i = 0; i < made.mix.size(); ++i) made.mix[i] = mixed(key, i);
    return made;
  }
}

template <class T>
bool intact(const T& message) {
  const T whole = make<T>(message.key);
  return std::memcmp(&whole, &message, sizeof(T)) == 0;
}

// ---- the ledger: what one end is to do, and what it did -------------------------------------------------------------

/// How an end waits.
enum class form : std::uint32_t { thread, task, awaitable };
constexpr std::array forms{form::thread, form::task, form::awaitable};

/// What a child does when it has sent or taken as much as it was to.
enum class finale : std::uint32_t { close, idle, exit, abort, exec };

/// What a child is for.
enum class part : std::uint32_t {
  /// Holds one end and streams.
  stream,
  /// Takes from one channel and answers in another.
  echo,
  /// Holds one end and has a child by fork; and the same while a coroutine waits.
  fork,
  fork_while_waiting,
  /// Sends one message when it has no descriptor left.
  no_descriptors,
  /// Holds the senders of two channels, whose locks the kernel drops one long after the other.
  slow_end,
};

struct order {
  std::array<char, 64> name{};
  death::part part = part::stream;
  strait::role role = strait::role::sender;
  death::form form = form::thread;
  strait::wait_policy policy = strait::wait_policy::adaptive;
  bool large = false;
  /// Whether to leave for a network in which no mailbox can be reached.
  bool alone_in_network = false;
  /// Whether to use up all descriptors before the first message.
  bool no_descriptors = false;
  std::uint64_t capacity = 64;
  /// Stamped on what a sender sends; what a receiver expects first.
  std::uint64_t generation = 1;
  /// Messages before the finale.
  std::uint64_t count = no_limit;
  /// Whether the first message may be any: a replaced receiver had taken those before.
  bool from_anywhere = false;
  /// Messages to send after a death was reported; the next generation's are expected by a receiver. Zero: stop there.
  std::uint64_t after_death = 0;
  death::finale finale = finale::close;
};

struct ledger {
  order what;
  /// Sent, or taken; written after each.
  std::atomic<std::uint64_t> done{0};
  /// What a receiver took first and last.
  std::atomic<std::uint64_t> first{0};
  std::atomic<std::uint64_t> last{0};
  /// What it expects next.
  std::uint64_t expected = 0;

  std::atomic<std::uint32_t> deaths{0};
  /// `done` at the last death, and when it was reported.
  std::atomic<std::uint64_t> at_death{0};
  std::atomic<std::int64_t> reported_at{0};
  /// The peer closed.
  std::atomic<std::uint32_t> closed{0};
  /// The loop has ended and does not touch its handle any more.
  std::atomic<std::uint32_t> finished{0};

  /// The child has started; it may go on (the test's word, counted); it has opened its end.
  std::atomic<std::uint32_t> started{0};
  std::atomic<std::uint32_t> go{0};
  std::atomic<std::uint32_t> opened{0};
  /// The grandchild: its process id, the test's word that it may end, and that it has let go of its copy of the end.
  std::atomic<std::int32_t> grandchild{0};
  std::atomic<std::uint32_t> grandchild_go{0};
  std::atomic<std::uint32_t> grandchild_gone{0};

  std::atomic<std::uint32_t> failed{0};
  std::array<char, 400> failure{};

  void fail(const std::string& what_failed) {
    std::snprintf(failure.data(), failure.size(), "%s", what_failed.c_str());
    failed = 1;
  }
  [[nodiscard]] std::string failure_text() const { return failed != 0 ? failure.data() : ""; }
};

/// Waits for a condition that another thread or process brings about.
template <class Condition>
[[nodiscard]] bool within(std::chrono::nanoseconds bound, Condition&& condition) {
  const auto until = std::chrono::steady_clock::now() + bound;
  for (int looks = 0; !condition(); ++looks) {
    if (std::chrono::steady_clock::now() > until) return false;
    if (looks < 100) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(50us);
    }
  }
  return true;
}

// ---- what an end does with what it gets: true to go on --------------------------------------------------------------

template <class T>
bool heard(ledger& mine, const std::optional<T>& message, const std::error_code& error) {
  if (error == strait::errc::peer_died) {
    mine.at_death = mine.done.load();
    mine.reported_at = strait::now_ns();
    ++mine.deaths;
    ++mine.what.generation;
    mine.expected = key_of(mine.what.generation, 0);
    return mine.what.after_death != 0;
  }
  if (error) {
    mine.fail("recv: " + error.message());
    return false;
  }
  if (!message) {
    mine.closed = 1;
    return false;
  }
  if (!intact(*message)) {
    mine.fail("torn: message " + std::to_string(mine.done));
    return false;
  }
  const bool anywhere = mine.done == 0 && mine.what.from_anywhere;
  if (message->key != mine.expected && !anywhere) {
    mine.fail("expected message " + std::to_string(sequence_in(mine.expected)) + " of generation " +
              std::to_string(generation_in(mine.expected)) + ", found " + std::to_string(sequence_in(message->key)) +
              " of " + std::to_string(generation_in(message->key)) + " after " + std::to_string(mine.done));
    return false;
  }
  mine.expected = message->key + 1;
  if (mine.done == 0) mine.first = message->key;
  mine.last = message->key;
  return ++mine.done < mine.what.count;
}

/// After a send. An error means that nothing was sent.
bool told(ledger& mine, const std::error_code& error) {
  if (error == strait::errc::peer_died) {
    mine.at_death = mine.done.load();
    mine.reported_at = strait::now_ns();
    ++mine.deaths;
    return mine.what.after_death != 0;
  }
  if (error == strait::errc::closed) {
    mine.closed = 1;
    return false;
  }
  if (error) {
    mine.fail("send: " + error.message());
    return false;
  }
  const std::uint64_t done = ++mine.done;
  return done < mine.what.count && (mine.deaths == 0 || done < mine.at_death + mine.what.after_death);
}

template <class T>
T next(const ledger& mine) {
  return make<T>(key_of(mine.what.generation, mine.done));
}

// ---- the three forms of waiting -------------------------------------------------------------------------------------

template <class Coroutine, class T>
Coroutine drive_in_coroutine(strait::receiver<T>& end, ledger& mine) {
  std::error_code error;
  std::optional<T> message;
  do {
    message = co_await end.recv(error);
  } while (heard(mine, message, error));
  mine.finished = 1;
}

template <class Coroutine, class T>
Coroutine drive_in_coroutine(strait::sender<T>& end, ledger& mine) {
  std::error_code error;
  do {
    co_await end.send(next<T>(mine), error);
  } while (told(mine, error));
  mine.finished = 1;
}

template <class T>
void drive_in_thread(strait::receiver<T>& end, ledger& mine) {
  std::error_code error;
  std::optional<T> message;
  do {
    message = end.blocking_recv(error);
  } while (heard(mine, message, error));
  mine.finished = 1;
}

template <class T>
void drive_in_thread(strait::sender<T>& end, ledger& mine) {
  std::error_code error;
  do {
    end.blocking_send(next<T>(mine), error);
  } while (told(mine, error));
  mine.finished = 1;
}

/// Where this process's ends wait: threads, the runtime, and an application's own io_context.
class engine {
 public:
  engine() : own_thread_{[this] { context_.run(); }} {}
  ~engine() {
    work_.reset();
    context_.stop();
    own_thread_.join();
    for (auto& thread : threads_) thread.join();
  }
  engine(const engine&) = delete;
  engine& operator=(const engine&) = delete;

  template <class End>
  void drive(form how, End& end, ledger& mine) {
    mine.finished = 0;
    if (mine.what.role == strait::role::receiver && mine.done == 0) mine.expected = key_of(mine.what.generation, 0);
    switch (how) {
      case form::thread:
        threads_.emplace_back([&end, &mine] { drive_in_thread(end, mine); });
        break;
      case form::task:
        runtime_.spawn(drive_in_coroutine<strait::task<>>(end, mine));
        break;
      case form::awaitable:
        asio::co_spawn(context_, drive_in_coroutine<asio::awaitable<void>>(end, mine), asio::detached);
        break;
    }
  }

  void drive_task(strait::task<> what) { runtime_.spawn(std::move(what)); }

  /// Joins the threads whose loops have ended.
  void tidy() {
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  strait::runtime runtime_;
  asio::io_context context_{1};
  asio::executor_work_guard<asio::io_context::executor_type> work_{context_.get_executor()};
  std::vector<std::thread> threads_;
  std::thread own_thread_;
};

// ---- the child ------------------------------------------------------------------------------------------------------

using sending = strait::sender<small_message>;
using receiving = strait::receiver<small_message>;

constexpr int ledger_descriptor = 100;

/// Whether the memory of this run is handed over at a socket: then this process listens there, and the other one connects.
bool at_a_socket() {
  return test::memory() == "unix";
}

/// One end of a pair; the other one is closed.
template <class End>
End end_of(strait::duplex<typename End::value_type, typename End::value_type> pair) {
  if constexpr (std::is_same_v<End, strait::sender<typename End::value_type>>) {
    return std::move(pair.out);
  } else {
    return std::move(pair.in);
  }
}

template <class End>
End open_end(std::string_view name, const strait::channel_options& options) {
  using message = typename End::value_type;
  if (at_a_socket()) return end_of<End>(strait::blocking_connect<message, message>(name, {.lanes = options}));
  if constexpr (std::is_same_v<End, strait::sender<message>>) {
    return strait::open_sender<message>(name, options);
  } else {
    return strait::open_receiver<message>(name, options);
  }
}

/// Opens an end as soon as its predecessor's process is gone: the kernel takes a moment after the kill.
template <class End>
End open_when_free(const ledger& mine) {
  const strait::channel_options options{.capacity = mine.what.capacity, .wait = mine.what.policy};
  std::optional<End> made;
  std::string why;
  const bool in_time = within(patience, [&] {
    try {
      made.emplace(open_end<End>(mine.what.name.data(), options));
      return true;
    } catch (const std::system_error& error) {
      if (error.code() != strait::errc::end_in_use) throw;
      why = error.what();
      return false;
    }
  });
  if (!in_time) throw std::runtime_error{why};
  return std::move(*made);
}

/// Waits for the test's word; not for ever, because a grandchild does not end with the test.
void wait_for(const std::atomic<std::uint32_t>& word, std::uint32_t at_least) {
  if (!within(60s, [&] { return word >= at_least; })) std::_Exit(5);
}

/// What a test never says: the child is to be killed.
constexpr std::uint32_t never = ~std::uint32_t{0};

void use_up_descriptors() {
  ::rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = 128;
  ::setrlimit(RLIMIT_NOFILE, &limit);
  while (::open("/dev/null", O_RDONLY | O_CLOEXEC) >= 0) {
  }
}

template <class End>
void child_streams(ledger& mine) {
  // Leaked: most finales are to find it open.
  auto* end = new End{open_when_free<End>(mine)};
  auto* runs = new engine;
  if (mine.what.no_descriptors) use_up_descriptors();
  mine.opened = 1;
  runs->drive(mine.what.form, *end, mine);
  while (mine.finished == 0) std::this_thread::sleep_for(50us);
  if (mine.failed != 0) return;
  switch (mine.what.finale) {
    case finale::close:
      end->close();
      return;
    case finale::idle:
      wait_for(mine.go, never);
      return;
    case finale::exit:
      std::exit(0);
    case finale::abort:
      std::abort();
    case finale::exec:
      ::execl("/proc/self/exe", "test-death", "--sleep", nullptr);
      throw std::system_error{errno, std::system_category(), "exec"};
  }
}

template <class T>
strait::task<> echo(strait::receiver<T>& in, strait::sender<T>& out, ledger& mine) {
  std::error_code error;
  for (;;) {
    const auto message = co_await in.recv(error);
    if (!heard(mine, message, error)) break;
    co_await out.send(*message, error);
    if (error) {
      mine.fail("echo: " + error.message());
      break;
    }
  }
  mine.finished = 1;
}

void child_echoes(ledger& mine) {
  const strait::channel_options options{.capacity = mine.what.capacity, .wait = mine.what.policy};
  auto in = strait::open_receiver<small_message>(std::string{mine.what.name.data()} + "-there", options);
  auto out = strait::open_sender<small_message>(std::string{mine.what.name.data()} + "-back", options);
  mine.expected = key_of(mine.what.generation, 0);
  mine.opened = 1;
  asio::io_context context{1};
  strait::spawn(context, echo(in, out, mine));
  context.run();
}

/// In the child of the fork: lives on for a while, then lets go of its copy of the end as any program does, and ends.
template <class End>
[[noreturn]] void live_as_grandchild(ledger& mine, End* end) {
  wait_for(mine.grandchild_go, 1);
  delete end;
  mine.grandchild_gone = 1;
  std::exit(0);
}

template <class End>
void child_forks(ledger& mine) {
  auto* end = new End{open_when_free<End>(mine)};
  mine.opened = 1;
  // Three of some more: something was taken and not yet released when the fork copies it.
  const std::uint64_t all = std::exchange(mine.what.count, 3);
  mine.expected = key_of(mine.what.generation, 0);
  drive_in_thread(*end, mine);
  const pid_t forked = ::fork();
  if (forked == 0) live_as_grandchild(mine, end);
  mine.grandchild = forked;
  wait_for(mine.go, 2);
  mine.what.count = all;
  drive_in_thread(*end, mine);
  wait_for(mine.go, never);
}

/// The same, while a coroutine waits in this process for a sender that has not come yet: a thread waits on its behalf,
/// and no fork copies threads.
void child_forks_while_waiting(ledger& mine) {
  using end_type = strait::receiver<small_message>;
  auto* end = new end_type{open_when_free<end_type>(mine)};
  auto* context = new asio::io_context{1};
  mine.expected = key_of(mine.what.generation, 0);
  strait::spawn(*context, drive_in_coroutine<strait::task<>>(*end, mine));
  mine.opened = 1;
  const auto parked = [&] { return mine.go >= 2; };
  while (!parked()) context->run_for(1ms);
  const pid_t forked = ::fork();
  if (forked == 0) live_as_grandchild(mine, end);
  mine.grandchild = forked;
  context->run();
  wait_for(mine.go, never);
}

/// Sends to two processes.
void child_sends_without_descriptors(ledger& mine) {
  const std::string name = mine.what.name.data();
  const strait::channel_options options{.capacity = mine.what.capacity};
  std::array ends{strait::open_sender<small_message>(name + "-1", options),
                  strait::open_sender<small_message>(name + "-2", options)};
  const auto send_to_both = [&] {
    for (auto& end : ends) {
      std::error_code error;
      end.blocking_send(next<small_message>(mine), error);
      if (error) mine.fail("send: " + error.message());
    }
    ++mine.done;
  };
  // Either nothing was done with the channels before, or the peers are known already.
  if (mine.what.count == 2) send_to_both();
  use_up_descriptors();
  mine.opened = 1;
  wait_for(mine.go, 2);
  send_to_both();
  wait_for(mine.go, never);
}

/// The kernel closes descriptors one by one, and these take their time: the last reference to some memory goes with each.
void child_ends_slowly(ledger& mine) {
  const std::string name = mine.what.name.data();
  auto* one = new sending{strait::open_sender<small_message>(name + "-1")};
  for (int i = 0; i < 4; ++i) {
    constexpr ::off_t bytes = 64 << 20;
    const int memory = ::memfd_create("strait-death-ballast", MFD_CLOEXEC);
    if (memory < 0 || ::fallocate(memory, 0, 0, bytes) != 0) {
      throw std::system_error{errno, std::system_category(), "ballast"};
    }
  }
  auto* two = new sending{strait::open_sender<small_message>(name + "-2")};
  for (auto* end : {one, two}) end->blocking_send(make<small_message>(key_of(1, 0)));
  mine.opened = 1;
  wait_for(mine.go, never);
}

template <class T>
void child_of_type(ledger& mine) {
  switch (mine.what.part) {
    case part::stream:
      if (mine.what.role == strait::role::sender) {
        child_streams<strait::sender<T>>(mine);
      } else {
        child_streams<strait::receiver<T>>(mine);
      }
      return;
    case part::fork:
      if (mine.what.role == strait::role::sender) {
        child_forks<strait::sender<T>>(mine);
      } else {
        child_forks<strait::receiver<T>>(mine);
      }
      return;
    case part::fork_while_waiting:
      child_forks_while_waiting(mine);
      return;
    case part::echo:
      child_echoes(mine);
      return;
    case part::no_descriptors:
      child_sends_without_descriptors(mine);
      return;
    case part::slow_end:
      child_ends_slowly(mine);
      return;
  }
}

int child_main() {
  // No child outlives the test, and none leaves a core file.
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  const ::rlimit no_core{0, 0};
  ::setrlimit(RLIMIT_CORE, &no_core);
  void* memory = ::mmap(nullptr, sizeof(ledger), PROT_READ | PROT_WRITE, MAP_SHARED, ledger_descriptor, 0);
  if (memory == MAP_FAILED) return 3;
  ::close(ledger_descriptor);
  auto& mine = *static_cast<ledger*>(memory);
  try {
    if (mine.what.alone_in_network && ::unshare(CLONE_NEWNET) != 0) {
      mine.fail("unshare");
      return 4;
    }
    mine.started = 1;
    wait_for(mine.go, 1);
    if (mine.what.large) {
      child_of_type<large_message>(mine);
    } else {
      child_of_type<small_message>(mine);
    }
  } catch (const std::exception& error) {
    mine.fail(error.what());
  }
  // Threads may still wait for what never comes, so no destructor of theirs is run.
  std::_Exit(mine.failed != 0 ? 1 : 0);
}

// ---- the test's side of a child -------------------------------------------------------------------------------------

class child {
 public:
  explicit child(const order& what, bool go = true) {
    const int memory = ::memfd_create("strait-death-ledger", MFD_CLOEXEC);
    REQUIRE(memory >= 0);
    REQUIRE(::ftruncate(memory, sizeof(ledger)) == 0);
    void* mapped = ::mmap(nullptr, sizeof(ledger), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    REQUIRE(mapped != MAP_FAILED);
    ledger_ = ::new (mapped) ledger{};
    ledger_->what = what;
    ledger_->go = go ? 1 : 0;
    ::posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_adddup2(&actions, memory, ledger_descriptor);
    std::string program = "test-death";
    std::string word = "--child";
    std::array<char*, 3> arguments{program.data(), word.data(), nullptr};
    const int error = ::posix_spawn(&pid_, "/proc/self/exe", &actions, nullptr, arguments.data(), environ);
    ::posix_spawn_file_actions_destroy(&actions);
    ::close(memory);
    REQUIRE(error == 0);
  }
  ~child() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
    ::munmap(ledger_, sizeof(ledger));
  }
  child(const child&) = delete;
  child& operator=(const child&) = delete;

  [[nodiscard]] ledger& book() const noexcept { return *ledger_; }
  [[nodiscard]] pid_t pid() const noexcept { return pid_; }

  void send_signal(int signal) const { REQUIRE(::kill(pid_, signal) == 0); }

  void kill_now() const { send_signal(SIGKILL); }

  /// When its process has ended, in nanoseconds of the steady clock: a machine with much else to do takes its time to
  /// bring that about, and until then there is nothing to tell.
  [[nodiscard]] std::int64_t ended_at() const {
    ::siginfo_t how{};
    // Bounded by ctest's limit: a process that SIGKILL does not end is no failure of ours.
    while (::waitid(P_PID, static_cast<::id_t>(pid_), &how, WEXITED | WNOWAIT) != 0 && errno == EINTR) {
    }
    return strait::now_ns();
  }
  std::int64_t kill_and_wait() const {
    kill_now();
    return ended_at();
  }

  /// As /proc tells it: 'T' when it is stopped.
  [[nodiscard]] char state() const {
    std::ifstream file{"/proc/" + std::to_string(pid_) + "/stat"};
    std::string id;
    std::string name;
    char now = '?';
    file >> id >> name >> now;
    return now;
  }

  /// The status that it ended with; none if it does not end.
  std::optional<int> reap() {
    int status = 0;
    if (!within(patience, [&] { return ::waitpid(pid_, &status, WNOHANG) == pid_; })) return std::nullopt;
    pid_ = -1;
    return status;
  }

 private:
  pid_t pid_ = -1;
  ledger* ledger_ = nullptr;
};

/// How the test's process comes to its end: under a name at once, and at a socket when the other process has come.
template <class End>
class own_end {
 public:
  own_end(const std::string& name, const strait::channel_options& options) {
    if (at_a_socket()) {
      door_.emplace(name, strait::listener_options{.lanes = options});
    } else {
      made_ = open_end<End>(name, options);
    }
  }
  /// To be called once.
  [[nodiscard]] End take() {
    if (door_) made_ = end_of<End>(door_->blocking_accept_until(std::chrono::steady_clock::now() + patience));
    door_.reset();
    return std::move(made_);
  }

 private:
  using message = typename End::value_type;
  std::optional<strait::listener<message, message>> door_;
  End made_;
};

/// Where the file is that carries a channel's locks, or the socket.
std::string path_of(const std::string& name) {
  const auto parsed = strait::parse_memory_name(name);
  return at_a_socket() ? parsed.name : parsed.path();
}

/// Where the file is that the memory is mapped from: what was handed over has no name, but this process has it open.
std::string memory_of(const std::string& name) {
  if (!at_a_socket()) return path_of(name);
  for (const auto& entry : std::filesystem::directory_iterator{"/proc/self/fd"}) {
    std::error_code gone;
    const std::string target = std::filesystem::read_symlink(entry.path(), gone).string();
    if (target == "/memfd:strait:" + path_of(name) + " (deleted)") return entry.path().string();
  }
  return {};
}

/// The channel as a bystander sees it.
class glass {
 public:
  explicit glass(const std::string& name) : is_file_{test::memory() != "sysv"} {
    void* mapped = nullptr;
    if (is_file_) {
      const int file = ::open(memory_of(name).c_str(), O_RDONLY | O_CLOEXEC);
      REQUIRE(file >= 0);
      mapped = ::mmap(nullptr, sizeof(strait::segment_header), PROT_READ, MAP_SHARED, file, 0);
      ::close(file);
    } else {
      mapped = ::shmat(test::system_v_segment(test::key_of(strait::parse_memory_name(name).name)), nullptr, SHM_RDONLY);
    }
    REQUIRE(mapped != MAP_FAILED);  // as shmat says it, too
    header_ = static_cast<strait::segment_header*>(mapped);
  }
  ~glass() {
    if (is_file_) {
      ::munmap(header_, sizeof(strait::segment_header));
    } else {
      ::shmdt(header_);
    }
  }
  glass(const glass&) = delete;
  glass& operator=(const glass&) = delete;

  [[nodiscard]] strait::presence presence(strait::role who) const {
    return static_cast<strait::presence>(header_->ends[static_cast<std::size_t>(who)].presence.load());
  }
  [[nodiscard]] bool parked(strait::role who) const {
    const auto now = presence(who);
    return now == strait::presence::thread_parked || now == strait::presence::hub_parked;
  }
  /// Messages that were ever sent.
  [[nodiscard]] std::uint64_t sent() const { return header_->lane.tail.load(); }
  /// Messages that were ever taken and released.
  [[nodiscard]] std::uint64_t taken() const { return header_->lane.head.load(); }
  [[nodiscard]] std::uint64_t capacity() const { return header_->capacity; }
  [[nodiscard]] std::uint64_t in_lane() const { return header_->lane.tail.load() - header_->lane.head.load(); }
  [[nodiscard]] bool full() const { return in_lane() == header_->capacity; }

 private:
  bool is_file_;
  strait::segment_header* header_;
};

/// In the memory of this run (memories.hpp).
std::string fresh_name() {
  static int count = 0;
  const bool is_path = test::memory() == "file" || at_a_socket();
  const std::string where = is_path ? std::filesystem::temp_directory_path().string() + '/' : "";
  return std::string{test::scheme()} + where + "strait-death-" + std::to_string(::getpid()) + "-" +
         std::to_string(++count);
}

bool exists(const std::string& name) {
  return std::filesystem::exists(path_of(name)) ||
         (test::memory() == "sysv" && test::system_v_segment(test::key_of(strait::parse_memory_name(name).name)) >= 0);
}

/// Everybody has left: nothing is there, except for the file that is to stay, which is taken away.
void check_left_in_order(const std::string& name) {
  const bool stays = test::memory() == "file";
  CHECK(exists(name) == stays);
  if (stays) CHECK(::unlink(path_of(name).c_str()) == 0);
}

order order_for(const std::string& name, strait::role role) {
  order made;
  std::snprintf(made.name.data(), made.name.size(), "%s", name.c_str());
  made.role = role;
  return made;
}

std::mt19937_64& chance() {
  static std::mt19937_64 source{[] {
    const std::uint64_t seed = std::random_device{}();
    std::printf("death: seed %llu\n", static_cast<unsigned long long>(seed));
    return seed;
  }()};
  return source;
}
std::uint64_t chance_below(std::uint64_t bound) {
  return chance()() % bound;
}

/// How many times as much as an ordinary run.
int rounds_factor = 1;

// ---- one kill -------------------------------------------------------------------------------------------------------

enum class moment { streaming, parked, spinning, full };

struct round {
  death::form form;
  strait::wait_policy policy;
  death::moment moment;
  bool replaced;
  /// The replacement waits at the door when the kill comes; otherwise it comes after the death was reported.
  bool early;
  death::form victim_form;
  std::uint64_t capacity;

  [[nodiscard]] std::string text() const {
    constexpr std::array form_names{"thread", "task", "awaitable"};
    constexpr std::array policy_names{"adaptive", "busy", "park"};
    constexpr std::array moment_names{"streaming", "parked", "spinning", "full"};
    return std::string{form_names[static_cast<std::size_t>(form)]} + ", " +
           policy_names[static_cast<std::size_t>(policy)] + ", " + moment_names[static_cast<std::size_t>(moment)] +
           ", victim " + form_names[static_cast<std::size_t>(victim_form)] + ", capacity " + std::to_string(capacity) +
           (replaced ? early ? ", replaced at once" : ", replaced later" : ", not replaced");
  }
};

/// Every form with every policy at every moment that the policy has.
std::vector<round> all_rounds(bool replaced) {
  using enum strait::wait_policy;
  using enum moment;
  constexpr std::array<std::pair<strait::wait_policy, moment>, 9> states{{
      {busy, streaming},
      {adaptive, streaming},
      {park, streaming},
      {adaptive, parked},
      {park, parked},
      {busy, spinning},
      {busy, full},
      {adaptive, full},
      {park, full},
  }};
  std::vector<round> made;
  std::size_t turn = 0;
  // 27 states, four times: 108. In the other memories once: the protocol is the same there, the locks and the names are
  // what may differ.
  const int times = test::memory() == "private" ? 4 * rounds_factor : rounds_factor;
  for (int repeat = 0; repeat < times; ++repeat) {
    for (const auto& [policy, when] : states) {
      for (const form how : forms) {
        constexpr std::array<std::uint64_t, 3> capacities{8, 64, 1024};
        made.push_back(
            {how, policy, when, replaced, repeat % 2 == 0, forms[(turn + turn / 3) % 3], capacities[turn % 3]});
        ++turn;
      }
      ++turn;
    }
  }
  return made;
}

constexpr std::uint64_t after_death = 300;

/// Stands behind an end and its ledger. A check that fails before the loop that uses them has ended would take them away from
/// under it, and what was told of the failure would be lost in a crash or a hang; this ends the test instead.
struct used_to_the_end {
  const ledger& book;
  ~used_to_the_end() {
    if (book.finished == 0) std::abort();
  }
};

/// How long survivors waited for their answers, in ns, since these were last told.
std::vector<std::int64_t> answers;

void check_answer(const ledger& survivor, std::int64_t dead_at) {
  CHECK(survivor.failure_text() == "");
  CHECK(survivor.deaths.load() == 1);
  const std::int64_t answer = survivor.reported_at - dead_at;
  CHECK(answer < answer_bound_ns);
  answers.push_back(answer);
}

/// Messages before a kill in the middle of the stream. Where other work takes the CPUs away the two ends run by turns, so it
/// is lanes full of messages that count, each of which may take as long as a turn.
std::uint64_t some_way_into_the_stream(const round& r) {
  return 1 + chance_below(std::min<std::uint64_t>(5000, 64 * r.capacity));
}

void check_opened(const child& one) {
  const bool opened = within(patience, [&] { return one.book().opened != 0 || one.book().failed != 0; });
  CHECK(one.book().failure_text() == "");
  REQUIRE(opened);
}

template <class T>
void kill_a_sender(const round& r, engine& where) {
  const std::string name = fresh_name();
  ledger survivor;
  survivor.what = order_for(name, strait::role::receiver);
  survivor.what.after_death = r.replaced ? after_death : 0;
  own_end<strait::receiver<T>> own{name, {.capacity = r.capacity, .wait = r.policy}};

  order deed = order_for(name, strait::role::sender);
  deed.large = sizeof(T) == sizeof(large_message);
  deed.form = r.victim_form;
  deed.policy = r.moment == moment::parked ? strait::wait_policy::adaptive : r.policy;
  deed.capacity = r.capacity;
  if (r.moment == moment::parked || r.moment == moment::spinning) {
    deed.count = 1 + chance_below(3 * r.capacity);
    deed.finale = finale::idle;
  }
  child victim{deed};
  check_opened(victim);
  strait::receiver<T> rx = own.take();
  const glass seen{name};
  const used_to_the_end here{survivor};
  if (r.moment != moment::full) where.drive(r.form, rx, survivor);

  const std::uint64_t enough = some_way_into_the_stream(r);
  const bool there = within(patience, [&] {
    const std::uint64_t done = victim.book().done;
    switch (r.moment) {
      case moment::streaming:
        return done >= enough;
      case moment::parked:
        return done == deed.count && survivor.done == done && seen.parked(strait::role::receiver);
      case moment::spinning:
        return done == deed.count && survivor.done == done && seen.in_lane() == 0;
      case moment::full:
        return seen.full() && (r.policy == strait::wait_policy::busy || seen.parked(strait::role::sender));
    }
    return false;
  });
  CHECK(victim.book().failure_text() == "");
  REQUIRE(there);
  if (r.moment == moment::spinning) CHECK(seen.presence(strait::role::receiver) == strait::presence::awake);

  order deputy = deed;
  deputy.generation = 2;
  deputy.count = after_death;
  deputy.finale = finale::close;
  std::optional<child> replacement;
  if (r.replaced && r.early) {
    replacement.emplace(deputy, false);
    REQUIRE(within(patience, [&] { return replacement->book().started != 0; }));
  }

  victim.kill_now();
  if (replacement) replacement->book().go = 1;
  if (r.moment == moment::full) where.drive(r.form, rx, survivor);
  const std::int64_t dead_at = victim.ended_at();
  const bool answered = within(patience, [&] { return survivor.deaths != 0 || survivor.failed != 0; });
  CHECK(answered);
  check_answer(survivor, dead_at);
  // Written after each publication, so at most the last one is missing in the ledger.
  const std::uint64_t committed = victim.book().done;
  CHECK(survivor.at_death.load() >= committed);
  CHECK(survivor.at_death.load() <= committed + 1);

  if (r.replaced) {
    if (!replacement) replacement.emplace(deputy);
    const bool ended = within(patience, [&] { return survivor.finished != 0; });
    CHECK(replacement->book().failure_text() == "");
    CHECK(ended);
    CHECK(survivor.failure_text() == "");
    CHECK(survivor.deaths.load() == 1);
    CHECK(survivor.closed.load() == 1);
    CHECK(survivor.done.load() == survivor.at_death + after_death);
    CHECK(replacement->reap() == 0);
  } else {
    CHECK(within(patience, [&] { return survivor.finished != 0; }));
  }
  if (survivor.finished == 0) std::abort();  // a hang was reported above; nothing can be taken apart under it
  where.tidy();
  rx.close();
  check_left_in_order(name);
}

template <class T>
void kill_a_receiver(const round& r, engine& where) {
  const std::string name = fresh_name();
  ledger survivor;
  survivor.what = order_for(name, strait::role::sender);
  survivor.what.after_death = r.replaced ? after_death : 0;
  own_end<strait::sender<T>> own{name, {.capacity = r.capacity, .wait = r.policy}};

  order deed = order_for(name, strait::role::receiver);
  deed.large = sizeof(T) == sizeof(large_message);
  deed.form = r.victim_form;
  deed.policy =
      r.moment == moment::parked && r.policy == strait::wait_policy::busy ? strait::wait_policy::adaptive : r.policy;
  deed.capacity = r.capacity;
  if (r.moment == moment::full || r.moment == moment::spinning) {
    deed.count = 1 + chance_below(3 * r.capacity);
    deed.finale = finale::idle;
  }
  // Parked: the lane runs empty, and the victim sleeps in it.
  const std::uint64_t before = 1 + chance_below(3 * r.capacity);
  if (r.moment == moment::parked) survivor.what.count = before;
  child victim{deed};
  check_opened(victim);
  strait::sender<T> tx = own.take();
  const glass seen{name};
  const used_to_the_end here{survivor};
  where.drive(r.form, tx, survivor);

  const std::uint64_t enough = some_way_into_the_stream(r);
  const bool there = within(patience, [&] {
    switch (r.moment) {
      case moment::streaming:
        return victim.book().done >= enough;
      case moment::parked:
        return survivor.finished != 0 && seen.in_lane() == 0 && seen.parked(strait::role::receiver);
      case moment::spinning:
        return victim.book().finished != 0 && seen.full();
      case moment::full:
        return victim.book().finished != 0 && seen.full() &&
               (r.policy == strait::wait_policy::busy || seen.parked(strait::role::sender));
    }
    return false;
  });
  CHECK(victim.book().failure_text() == "");
  REQUIRE(there);
  if (r.moment == moment::spinning) CHECK(seen.presence(strait::role::sender) == strait::presence::awake);

  order deputy = deed;
  deputy.count = no_limit;
  deputy.from_anywhere = true;
  deputy.finale = finale::close;
  std::optional<child> replacement;
  if (r.replaced && r.early) {
    replacement.emplace(deputy, false);
    REQUIRE(within(patience, [&] { return replacement->book().started != 0; }));
  }

  victim.kill_now();
  if (replacement) replacement->book().go = 1;
  if (r.moment == moment::parked) {
    // Nobody waits for anything: the survivor learns of it when it uses its end again.
    survivor.what.count = no_limit;
    where.drive(r.form, tx, survivor);
  }
  const std::int64_t dead_at = victim.ended_at();
  const bool answered = within(patience, [&] { return survivor.deaths != 0 || survivor.failed != 0; });
  CHECK(answered);
  check_answer(survivor, dead_at);
  CHECK(victim.book().failure_text() == "");
  CHECK(victim.book().done.load() <= survivor.at_death);

  if (r.replaced) {
    if (!replacement) replacement.emplace(deputy);
    const bool sent = within(patience, [&] { return survivor.finished != 0; });
    CHECK(sent);
    if (!sent) std::abort();
    CHECK(survivor.failure_text() == "");
    CHECK(survivor.deaths.load() == 1);
    where.tidy();
    // With nobody in it the channel would be gone, and what waits in the lane with it.
    check_opened(*replacement);
    tx.close();
    const bool drained =
        within(patience, [&] { return replacement->book().finished != 0 || replacement->book().failed != 0; });
    CHECK(drained);
    const ledger& taken = replacement->book();
    CHECK(taken.failure_text() == "");
    CHECK(taken.closed.load() == 1);
    CHECK(taken.done.load() > 0);
    // Nothing is lost: it begins at the latest behind what the dead one had taken (whose last may not be in its
    // ledger). Nothing comes twice but what the dead one had not released: an eighth of the lane.
    const std::uint64_t victim_took = victim.book().done;
    CHECK(sequence_in(taken.first) <= victim_took + 1);
    CHECK(sequence_in(taken.first) + std::max<std::uint64_t>(r.capacity / 8, 1) >= victim_took);
    CHECK(sequence_in(taken.last) + 1 == survivor.done.load());
    CHECK(replacement->reap() == 0);
  } else {
    const bool ended = within(patience, [&] { return survivor.finished != 0; });
    CHECK(ended);
    if (!ended) std::abort();
    where.tidy();
    tx.close();
  }
  check_left_in_order(name);
}

void kill_many(strait::role who, bool replaced) {
  engine where;
  std::size_t count = 0;
  std::int64_t began = strait::now_ns();
  for (const round& r : all_rounds(replaced)) {
    CAPTURE(r.text());
    const bool large = count++ % 2 != 0;
    if (who == strait::role::sender) {
      large ? kill_a_sender<large_message>(r, where) : kill_a_sender<small_message>(r, where);
    } else {
      large ? kill_a_receiver<large_message>(r, where) : kill_a_receiver<small_message>(r, where);
    }
  }
  std::sort(answers.begin(), answers.end());
  // By nearest rank: of fewer than a hundred, the longest.
  const std::size_t rank = (answers.size() * 99 + 99) / 100;
  std::printf("death: %zu %ss killed, %s: %.1f s, an answer took %.1f ms at the 99th percentile and %.1f ms at most\n",
              count, strait::to_string(who).data(), replaced ? "replaced" : "not replaced",
              static_cast<double>(strait::now_ns() - began) / 1e9, static_cast<double>(answers.at(rank - 1)) / 1e6,
              static_cast<double>(answers.back()) / 1e6);
  answers.clear();
  CHECK(count >= (test::memory() == "private" ? 100 : 27));
}

}  // namespace death

namespace death {

// ---- a channel that was left behind ---------------------------------------------------------------------------------

/// Opens both ends of what may have been left behind, and sends a message through. Tells a check that fails from one
/// that could be passed by luck: nobody is refused, nobody is told of an end that is not one, and nothing stays.
template <class T>
void check_works_again(const std::string& name, strait::role first, std::optional<std::size_t> capacity) {
  constexpr std::uint64_t mark = key_of(77, 7);
  const strait::channel_options options{.capacity = capacity};
  std::optional<strait::sender<T>> tx;
  std::optional<strait::receiver<T>> rx;
  int deaths = 0;
  bool marked = false;
  // Takes what there is, up to the mark.
  const auto drain = [&] {
    for (;;) {
      std::error_code error;
      const std::optional<T> message = rx->try_recv(error);
      if (error == strait::errc::peer_died) {
        ++deaths;
        continue;
      }
      CHECK(error == std::error_code{});
      if (!message || error) return;
      CHECK(intact(*message));
      if (message->key == mark) {
        marked = true;
        return;
      }
    }
  };
  const auto send_mark = [&] {
    std::error_code error;
    bool sent = tx->try_send(make<T>(mark), error);
    if (error == strait::errc::peer_died) {
      ++deaths;
      sent = tx->try_send(make<T>(mark), error);
    }
    CHECK(error == std::error_code{});
    return sent;
  };
  if (first == strait::role::receiver) {
    rx.emplace(strait::open_receiver<T>(name, options));
    drain();
    CHECK_FALSE(rx->is_closed());
    tx.emplace(strait::open_sender<T>(name, options));
    CHECK(send_mark());
  } else {
    tx.emplace(strait::open_sender<T>(name, options));
    const bool sent = send_mark();  // there may be no room beside what was left
    CHECK_FALSE(tx->is_closed());
    rx.emplace(strait::open_receiver<T>(name, options));
    if (!sent) {
      drain();
      CHECK(send_mark());
    }
  }
  drain();
  CHECK(marked);
  CHECK(deaths <= 1);
  CHECK_FALSE(rx->is_closed());
  if (first == strait::role::receiver) {
    rx->close();
    tx->close();
  } else {
    tx->close();
    std::error_code error;
    CHECK_FALSE(rx->blocking_recv(error));
    CHECK(error == std::error_code{});
    rx->close();
  }
  check_left_in_order(name);
}

// ---- a survivor, for the cases that are not a round -----------------------------------------------------------------

template <class End>
struct survivor {
  survivor(const std::string& name, death::form how, strait::wait_policy policy)
      : how{how}, own{std::in_place, name, strait::channel_options{.capacity = 64, .wait = policy}} {
    book.what = order_for(
        name, std::is_same_v<End, strait::receiver<small_message>> ? strait::role::receiver : strait::role::sender);
  }
  void drive(engine& where) {
    if (own) end = own->take();
    own.reset();
    where.drive(how, end, book);
  }
  [[nodiscard]] bool told_of_death(std::int64_t dead_at) {
    const bool told = within(patience, [this] { return book.deaths != 0 || book.failed != 0; });
    CHECK(told);
    check_answer(book, dead_at);
    return told;
  }
  void end_of(engine& where) {
    const bool ended = within(patience, [this] { return book.finished != 0; });
    CHECK(ended);
    CHECK(book.failure_text() == "");
    if (!ended) std::abort();  // it cannot be taken apart while something waits in it
    where.tidy();
  }

  death::form how;
  /// Until it is driven for the first time; then `end`.
  std::optional<own_end<End>> own;
  End end;
  ledger book;
  used_to_the_end both{book};
};

/// Says so where a case is about names, replacements or mailboxes, of which memory that is handed over has none
/// (docs/design/unix.md).
bool is_about_names() {
  if (at_a_socket()) MESSAGE("does not apply: memory that is handed over has no name to enter again by");
  return at_a_socket();
}

// ---- stopped --------------------------------------------------------------------------------------------------------

/// How long a peer is stopped: much longer than any poll, and than the second in which a death would be reported.
constexpr auto stopped_for = 1200ms;

template <class Own>
void stop_a_peer(death::form how, engine& where) {
  constexpr strait::role peer_role = std::is_same_v<Own, receiving> ? strait::role::sender : strait::role::receiver;
  const std::string name = fresh_name();
  survivor<Own> here{name, how, strait::wait_policy::adaptive};
  child peer{order_for(name, peer_role)};
  check_opened(peer);
  here.drive(where);
  REQUIRE(within(patience, [&] { return here.book.done > 1000; }));
  peer.send_signal(SIGSTOP);
  CHECK(within(patience, [&] { return peer.state() == 'T'; }));
  // How far it gets without the peer, whose cursor does not move. Whether it gets there is open: the peer may have been
  // stopped between taking an announcement back and ringing, and then it sleeps beside what there is to do.
  const glass seen{name};
  const std::uint64_t most = std::is_same_v<Own, receiving> ? seen.sent() : seen.taken() + seen.capacity();
  std::this_thread::sleep_for(stopped_for);
  CHECK(here.book.deaths.load() == 0);
  CHECK(here.book.finished.load() == 0);
  const std::uint64_t before = here.book.done;
  CHECK(before <= most);
  peer.send_signal(SIGCONT);
  CHECK(within(patience, [&] { return here.book.done > before + 1000; }));
  CHECK(here.book.deaths.load() == 0);
  CHECK(peer.book().failure_text() == "");
  (void)here.told_of_death(peer.kill_and_wait());
  here.end_of(where);
}

// ---- a fork's child -------------------------------------------------------------------------------------------------

/// The owner of an end has a child by fork. `killed`: the owner is killed and replaced while that child lives on;
/// otherwise the owner goes on, and the child ends.
template <class Own>
void fork_an_owner(bool killed, death::form how, engine& where) {
  using Other = std::conditional_t<std::is_same_v<Own, receiving>, sending, receiving>;
  const std::string name = fresh_name();
  survivor<Own> here{name, how, strait::wait_policy::park};
  here.book.what.after_death = no_limit / 2;
  order deed = order_for(name, std::is_same_v<Own, receiving> ? strait::role::sender : strait::role::receiver);
  deed.part = part::fork;
  deed.count = 500;
  child owner{deed};
  if constexpr (std::is_same_v<Own, sending>) here.book.what.count = killed ? 500 : 250;
  here.drive(where);
  REQUIRE(within(patience, [&] { return owner.book().grandchild != 0 || owner.book().failed != 0; }));
  const pid_t grandchild = owner.book().grandchild;
  const auto grandchild_ends = [&] {
    owner.book().grandchild_go = 1;
    CHECK(within(patience, [&] { return owner.book().grandchild_gone != 0; }));
  };

  if (!killed) {
    owner.book().go = 2;
    if constexpr (std::is_same_v<Own, sending>) {
      // In the middle of the stream, where the copy is far behind.
      here.end_of(where);
      REQUIRE(within(patience, [&] { return owner.book().done == 250; }));
      grandchild_ends();
      here.book.what.count = 500;
      here.drive(where);
    } else {
      grandchild_ends();
    }
    CHECK(within(patience, [&] { return owner.book().done == 500 && here.book.done == 500; }));
    CHECK(owner.book().failure_text() == "");
    CHECK(here.book.deaths.load() == 0);
    CHECK(here.book.closed.load() == 0);
    if constexpr (std::is_same_v<Own, sending>) {
      here.end_of(where);
      here.end.close();
      owner.kill_now();
      CHECK(owner.reap() == SIGKILL);
      check_works_again<small_message>(name, strait::role::sender, std::nullopt);
    } else {
      here.book.what.after_death = 0;
      (void)here.told_of_death(owner.kill_and_wait());
      here.end_of(where);
      here.end.close();
    }
  } else {
    owner.book().go = 2;
    REQUIRE(within(patience, [&] { return owner.book().done == 500 && here.book.done == 500; }));
    const std::int64_t dead_at = owner.kill_and_wait();
    if constexpr (std::is_same_v<Own, sending>) {
      here.end_of(where);
      here.book.what.count = no_limit;
      here.drive(where);
    }
    (void)here.told_of_death(dead_at);
    CHECK(::kill(grandchild, 0) == 0);
    // A replacement, here; the grandchild ends while it streams.
    Other other = open_end<Other>(name, {});
    std::error_code error;
    for (std::uint64_t i = 0; i < 400; ++i) {
      if (i == 200) grandchild_ends();
      if constexpr (std::is_same_v<Other, sending>) {
        other.blocking_send(make<small_message>(key_of(2, i)), error);
      } else {
        CHECK(other.blocking_recv(error).has_value());
      }
      REQUIRE(error == std::error_code{});
    }
    other.close();
    here.end_of(where);
    CHECK(here.book.closed.load() == 1);
    CHECK(here.book.deaths.load() == 1);
    here.end.close();
    // The owner's child is ours now.
    int status = -1;
    CHECK(owner.reap().has_value());
    CHECK(within(patience, [&] { return ::waitpid(grandchild, &status, WNOHANG) == grandchild; }));
    CHECK(status == 0);
  }
}

// ---- two hubs, two processes ----------------------------------------------------------------------------------------

strait::task<> ping(sending& there, receiving& back, ledger& mine, std::uint64_t count) {
  std::error_code error;
  for (std::uint64_t i = 0; i < count; ++i) {
    co_await there.send(make<small_message>(key_of(1, i)), error);
    if (error) mine.fail("ping: " + error.message());
    const auto message = co_await back.recv(error);
    if (!heard(mine, message, error)) break;
  }
  // One more, for which there is no ping: it waits until the peer is killed.
  while (heard(mine, co_await back.recv(error), error)) {
  }
  mine.finished = 1;
}

void play_ping_pong(bool alone_in_network, engine& where) {
  constexpr std::uint64_t count = 2000;
  const std::string name = fresh_name();
  order deed = order_for(name, strait::role::receiver);
  deed.part = part::echo;
  deed.policy = strait::wait_policy::park;
  deed.alone_in_network = alone_in_network;
  child peer{deed};
  if (!within(patience, [&] { return peer.book().opened != 0 || peer.book().failed != 0; })) FAIL("no peer");
  if (alone_in_network && peer.book().failure_text() == "unshare") {
    MESSAGE("skipped: this user may not leave for a network of its own (CLONE_NEWNET)");
    return;
  }
  REQUIRE(peer.book().failure_text() == "");
  const strait::channel_options options{.wait = strait::wait_policy::park};
  auto there = strait::open_sender<small_message>(name + "-there", options);
  auto back = strait::open_receiver<small_message>(name + "-back", options);
  ledger mine;
  mine.expected = key_of(1, 0);
  where.drive_task(ping(there, back, mine, count));
  CHECK(within(patience, [&] { return mine.done == count || mine.failed != 0; }));
  CHECK(mine.failure_text() == "");
  CHECK(peer.book().failure_text() == "");
  // Both wait now: on their doorbells, or on the word where those could not be handed over.
  const auto expected = alone_in_network ? strait::presence::thread_parked : strait::presence::hub_parked;
  const glass to_peer{name + "-there"};
  const glass to_us{name + "-back"};
  CHECK(within(patience, [&] { return to_peer.presence(strait::role::receiver) == expected; }));
  CHECK(within(patience, [&] { return to_us.presence(strait::role::receiver) == expected; }));
  CHECK(mine.deaths.load() == 0);
  const std::int64_t dead_at = peer.kill_and_wait();
  const bool ended = within(patience, [&] { return mine.finished != 0; });
  CHECK(ended);
  check_answer(mine, dead_at);
  if (!ended) std::abort();
  there.close();
  back.close();
  check_left_in_order(name + "-there");
  check_left_in_order(name + "-back");
}

}  // namespace death

using namespace death;

TEST_CASE("a sender is killed and not replaced") {
  kill_many(strait::role::sender, false);
}
TEST_CASE("a sender is killed and replaced") {
  if (is_about_names()) return;
  kill_many(strait::role::sender, true);
}
TEST_CASE("a receiver is killed and not replaced") {
  kill_many(strait::role::receiver, false);
}
TEST_CASE("a receiver is killed and replaced") {
  if (is_about_names()) return;
  kill_many(strait::role::receiver, true);
}

TEST_CASE("a peer that is stopped is not dead") {
  engine where;
  stop_a_peer<receiving>(form::awaitable, where);
  stop_a_peer<sending>(form::thread, where);
  stop_a_peer<sending>(form::task, where);
}

TEST_CASE("both ends are killed: whoever comes next enters, and leaves nothing") {
  if (is_about_names()) return;
  for (int i = 0; i < 24 * rounds_factor; ++i) {
    CAPTURE(i);
    const std::string name = fresh_name();
    order sends = order_for(name, strait::role::sender);
    order takes = order_for(name, strait::role::receiver);
    sends.form = forms[static_cast<std::size_t>(i) % 3];
    takes.form = forms[static_cast<std::size_t>(i / 3) % 3];
    // The one that is killed second may be told of it.
    sends.finale = finale::idle;
    takes.finale = finale::idle;
    // Every other time there is something left in the lane for certain.
    if (i % 2 == 0) takes.count = 100;
    child sender{sends};
    child receiver{takes};
    check_opened(sender);
    check_opened(receiver);
    REQUIRE(within(patience, [&] { return receiver.book().done >= 100; }));
    i % 3 == 0 ? sender.kill_now() : receiver.kill_now();
    i % 3 == 0 ? receiver.kill_now() : sender.kill_now();
    CHECK(sender.reap() == SIGKILL);
    CHECK(receiver.reap() == SIGKILL);
    CHECK(sender.book().failure_text() == "");
    CHECK(receiver.book().failure_text() == "");
    CHECK(exists(name));
    const strait::role first = i % 4 < 2 ? strait::role::sender : strait::role::receiver;
    // A file is never replaced by another channel.
    switch (test::memory() == "file" ? 0 : i / 4 % 4) {
      case 0:
        check_works_again<small_message>(name, first, std::nullopt);
        break;
      case 1:
        check_works_again<small_message>(name, first, 64);
        break;
      case 2:
        check_works_again<small_message>(name, first, 16);
        break;
      case 3:
        check_works_again<large_message>(name, first, std::nullopt);
        break;
    }
  }
}

TEST_CASE("a process ends without closing: exit, abort, exec") {
  engine where;
  for (const finale how : {finale::exit, finale::abort, finale::exec}) {
    for (const form waits : forms) {
      CAPTURE(static_cast<int>(how));
      CAPTURE(static_cast<int>(waits));
      const std::string name = fresh_name();
      order deed = order_for(name, strait::role::sender);
      deed.form = waits;
      deed.count = 100;
      deed.finale = how;
      {
        survivor<receiving> here{name, waits, strait::wait_policy::park};
        child peer{deed};
        here.drive(where);
        check_opened(peer);
        REQUIRE(within(patience, [&] { return peer.book().done == deed.count; }));
        (void)here.told_of_death(strait::now_ns());
        CHECK(here.book.at_death.load() == deed.count);
        here.end_of(where);
        if (how == finale::exec) CHECK(::kill(peer.pid(), 0) == 0);  // it lives, as another program
        if (how == finale::exit) CHECK(peer.reap() == 0);
        if (how == finale::abort) CHECK(peer.reap() == SIGABRT);
      }
      check_left_in_order(name);
      deed.role = strait::role::receiver;
      {
        survivor<sending> here{name, waits, strait::wait_policy::park};
        child peer{deed};
        here.drive(where);
        check_opened(peer);
        REQUIRE(within(patience, [&] { return peer.book().done == deed.count; }));
        (void)here.told_of_death(strait::now_ns());
        here.end_of(where);
      }
      check_left_in_order(name);
    }
  }
}

TEST_CASE("a fork's child neither keeps a dead owner alive nor closes its channel") {
  if (is_about_names()) return;
  // The grandchildren are to be ours when their parents are gone.
  REQUIRE(::prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
  engine where;
  for (const bool killed : {false, true}) {
    for (const form how : forms) {
      CAPTURE(killed);
      CAPTURE(static_cast<int>(how));
      fork_an_owner<receiving>(killed, how, where);
      fork_an_owner<sending>(killed, how, where);
    }
  }
}

TEST_CASE("a fork while a coroutine waits for a sender to come") {
  if (is_about_names()) return;
  const std::string name = fresh_name();
  order deed = order_for(name, strait::role::receiver);
  deed.part = part::fork_while_waiting;
  deed.policy = strait::wait_policy::park;
  child owner{deed};
  check_opened(owner);
  {
    const glass seen{name};
    REQUIRE(within(patience, [&] { return seen.parked(strait::role::receiver); }));
  }
  owner.book().go = 2;
  REQUIRE(within(patience, [&] { return owner.book().grandchild != 0; }));
  owner.book().grandchild_go = 1;
  CHECK(within(patience, [&] { return owner.book().grandchild_gone != 0; }));
  auto tx = strait::open_sender<small_message>(name);
  for (std::uint64_t i = 0; i < 100; ++i) tx.blocking_send(make<small_message>(key_of(1, i)));
  tx.close();
  CHECK(within(patience, [&] { return owner.book().finished != 0; }));
  CHECK(owner.book().failure_text() == "");
  CHECK(owner.book().done.load() == 100);
  owner.kill_now();
  CHECK(owner.reap() == SIGKILL);
  check_works_again<small_message>(name, strait::role::receiver, std::nullopt);
}

TEST_CASE("two parked hubs in two processes ring each other's doorbells") {
  if (is_about_names()) return;
  engine where;
  play_ping_pong(false, where);
}

TEST_CASE("two parked hubs that no socket connects wait on the word") {
  if (is_about_names()) return;
  engine where;
  play_ping_pong(true, where);
}

TEST_CASE("a ringer without descriptors wakes the hubs of two processes") {
  if (is_about_names()) return;
  engine where;
  // 1: it has done nothing with the channels before; 2: it knows its peers.
  for (const std::uint64_t messages : {std::uint64_t{1}, std::uint64_t{2}}) {
    for (const form how : {form::task, form::awaitable}) {
      CAPTURE(messages);
      CAPTURE(static_cast<int>(how));
      const std::string name = fresh_name();
      order deed = order_for(name, strait::role::sender);
      deed.part = part::no_descriptors;
      deed.count = messages;
      order waits = order_for(name + "-2", strait::role::receiver);
      waits.form = how;
      waits.policy = strait::wait_policy::park;
      std::optional<survivor<receiving>> here;
      std::optional<child> there;
      const auto receivers_come = [&] {
        here.emplace(name + "-1", how, strait::wait_policy::park);
        here->drive(where);
        there.emplace(waits);
        check_opened(*there);
      };
      if (messages == 2) receivers_come();
      child peer{deed};
      check_opened(peer);
      if (messages == 1) receivers_come();
      const glass near{name + "-1"};
      const glass far{name + "-2"};
      REQUIRE(within(patience, [&] {
        return here->book.done == messages - 1 && there->book().done == messages - 1 &&
               near.presence(strait::role::receiver) == strait::presence::hub_parked &&
               far.presence(strait::role::receiver) == strait::presence::hub_parked;
      }));
      peer.book().go = 2;
      CHECK(within(2s, [&] { return here->book.done == messages; }));
      CHECK(within(2s, [&] { return there->book().done == messages; }));
      CHECK(peer.book().failure_text() == "");
      const std::int64_t dead_at = peer.kill_and_wait();
      (void)here->told_of_death(dead_at);
      here->end_of(where);
      CHECK(within(patience, [&] { return there->book().deaths != 0; }));
      check_answer(there->book(), dead_at);
      CHECK(there->reap() == 0);
    }
  }
}

TEST_CASE("a survivor without descriptors is told of a death") {
  if (is_about_names()) return;
  for (const strait::role who : {strait::role::sender, strait::role::receiver}) {
    for (const form how : {form::thread, form::task}) {
      const std::string name = fresh_name();
      order stays = order_for(name, who);
      stays.form = how;
      stays.policy = strait::wait_policy::park;
      stays.no_descriptors = true;
      child poor{stays};
      check_opened(poor);
      child peer{order_for(name, strait::other(who))};
      check_opened(peer);
      REQUIRE(within(patience, [&] { return poor.book().done > 1000; }));
      const std::int64_t dead_at = peer.kill_and_wait();
      CHECK(within(patience, [&] { return poor.book().deaths != 0; }));
      check_answer(poor.book(), dead_at);
      CHECK(poor.reap() == 0);
      check_left_in_order(name);
    }
  }
}

TEST_CASE("who replaces a receiver that had taken all, from a sender that has closed, waits for the next sender") {
  if (is_about_names()) return;
  const std::string name = fresh_name();
  order deed = order_for(name, strait::role::receiver);
  deed.finale = finale::idle;
  auto tx = strait::open_sender<small_message>(name, {.capacity = 64});
  child first{deed};
  check_opened(first);
  for (std::uint64_t i = 0; i < 5; ++i) tx.blocking_send(make<small_message>(key_of(1, i)));
  {
    const glass seen{name};
    REQUIRE(within(patience, [&] { return first.book().done == 5 && seen.in_lane() == 0; }));
  }
  tx.close();
  REQUIRE(within(patience, [&] { return first.book().closed != 0; }));
  first.kill_now();
  CHECK(first.reap() == SIGKILL);
  REQUIRE(exists(name));
  auto rx = strait::open_receiver<small_message>(name);
  CHECK_FALSE(rx.is_closed());
  std::error_code error;
  CHECK_FALSE(rx.blocking_recv_until(std::chrono::steady_clock::now() + 1ms, error));
  CHECK(error == std::errc::timed_out);
  auto next = strait::open_sender<small_message>(name);
  next.blocking_send(make<small_message>(key_of(2, 0)));
  const auto got = rx.blocking_recv();
  REQUIRE(got);
  CHECK(got->key == key_of(2, 0));
}

TEST_CASE("who is told of a death by one channel and closes the others leaves no name of them") {
  if (is_about_names()) return;
  const int wanted = 4 * rounds_factor;
  int shown = 0;
  for (int attempt = 0; shown < wanted; ++attempt) {
    CAPTURE(attempt);
    REQUIRE(attempt < 10 * wanted);
    const std::string name = fresh_name();
    order deed = order_for(name, strait::role::sender);
    deed.part = part::slow_end;
    // The locks are looked at every ten milliseconds, and not when the kernel has come to the socket as well.
    deed.alone_in_network = true;
    child peer{deed};
    if (!within(patience, [&] { return peer.book().opened != 0 || peer.book().failed != 0; })) FAIL("no peer");
    if (peer.book().failure_text() == "unshare") {
      MESSAGE("skipped: this user may not leave for a network of its own (CLONE_NEWNET)");
      return;
    }
    REQUIRE(peer.book().failure_text() == "");
    std::array ends{strait::open_receiver<small_message>(name + "-1"),
                    strait::open_receiver<small_message>(name + "-2")};
    for (auto& end : ends) CHECK(end.blocking_recv().has_value());
    std::array<std::error_code, 2> told;
    // Both look at their peer, and so watch it.
    for (std::size_t j : {0U, 1U}) CHECK_FALSE(ends[j].try_recv(told[j]));
    peer.kill_now();
    CHECK(within(patience, [&] {
      for (std::size_t j : {0U, 1U}) (void)ends[j].try_recv(told[j]);
      return told[0] || told[1];
    }));
    const std::int64_t began = strait::now_ns();
    for (auto& end : ends) end.close();
    if (strait::now_ns() - began >= 1'000'000'000) {
      // The kernel, kept from it by other work, took longer over the dead than who closes waits for it. Then the name is the
      // next comer's to take away, and this attempt shows nothing.
      CHECK(peer.reap() == SIGKILL);
      for (const char* which : {"-1", "-2"}) {
        if (exists(name + which)) strait::remove_channel(name + which);
      }
      continue;
    }
    // Where both were told, the kernel had dropped both locks before we looked: this attempt shows nothing either.
    if (static_cast<bool>(told[0]) != static_cast<bool>(told[1])) ++shown;
    check_left_in_order(name + "-1");
    check_left_in_order(name + "-2");
    CHECK(peer.reap() == SIGKILL);
  }
}

TEST_CASE("watches begin and end while others do") {
  // Every thread is the last to watch again and again, so that sentries are relieved and posted at the same time.
  struct blind final : strait::process_watcher {
    bool look() noexcept override { return false; }
  };
  const auto watched = strait::this_process();
  std::atomic<int> ended{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      for (int turn = 0; turn < 3000; ++turn) {
        blind watcher;
        strait::watch_process(watched, watcher);
        strait::unwatch_process(watcher);
      }
      ++ended;
    });
  }
  const bool all = within(patience, [&] { return ended == 3; });
  CHECK(all);
  if (!all) std::abort();  // whoever hangs cannot be joined
  for (auto& thread : threads) thread.join();
}

/// Whether the thread that waits on a hub's behalf sleeps on a futex that other processes can wake.
static bool relay_sleeps_on_word() {
  for (const auto& thread : std::filesystem::directory_iterator{"/proc/self/task"}) {
    std::string name;
    std::ifstream{thread.path() / "comm"} >> name;
    if (name != "strait-relay") continue;
    long call = -1;
    std::string address;
    std::string operation;
    std::ifstream{thread.path() / "syscall"} >> call >> address >> operation;
    // FUTEX_WAIT_BITSET; condition variables of a process have the private bit set as well.
    if (call == SYS_futex && operation == "0x9") return true;
  }
  return false;
}

TEST_CASE("a thread waits where a coroutine gave up") {
  if (is_about_names()) return;
  const std::string name = fresh_name();
  auto rx = strait::open_receiver<small_message>(name, {.wait = strait::wait_policy::park});
  const glass seen{name};
  const auto parks = [&] { return seen.presence(strait::role::receiver) == strait::presence::thread_parked; };
  asio::io_context context{1};
  asio::cancellation_signal cancel;
  std::error_code outcome;
  strait::async_recv(
      rx, asio::bind_executor(context, asio::bind_cancellation_slot(
                                           cancel.slot(), [&](std::error_code error, std::optional<small_message>) {
                                             outcome = error;
                                           })));
  // Nobody is there who could have its doorbell, so a thread sleeps on the word for it.
  REQUIRE(within(patience, [&] {
    context.poll();
    return parks() && relay_sleeps_on_word();
  }));
  cancel.emit(asio::cancellation_type::all);
  REQUIRE(within(patience, [&] {
    context.poll();
    return outcome == asio::error::operation_aborted;
  }));
  REQUIRE(!parks());
  std::atomic<bool> taken{false};
  std::thread thread{[&] {
    if (rx.blocking_recv()) taken = true;
  }};
  REQUIRE(within(patience, parks));
  auto tx = strait::open_sender<small_message>(name);
  tx.blocking_send(make<small_message>(key_of(1, 0)));
  const bool woken = within(patience, [&] { return taken.load(); });
  CHECK(woken);
  if (!woken) std::abort();
  thread.join();
}

TEST_CASE("nothing of all this is left") {
  const std::string ours = "strait-death-" + std::to_string(::getpid());
  for (const auto& directory : {std::filesystem::path{"/dev/shm"}, std::filesystem::temp_directory_path()}) {
    for (const auto& entry : std::filesystem::directory_iterator{directory}) {
      if (entry.path().filename().string().find(ours) == std::string::npos) continue;
      // A file stays until its owner removes it, which is us.
      const bool stays = test::memory() == "file" && entry.path().filename().string().starts_with(ours);
      CHECK(stays);
      if (stays) std::filesystem::remove(entry.path());
    }
  }
  for (const auto& channel : strait::list_channels()) CHECK(channel.name.name.find(ours) == std::string::npos);
}

int main(int argc, char** argv) {
  const std::string_view word = argc > 1 ? argv[1] : "";
  if (word == "--child") return child_main();
  if (word == "--sleep") {
    for (;;) ::pause();
  }
  constexpr std::string_view rounds = "--rounds=";
  if (word.starts_with(rounds)) death::rounds_factor = std::atoi(word.substr(rounds.size()).data());
  doctest::Context context{argc, argv};
  return context.run();
}
