#pragma once
// This program once more, in another process.

#include <cerrno>
#include <csignal>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

namespace pipeline {

/// One that still runs is killed by the destructor, and is gone when that returns.
class process {
 public:
  process() = default;
  explicit process(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "pipeline");
    std::vector<char*> argv;
    for (auto& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    const int error = ::posix_spawn(&id_, "/proc/self/exe", nullptr, nullptr, argv.data(), environ);
    if (error != 0) throw std::system_error(error, std::system_category(), "cannot start a worker");
  }
  process(process&& other) noexcept : id_(std::exchange(other.id_, 0)) {}
  process& operator=(process&& other) noexcept {
    std::swap(id_, other.id_);
    return *this;
  }
  ~process() {
    if (id_ == 0) return;
    ::kill(id_, SIGKILL);
    try {
      (void)wait();
    } catch (const std::system_error&) {  // somebody else has waited for it
    }
  }

  pid_t id() const { return id_; }
  explicit operator bool() const { return id_ != 0; }

  /// How it ended, as a shell tells it (128 and the signal's number), if it did.
  std::optional<int> ended() { return wait(WNOHANG); }
  int wait() { return wait(0).value_or(0); }

 private:
  std::optional<int> wait(int options) {
    int status = 0;
    pid_t found = 0;
    do {
      found = ::waitpid(id_, &status, options);
    } while (found < 0 && errno == EINTR);
    if (found < 0) throw std::system_error(errno, std::system_category(), "waitpid");
    if (found == 0) return std::nullopt;
    id_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  pid_t id_ = 0;
};

}  // namespace pipeline
