#pragma once
// Another program, started by this one.

#include <string>
#include <vector>

#include <sys/types.h>

namespace kv {

/// A running program whose standard output we read. One that is still running is killed by the destructor.
class child {
 public:
  /// Starts `arguments[0]`, found as a shell would. It inherits standard input and error, and no other descriptor.
  /// Throws std::system_error when it cannot be started.
  explicit child(const std::vector<std::string>& arguments);
  child(const child&) = delete;
  child& operator=(const child&) = delete;
  ~child();

  pid_t id() const { return id_; }

  /// The reading end of its standard output; the child object owns it.
  int output() const { return output_; }

  void signal(int number) const;

  /// Waits for its end and tells how it ended, as a shell does: the exit status, or 128 and the signal's number.
  int wait();

 private:
  pid_t id_ = -1;
  int output_ = -1;
};

/// The path of this very program, to start it again in another role.
std::string this_program();

}  // namespace kv
