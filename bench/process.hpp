// The two processes of a measurement and the one that conducts them.
//
// The conductor (`strait-demo` as the user started it) starts itself again twice for each subject of a case, as
// producer and consumer (`conductor.hpp`). All three share one `control` block: a memfd that the two inherit. Nothing
// of this has a name in the file system, so none of it is left behind whatever ends the conductor.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "measure.hpp"
#include "message.hpp"

namespace bench {

/// An open descriptor, closed with its owner.
class descriptor {
 public:
  descriptor() = default;
  explicit descriptor(int fd) noexcept : fd_{fd} {}
  descriptor(descriptor&& other) noexcept : fd_{std::exchange(other.fd_, -1)} {}
  descriptor& operator=(descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~descriptor();

  [[nodiscard]] int get() const noexcept { return fd_; }
  /// A second descriptor of the same description.
  [[nodiscard]] descriptor duplicate() const;

 private:
  int fd_ = -1;
};

/// Throws `std::system_error` with errno and what was attempted when `result` is negative.
int checked(int result, const char* attempt);

/// An anonymous shared memory file of `bytes` bytes, all of them really there.
[[nodiscard]] descriptor make_memory(const char* label, std::size_t bytes);

/// A mapping of such a file in this process, prefaulted.
class mapping {
 public:
  mapping(int fd, std::size_t bytes);
  mapping(mapping&& other) noexcept
      : address_{std::exchange(other.address_, nullptr)}, bytes_{std::exchange(other.bytes_, 0)} {}
  mapping& operator=(mapping&&) = delete;
  ~mapping();

  template <class T>
  [[nodiscard]] T& as() const noexcept {
    return *static_cast<T*>(address_);
  }

 private:
  void* address_;
  std::size_t bytes_;
};

/// What a case asks of its subjects.
enum class work : std::uint32_t {
  stream,       // messages one by one, as fast as they go
  batch,        // the same in the largest pieces that the subject handles well
  spin,         // round trips; both ends poll
  parked,       // round trips after a pause; both ends sleep
  asio_ready,   // what awaiting something that is there already costs in an Asio coroutine
  task_ready,   // the same in a task, sends and receives
  task_switch,  // two coroutines or handlers of one thread take turns
  task_spawn,   // one of them starts others, each with a message
  timer,        // how late a timer is in a context that also takes messages as fast as another thread sends them
  socket        // round trips through a pair of sockets in such a context
};

/// Whether one process, the producer's, does all of it.
[[nodiscard]] constexpr bool alone(work kind) noexcept {
  return kind >= work::asio_ready;
}
/// Whether that process has a second thread, on the other CPU.
[[nodiscard]] constexpr bool beside_load(work kind) noexcept {
  return kind == work::timer || kind == work::socket;
}

/// What is counted while it is done.
enum class tally : std::uint32_t { nothing, syscalls, allocations };

enum class role : std::uint32_t { producer, consumer };

/// Where strait's channels lie: between the two processes, or in one that has both ends as threads.
enum class memory : std::uint32_t { posix, system_v, file, private_memory, handed_over };
/// What they are called on the command line.
inline constexpr std::array<std::string_view, 5> memory_names{"posix", "sysv", "file", "private", "unix"};

inline constexpr std::size_t cache_pair = 128;  // as strait's padding: x86 fetches lines in pairs
inline constexpr std::size_t sample_limit = std::size_t{1} << 17;

/// Messages in a ring or a channel, the same for strait and for the rings. 1 KiB messages fill a megabyte either way.
[[nodiscard]] constexpr std::size_t capacity_for(std::size_t message_bytes) noexcept {
  return message_bytes <= 64 ? 4096 : 1024;
}
/// Messages in a batch, for all that have batches.
inline constexpr std::size_t batch_messages = 1024;

/// What one end writes and the conductor reads.
struct alignas(cache_pair) end_report {
  /// The end is set up and waits for its first round.
  std::atomic<std::uint32_t> ready{0};
  /// The last round that it finished.
  std::atomic<std::uint32_t> finished{0};
  /// 1 while the counters count: between `begin` and `done`.
  alignas(cache_pair) std::atomic<std::uint32_t> counting{0};
  /// The last round for which it stands at the start: where the two ends meet.
  alignas(cache_pair) std::atomic<std::uint32_t> arrived{0};
  alignas(cache_pair) std::uint64_t begin_ns = 0;
  std::uint64_t end_ns = 0;
  std::uint64_t allocations = 0;
  std::uint64_t mimalloc_growth = 0;
  /// Messages that were taken beside what was measured.
  std::uint64_t load = 0;
  std::uint32_t samples = 0;
  std::uint64_t error_ns = 0;
  char error[1024] = {};
};

struct control {
  static constexpr std::uint64_t magic_value = 0x74'72'69'61'74'73'21'31;
  std::uint64_t magic = magic_value;

  // Written once, before the ends start.
  work kind = work::stream;
  tally counted = tally::nothing;
  std::uint32_t message_bytes = 8;
  std::uint32_t variant = 0;
  std::uint32_t cpus[2] = {0, 0};
  char subject[32] = {};
  std::uint64_t nonce = 0;  // makes names of this run's own
  bool tsc = false;
  double ns_per_tick = 1;
  plant fault = plant::none;
  bench::memory memory = bench::memory::posix;
  std::int32_t conductor = 0;

  // Written before each round; `round` is its number and the futex that the ends sleep on.
  alignas(cache_pair) std::atomic<std::uint32_t> round{0};
  std::uint32_t over = 0;
  std::uint64_t warm_up = 0;
  std::uint64_t messages = 0;
  std::uint64_t stamped = 0;

  end_report ends[2];
  std::uint64_t samples[sample_limit];  // ticks, by the end that sends the pings
};

/// What the descriptors of an end are numbered from.
inline constexpr int control_descriptor = 3;
inline constexpr int bell_descriptor = 4;
inline constexpr int first_descriptor = 5;

/// One end, as its own process sees it. Its loops all have this shape:
///
///     while (const auto round = self.next_round()) {
///       pass(round.warm_up);
///       self.begin();
///       pass(round.messages);
///       self.done();
///     }
class end {
 public:
  struct round {
    /// Messages before `begin`.
    std::uint64_t warm_up = 0;
    /// Messages, or round trips, between `begin` and `done`.
    std::uint64_t messages = 0;
    /// Round trips after `done`, each with its own time.
    std::uint64_t stamped = 0;
    explicit operator bool() const noexcept { return warm_up + messages + stamped > 0; }
  };

  end(control& shared, role which) noexcept;

  [[nodiscard]] role which() const noexcept { return role_; }
  [[nodiscard]] bool producing() const noexcept { return role_ == role::producer; }
  [[nodiscard]] work kind() const noexcept { return shared_.kind; }
  [[nodiscard]] std::size_t message_bytes() const noexcept { return shared_.message_bytes; }
  [[nodiscard]] unsigned variant() const noexcept { return shared_.variant; }
  [[nodiscard]] unsigned cpu() const noexcept { return shared_.cpus[static_cast<unsigned>(role_)]; }
  [[nodiscard]] unsigned other_cpu() const noexcept { return shared_.cpus[producing() ? 1 : 0]; }
  [[nodiscard]] bool one_cpu() const noexcept { return shared_.cpus[0] == shared_.cpus[1]; }
  [[nodiscard]] std::uint64_t nonce() const noexcept { return shared_.nonce; }
  [[nodiscard]] bench::memory memory() const noexcept { return shared_.memory; }
  /// The other end, for a subject that has both in one process.
  [[nodiscard]] end other() const noexcept { return end{shared_, producing() ? role::consumer : role::producer}; }
  /// The subject's n-th descriptor for this end.
  [[nodiscard]] int fd(int n) const noexcept { return first_descriptor + n; }

  /// Reports the last round, sleeps until the next one and meets the other end there, spinning, so that both are awake
  /// and on their CPUs when it returns. False when there is no other.
  [[nodiscard]] round next_round();
  /// What is measured begins here.
  void begin() noexcept;
  /// And ends here. Makes no system call.
  void done() noexcept;
  /// Instead of the two, for work that is timed piece by piece.
  void report_time(std::uint64_t ns) noexcept;

  /// What this end is asked to spoil, once, at the beginning of a round.
  [[nodiscard]] plant fault() noexcept { return std::exchange(fault_, plant::none); }

  [[nodiscard]] std::uint64_t ticks() const noexcept { return clock_.now(); }
  void sample(std::uint64_t ticks_taken) noexcept {
    shared_.samples[report_.samples++ & (sample_limit - 1)] = ticks_taken;
  }
  void sample(std::chrono::nanoseconds taken) noexcept {
    sample(static_cast<std::uint64_t>(static_cast<double>(taken.count()) / clock_.ns_per_tick()));
  }
  /// How many messages were taken beside what was measured.
  void report_load(std::uint64_t messages) noexcept { report_.load = messages; }
  /// Leaves the other end time to fall asleep before it is pinged.
  void pause_before_ping() const noexcept;

  /// Leaves the message for the conductor to print.
  void complain(std::string_view what) noexcept;

 private:
  void finish_last() noexcept;

  control& shared_;
  end_report& report_;
  role role_;
  std::uint32_t number_ = 0;
  tick_clock clock_;
  plant fault_ = plant::none;
};

/// A moment for the other end: one PAUSE, or the CPU itself where there is only one.
void relax(bool one_cpu) noexcept;

}  // namespace bench
