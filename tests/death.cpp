// kill -9, and every other way in which a process ends or merely seems to: what the survivor is told, what reaches it,
// and what is left behind.
//
// The test process holds one end; the other lives in a child, which is this program again (by exec). A child keeps a
// ledger in memory of its own, shared with the test only: what it had sent or taken when it was killed stands there.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
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
  /// Opens and closes until it is killed.
  open_close,
  /// Holds one end and has a child by fork.
  fork,
  /// Sends one message when it has no descriptor left.
  no_descriptors,
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
  /// The system call that kills the child once it works on the channel; of fcntl, which command.
  int fatal_call = -1;
  int fatal_command = -1;
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
  /// The grandchild.
  std::atomic<std::int32_t> grandchild{0};

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

constexpr int ledger_descriptor = 100;

template <class T>
auto open_end(strait::role role, std::string_view name, const strait::channel_options& options) {
  if constexpr (std::is_same_v<T, strait::sender<typename T::value_type>>) {
    (void)role;
    return strait::open_sender<typename T::value_type>(name, options);
  } else {
    return strait::open_receiver<typename T::value_type>(name, options);
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
      made.emplace(open_end<End>(mine.what.role, mine.what.name.data(), options));
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

/// Has the kernel kill this process when it makes that system call: a kill -9 at a chosen place.
void die_at(int call, int command) {
  std::array<::sock_filter, 6> program{{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(::seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(call), 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(::seccomp_data, args) + sizeof(std::uint64_t)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(command), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  if (command < 0) program[3] = BPF_JUMP(BPF_JMP | BPF_JA, 0, 0, 0);
  const ::sock_fprog filter{program.size(), program.data()};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0) {
    throw std::system_error{errno, std::system_category(), "seccomp"};
  }
}

void wait_for_go(const ledger& mine, std::uint32_t at_least) {
  // Unbounded: the test bounds it, and takes its children with it when it ends.
  while (mine.go < at_least) std::this_thread::sleep_for(50us);
}

template <class End>
void child_streams(ledger& mine) {
  // Leaked: most finales are to find it open.
  auto* end = new End{open_when_free<End>(mine)};
  auto* runs = new engine;
  mine.opened = 1;
  runs->drive(mine.what.form, *end, mine);
  while (mine.finished == 0) std::this_thread::sleep_for(50us);
  if (mine.failed != 0) return;
  switch (mine.what.finale) {
    case finale::close:
      end->close();
      return;
    case finale::idle:
      wait_for_go(mine, no_limit & 0xffff'ffff);
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

void child_opens_and_closes(ledger& mine) {
  const std::string name = mine.what.name.data();
  const strait::channel_options options{.capacity = mine.what.capacity};
  // What is opened once in a process's life is not what is to be interrupted.
  (void)strait::this_process();
  if (mine.what.fatal_call >= 0) die_at(mine.what.fatal_call, mine.what.fatal_command);
  mine.opened = 1;
  const auto send_two = [&] {
    auto end = strait::open_sender<small_message>(name, options);
    std::error_code error;
    for (int i = 0; i < 2; ++i) (void)end.try_send(next<small_message>(mine), error);
  };
  const auto take_some = [&] {
    auto end = strait::open_receiver<small_message>(name, options);
    std::error_code error;
    for (int i = 0; i < 4; ++i) (void)end.try_recv(error);
  };
  const auto both = [&] {
    auto in = strait::open_receiver<small_message>(name, options);
    auto out = strait::open_sender<small_message>(name, options);
    (void)out.try_send(next<small_message>(mine));
    (void)in.try_recv();
    in.close();
  };
  for (; mine.done < mine.what.count; ++mine.done) {
    if (mine.what.part == part::open_close && mine.what.generation == 2) {
      both();
    } else if (mine.what.role == strait::role::sender) {
      send_two();
    } else {
      take_some();
    }
  }
}

template <class End>
void child_forks(ledger& mine) {
  auto* end = new End{open_when_free<End>(mine)};
  mine.opened = 1;
  // Three of some more: something is taken and not yet released when the fork copies it.
  const std::uint64_t all = std::exchange(mine.what.count, 3);
  drive_in_thread(*end, mine);
  // A receiver that waits in a coroutine where nobody can ring yet has a thread to wait for it, which no fork copies.
  const pid_t forked = ::fork();
  if (forked == 0) {
    ::prctl(PR_SET_PDEATHSIG, 0);
    wait_for_go(mine, 2);
    delete end;
    std::exit(0);
  }
  mine.grandchild = forked;
  mine.what.count = all;
  drive_in_thread(*end, mine);
  wait_for_go(mine, no_limit & 0xffff'ffff);
}

void use_up_descriptors() {
  ::rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = 128;
  ::setrlimit(RLIMIT_NOFILE, &limit);
  while (::open("/dev/null", O_RDONLY | O_CLOEXEC) >= 0) {
  }
}

void child_sends_without_descriptors(ledger& mine) {
  auto end = open_when_free<strait::sender<small_message>>(mine);
  // `generation` 1: before anything was done with the channel; 2: after a first message, so the peer is known.
  if (mine.what.generation == 2) end.blocking_send(make<small_message>(key_of(1, 0)));
  mine.opened = 1;
  use_up_descriptors();
  mine.started = 2;
  wait_for_go(mine, 2);
  std::error_code error;
  end.blocking_send(make<small_message>(key_of(1, mine.what.generation - 1)), error);
  if (error) mine.fail("send: " + error.message());
  mine.done = 1;
  wait_for_go(mine, 3);
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
    case part::echo:
      child_echoes(mine);
      return;
    case part::open_close:
      child_opens_and_closes(mine);
      return;
    case part::no_descriptors:
      child_sends_without_descriptors(mine);
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
    wait_for_go(mine, 1);
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

  /// kill -9. Returns when, in nanoseconds of the steady clock.
  std::int64_t kill_now() const {
    const std::int64_t now = strait::now_ns();
    send_signal(SIGKILL);
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

/// The channel as a bystander sees it.
class glass {
 public:
  explicit glass(const std::string& name) {
    const int file = ::open(("/dev/shm/" + name).c_str(), O_RDONLY | O_CLOEXEC);
    REQUIRE(file >= 0);
    void* mapped = ::mmap(nullptr, sizeof(strait::segment_header), PROT_READ, MAP_SHARED, file, 0);
    ::close(file);
    REQUIRE(mapped != MAP_FAILED);
    header_ = static_cast<strait::segment_header*>(mapped);
  }
  ~glass() { ::munmap(header_, sizeof(strait::segment_header)); }
  glass(const glass&) = delete;
  glass& operator=(const glass&) = delete;

  [[nodiscard]] strait::presence presence(strait::role who) const {
    return static_cast<strait::presence>(header_->ends[static_cast<std::size_t>(who)].presence.load());
  }
  [[nodiscard]] bool parked(strait::role who) const {
    const auto now = presence(who);
    return now == strait::presence::thread_parked || now == strait::presence::hub_parked;
  }
  [[nodiscard]] std::uint64_t in_lane() const { return header_->lane.tail.load() - header_->lane.head.load(); }
  [[nodiscard]] bool full() const { return in_lane() == header_->capacity; }

 private:
  strait::segment_header* header_;
};

std::string fresh_name() {
  static int count = 0;
  return "strait-death-" + std::to_string(::getpid()) + "-" + std::to_string(++count);
}

bool exists(const std::string& name) {
  return std::filesystem::exists("/dev/shm/" + name);
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
  // 27 states, four times: 108.
  for (int repeat = 0; repeat < 4 * rounds_factor; ++repeat) {
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

void check_answer(const ledger& survivor, std::int64_t killed_at) {
  CHECK(survivor.failure_text() == "");
  CHECK(survivor.deaths.load() == 1);
  CHECK(survivor.reported_at.load() - killed_at < answer_bound_ns);
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
  auto rx = strait::open_receiver<T>(name, {.capacity = r.capacity, .wait = r.policy});
  const glass seen{name};

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
  if (r.moment != moment::full) where.drive(r.form, rx, survivor);

  const std::uint64_t enough = 1 + chance_below(5000);
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

  const std::int64_t killed_at = victim.kill_now();
  if (replacement) replacement->book().go = 1;
  if (r.moment == moment::full) where.drive(r.form, rx, survivor);
  const bool answered = within(patience, [&] { return survivor.deaths != 0 || survivor.failed != 0; });
  CHECK(answered);
  check_answer(survivor, killed_at);
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
  CHECK_FALSE(exists(name));
}

template <class T>
void kill_a_receiver(const round& r, engine& where) {
  const std::string name = fresh_name();
  ledger survivor;
  survivor.what = order_for(name, strait::role::sender);
  survivor.what.after_death = r.replaced ? after_death : 0;
  auto tx = strait::open_sender<T>(name, {.capacity = r.capacity, .wait = r.policy});
  const glass seen{name};

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
  where.drive(r.form, tx, survivor);

  const std::uint64_t enough = 1 + chance_below(5000);
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

  const std::int64_t killed_at = victim.kill_now();
  if (replacement) replacement->book().go = 1;
  if (r.moment == moment::parked) {
    // Nobody waits for anything: the survivor learns of it when it uses its end again.
    survivor.what.count = no_limit;
    where.drive(r.form, tx, survivor);
  }
  const bool answered = within(patience, [&] { return survivor.deaths != 0 || survivor.failed != 0; });
  CHECK(answered);
  check_answer(survivor, killed_at);
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
  CHECK_FALSE(exists(name));
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
  std::printf("death: %zu %ss killed, %s: %.1f s\n", count, strait::to_string(who).data(),
              replaced ? "replaced" : "not replaced", static_cast<double>(strait::now_ns() - began) / 1e9);
  CHECK(count >= 100);
}

}  // namespace death

using namespace death;

TEST_CASE("a sender is killed and not replaced") {
  kill_many(strait::role::sender, false);
}
TEST_CASE("a sender is killed and replaced") {
  kill_many(strait::role::sender, true);
}
TEST_CASE("a receiver is killed and not replaced") {
  kill_many(strait::role::receiver, false);
}
TEST_CASE("a receiver is killed and replaced") {
  kill_many(strait::role::receiver, true);
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
