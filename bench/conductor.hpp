// The process that the user started: starts the ends, gives them rounds, sees that they live, collects what they found.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "count/count.hpp"
#include "measure.hpp"
#include "placement.hpp"
#include "process.hpp"
#include "subject.hpp"

namespace bench {

/// The user pressed Ctrl-C, or somebody asked us to end.
struct interrupted : std::runtime_error {
  explicit interrupted(int which) : std::runtime_error{"interrupted"}, signal{which} {}
  int signal;
};

class conductor;

/// The two processes of one subject in one case. Destroying it kills what is left of them.
class pair {
 public:
  pair(conductor& by, const subject& what, unsigned variant, const job& task, plant fault, std::string label);
  ~pair();
  pair(const pair&) = delete;
  pair& operator=(const pair&) = delete;

  /// From now on the ends' system calls are counted. Returns why not, where the kernel refuses.
  [[nodiscard]] std::string count_syscalls();
  /// Runs one round and returns when both ends have finished it.
  void play(const end::round& round);
  /// Says that there are no more rounds and waits until both have ended well.
  void finish();

  /// Whether both ends are threads of the producer's process.
  [[nodiscard]] bool in_one_process() const noexcept { return in_one_process_; }
  /// Between the producer's begin and the consumer's done: a stream, or with one process its own work.
  [[nodiscard]] double stream_ns() const;
  /// Between begin and done of the end that pings.
  [[nodiscard]] double ping_ns() const;
  /// What the stamped round trips took, in ns.
  [[nodiscard]] std::vector<double> samples() const;
  [[nodiscard]] std::uint64_t allocations() const;
  /// Messages that were taken beside what was measured.
  [[nodiscard]] std::uint64_t load() const;
  [[nodiscard]] std::uint64_t mimalloc_growth() const;
  [[nodiscard]] std::uint64_t syscalls() const { return syscalls_; }

 private:
  friend class conductor;
  struct process {
    pid_t id = 0;
    bool alive = false;
    role which = role::producer;
  };

  void start(process& one, const std::vector<descriptor>& inherited);
  /// The ends that take part, and those that this process is.
  [[nodiscard]] std::span<const role> roles() const;
  [[nodiscard]] std::span<const role> roles_of(const process& one) const;
  [[nodiscard]] bool all_ready() const;
  [[nodiscard]] bool all_finished(std::uint32_t round) const;
  [[nodiscard]] bool all_ended() const;
  [[nodiscard]] std::string who(const process& one) const;
  [[nodiscard]] std::string waiting_for(std::uint32_t round) const;
  [[noreturn]] void report_death(const process& one, int status);
  void end_all() noexcept;
  void forget_names() noexcept;

  conductor& by_;
  const subject& what_;
  std::string label_;
  job task_;
  descriptor memory_;
  mapping map_;
  std::vector<process> processes_;
  bool in_one_process_ = false;
  bool ending_ = false;
  std::uint64_t syscalls_ = 0;
};

class conductor {
 public:
  explicit conductor(placement where);
  ~conductor();
  conductor(const conductor&) = delete;
  conductor& operator=(const conductor&) = delete;

  [[nodiscard]] const placement& where() const noexcept { return where_; }
  [[nodiscard]] const tick_clock& clock() const noexcept { return clock_; }
  /// The longest that a round may take before its ends count as hung.
  static constexpr std::chrono::seconds patience{30};

 private:
  friend class pair;

  /// Serves signals, deaths and traced threads until `there()`; `late` says what did not come.
  template <class There, class Late>
  void wait_until(There&& there, Late&& late);
  void serve_children();

  placement where_;
  tick_clock clock_;
  descriptor signals_;
  descriptor bell_;
  syscall_counter counter_;
  std::vector<pair*> pairs_;
};

/// What `main` does when it was started as an end.
int run_end(int argc, char** argv);

}  // namespace bench
