#include <sys/ptrace.h>
#include <sys/wait.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <system_error>

#include <fmt/format.h>

#include "count.hpp"

namespace bench {
namespace {

long trace(enum __ptrace_request request, pid_t thread, std::uintptr_t address, std::uintptr_t data) {
  return ::ptrace(request, thread, address, data);
}

/// The process to which a thread belongs, 0 when it is gone.
pid_t process_of(pid_t thread) {
  std::ifstream status{fmt::format("/proc/{}/status", thread)};
  std::string key;
  while (status >> key) {
    pid_t process = 0;
    if (key == "Tgid:" && status >> process) return process;
    std::getline(status, key);
  }
  return 0;
}

}  // namespace

void syscall_counter::follow(pid_t process) {
  const auto options = static_cast<std::uintptr_t>(PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE);
  for (const auto& entry : std::filesystem::directory_iterator{fmt::format("/proc/{}/task", process)}) {
    const auto thread = static_cast<pid_t>(std::atoi(entry.path().filename().c_str()));
    if (owner_.contains(thread)) continue;
    if (trace(PTRACE_SEIZE, thread, 0, options) != 0) {
      throw std::system_error{errno, std::system_category(), fmt::format("cannot trace thread {}", thread)};
    }
    owner_[thread] = process;
    // The stop that this brings about is answered with PTRACE_SYSCALL, and from then on each call stops.
    trace(PTRACE_INTERRUPT, thread, 0, 0);
  }
}

pid_t syscall_counter::stopped(pid_t thread, int status) {
  if (WSTOPSIG(status) != (SIGTRAP | 0x80)) return 0;
  // The same stop tells entry and exit; only the kernel knows which it is (PTRACE_GET_SYSCALL_INFO, Linux 5.3).
  __ptrace_syscall_info info{};
  if (trace(PTRACE_GET_SYSCALL_INFO, thread, sizeof info, reinterpret_cast<std::uintptr_t>(&info)) <= 0) return 0;
  return info.op == PTRACE_SYSCALL_INFO_ENTRY ? owner_[thread] : 0;
}

void syscall_counter::go_on(pid_t thread, int status) {
  if (!owner_.contains(thread)) {
    // A thread that a followed one has just started: it is followed from its first instruction.
    if (const pid_t process = process_of(thread)) owner_[thread] = process;
  }
  const int signal = WSTOPSIG(status);
  const int event = status >> 16;
  const bool deliver = event == 0 && signal != (SIGTRAP | 0x80);
  trace(PTRACE_SYSCALL, thread, 0, deliver ? static_cast<std::uintptr_t>(signal) : 0);
}

}  // namespace bench
