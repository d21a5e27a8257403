#include "child.hpp"

#include <array>
#include <cerrno>
#include <filesystem>
#include <system_error>

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

namespace kv {
namespace {

void check(int error, const std::string& what) {
  if (error != 0) throw std::system_error(error, std::system_category(), what);
}

}  // namespace

child::child(const std::vector<std::string>& arguments) {
  std::array<int, 2> pipe_ends;
  if (::pipe2(pipe_ends.data(), O_CLOEXEC) != 0) check(errno, "pipe2");

  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], STDOUT_FILENO);
  // Asio's sockets are inherited otherwise, and a port stays taken as long as anybody has it.
  ::posix_spawn_file_actions_addclosefrom_np(&actions, STDERR_FILENO + 1);

  std::vector<char*> argv;
  for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const int error = ::posix_spawnp(&id_, argv[0], &actions, nullptr, argv.data(), environ);

  ::posix_spawn_file_actions_destroy(&actions);
  ::close(pipe_ends[1]);
  if (error != 0) ::close(pipe_ends[0]);
  check(error, "cannot start " + arguments[0]);
  output_ = pipe_ends[0];
}

child::~child() {
  if (id_ > 0) {
    signal(SIGKILL);
    wait();
  }
  ::close(output_);
}

void child::signal(int number) const {
  ::kill(id_, number);
}

int child::wait() {
  int status = 0;
  while (::waitpid(id_, &status, 0) < 0) {
    if (errno != EINTR) check(errno, "waitpid");
  }
  id_ = -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

std::string this_program() {
  return std::filesystem::read_symlink("/proc/self/exe");
}

}  // namespace kv
