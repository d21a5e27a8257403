// Counting from outside: neither counter is part of what is counted.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>

namespace bench {

/// Allocations of this process so far, by the interposed malloc of `count/interpose.cpp`; 0 when it is not loaded.
[[nodiscard]] std::uint64_t allocations_so_far() noexcept;
/// Throws unless the interposed malloc is loaded in this process and sees malloc, operator new and, where mimalloc is
/// linked, the calls by which coroutine frames and message storage are allocated. A counter that sees nothing counts 0.
void check_allocation_counter();
/// Bytes that mimalloc, by its own statistics, holds from the kernel; 0 without mimalloc.
[[nodiscard]] std::uint64_t mimalloc_committed() noexcept;

/// System calls of other processes, as the kernel reports them: each thread is traced (ptrace) and stops when it
/// enters a system call. A thread that makes none runs at full speed.
///
/// Tracepoints would disturb less, but need tracefs and perf_event_paranoid; tracing one's own children is allowed
/// nearly everywhere.
class syscall_counter {
 public:
  /// Begins to follow all threads of `process`, which is a child and sleeps. Throws `std::system_error` when the kernel
  /// refuses.
  void follow(pid_t process);
  /// A followed thread stopped with this wait status. Returns the process that enters a system call by this stop, or 0.
  /// The thread goes on by `go_on` only.
  pid_t stopped(pid_t thread, int status);
  void go_on(pid_t thread, int status);
  /// The thread is gone.
  void forget(pid_t thread) { owner_.erase(thread); }

 private:
  std::map<pid_t, pid_t> owner_;
};

}  // namespace bench
