#pragma once
// Files, with exceptions for errors.

#include <cerrno>
#include <cstddef>
#include <string>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <unistd.h>

namespace pipeline {

class file {
 public:
  file(std::string path, int flags)
      : path_(std::move(path)), descriptor_(::open(path_.c_str(), flags | O_CLOEXEC, 0666)) {
    if (descriptor_ < 0) fail();
  }
  file(const file&) = delete;
  file& operator=(const file&) = delete;
  ~file() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  /// Less than `size` only at the end of the file.
  std::size_t read(unsigned char* into, std::size_t size) {
    std::size_t done = 0;
    while (done < size) {
      const auto some = ::read(descriptor_, into + done, size - done);
      if (some == 0) break;
      if (some < 0 && errno != EINTR) fail();
      if (some > 0) done += static_cast<std::size_t>(some);
    }
    return done;
  }

  void write(const unsigned char* from, std::size_t size) {
    while (size > 0) {
      const auto some = ::write(descriptor_, from, size);
      if (some < 0 && errno != EINTR) fail();
      if (some > 0) {
        from += some;
        size -= static_cast<std::size_t>(some);
      }
    }
  }

  /// Some file systems tell only here that there was no room.
  void close() {
    if (::close(std::exchange(descriptor_, -1)) != 0) fail();
  }

 private:
  [[noreturn]] void fail() const { throw std::system_error(errno, std::system_category(), path_); }

  std::string path_;
  int descriptor_ = -1;
};

}  // namespace pipeline
