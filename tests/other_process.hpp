#pragma once
/// A second process: this test program again, started by exec in one test case that is otherwise skipped.
///
///     TEST_CASE("child: holds the sender" * doctest::skip()) {      // runs in the second process
///       if (!test::is_child()) return;                             // --no-skip, by hand
///       auto tx = strait::open_sender<int>(test::parent_says());
///       test::tell_parent("in");
///       test::parent_says();
///     }
///     test::other_process child{"child: holds the sender"};        // in the test
///     child.say(name);
///     REQUIRE(child.hears() == "in");
///
/// Whoever waits for the other waits for a word of it, never for some time to pass; after half a minute without one the
/// test fails.
#include <doctest/doctest.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace test {

inline constexpr int longest_wait_ms = 30'000;

inline void send_word(int socket, std::string_view word) {
  if (::send(socket, word.data(), word.size(), MSG_NOSIGNAL) != static_cast<::ssize_t>(word.size())) {
    throw std::system_error{errno, std::system_category(), "a word to the other process"};
  }
}

/// What the other process says next; empty when it ended.
inline std::string next_word(int socket) {
  ::pollfd wait{socket, POLLIN, 0};
  int ready = 0;
  do {
    ready = ::poll(&wait, 1, longest_wait_ms);
  } while (ready < 0 && errno == EINTR);
  if (ready == 0) throw std::runtime_error{"the other process says nothing"};
  std::array<char, 4096> word{};
  const ::ssize_t got = ::recv(socket, word.data(), word.size(), 0);
  return got > 0 ? std::string{word.data(), static_cast<std::size_t>(got)} : std::string{};
}

class other_process {
 public:
  explicit other_process(const std::string& test_case) {
    std::array<int, 2> ends{-1, -1};
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) != 0) {
      throw std::system_error{errno, std::system_category(), "socketpair"};
    }
    socket_ = ends[0];
    ::posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_adddup2(&actions, ends[1], child_socket);
    std::vector<std::string> arguments{"/proc/self/exe", "--no-skip", "--minimal", "--test-case=" + test_case};
    std::vector<char*> argv;
    for (auto& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    std::string mark = std::string{child_mark} + "=1";
    std::vector<char*> environment;
    for (char** entry = ::environ; *entry != nullptr; ++entry) environment.push_back(*entry);
    environment.push_back(mark.data());
    environment.push_back(nullptr);
    const int error = ::posix_spawn(&pid_, "/proc/self/exe", &actions, nullptr, argv.data(), environment.data());
    ::posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    if (error != 0) {
      ::close(socket_);
      throw std::system_error{error, std::system_category(), "posix_spawn of this program"};
    }
  }
  other_process(other_process&& other) noexcept
      : pid_{std::exchange(other.pid_, -1)}, socket_{std::exchange(other.socket_, -1)} {}
  other_process& operator=(other_process&&) = delete;
  ~other_process() {
    if (pid_ > 0) kill();
    if (socket_ >= 0) ::close(socket_);
  }

  [[nodiscard]] ::pid_t pid() const noexcept { return pid_; }
  void say(std::string_view word) const { send_word(socket_, word); }
  [[nodiscard]] std::string hears() const { return next_word(socket_); }

  /// Waits until it has ended, and leaves it as it is: a zombie, whose id is taken and which signals still find.
  [[nodiscard]] bool has_ended() const {
    ::siginfo_t ended{};
    while (::waitid(P_PID, static_cast<::id_t>(pid_), &ended, WEXITED | WNOWAIT) != 0) {
      if (errno != EINTR) return false;
    }
    return ended.si_pid == pid_;
  }
  /// Waits for its end. 0: everything that it checked held.
  [[nodiscard]] int finish() {
    if (!next_word(socket_).empty()) throw std::runtime_error{"the other process said more than was asked"};
    return reap();
  }
  /// Ends it as a crash would, and waits until the kernel has done so.
  void kill() {
    ::kill(pid_, SIGKILL);
    (void)reap();
  }

  static constexpr int child_socket = 3;
  static constexpr const char* child_mark = "STRAIT_TEST_CHILD";

 private:
  int reap() {
    int status = 0;
    while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  ::pid_t pid_ = -1;
  int socket_ = -1;
};

// For the second process.

[[nodiscard]] inline bool is_child() {
  if (std::getenv(other_process::child_mark) == nullptr) return false;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // a test that was interrupted leaves nobody behind
  return true;
}
inline std::string parent_says() {
  return next_word(other_process::child_socket);
}
inline void tell_parent(std::string_view word) {
  send_word(other_process::child_socket, word);
}

}  // namespace test
