// What the three byte streams (Unix socket, pipe, TCP) have in common: read, write and a buffer.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "../subject.hpp"

namespace bench {

/// As many bytes as one read or write of a stream or of a batch asks for: what the field takes for a good size.
inline constexpr std::size_t stream_bytes = 65536;

inline void write_all(int fd, const void* data, std::size_t bytes) {
  const auto* at = static_cast<const std::byte*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(fd, at, bytes);
    if (written < 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      throw std::system_error{errno, std::system_category(), "cannot write to the other end"};
    }
    at += written;
    bytes -= static_cast<std::size_t>(written);
  }
}

/// Reads at least one byte. On a descriptor that does not block it asks again and again: that is what spinning is here.
inline std::size_t read_some(int fd, void* data, std::size_t bytes, bool one_cpu) {
  for (;;) {
    const ssize_t got = ::read(fd, data, bytes);
    if (got > 0) return static_cast<std::size_t>(got);
    if (got == 0) throw std::runtime_error{"expected a message, found that the other end has hung up"};
    if (errno == EAGAIN) {
      if (one_cpu) relax(true);
      continue;
    }
    if (errno != EINTR) throw std::system_error{errno, std::system_category(), "cannot read from the other end"};
  }
}

template <class M>
M read_one(int fd, bool one_cpu) {
  M message;
  std::size_t got = 0;
  while (got < sizeof message) {
    got += read_some(fd, reinterpret_cast<std::byte*>(&message) + got, sizeof message - got, one_cpu);
  }
  return message;
}

/// Messages out of a stream, as few reads as there can be: what a good program does, however they were written.
template <class M>
class buffered_reader {
 public:
  buffered_reader(int fd, bool one_cpu) : fd_{fd}, one_cpu_{one_cpu}, buffer_(stream_bytes) {}

  M next() {
    while (filled_ - taken_ < sizeof(M)) {
      // A message may come in two reads; its first half moves to the front.
      std::memmove(buffer_.data(), buffer_.data() + taken_, filled_ - taken_);
      filled_ -= taken_;
      taken_ = 0;
      filled_ += read_some(fd_, buffer_.data() + filled_, buffer_.size() - filled_, one_cpu_);
    }
    M message;
    std::memcpy(&message, buffer_.data() + taken_, sizeof message);
    taken_ += sizeof message;
    return message;
  }

 private:
  int fd_;
  bool one_cpu_;
  std::vector<std::byte> buffer_;
  std::size_t taken_ = 0;
  std::size_t filled_ = 0;
};

/// Messages into a stream, 64 KiB a write.
template <class M>
class buffered_writer {
 public:
  explicit buffered_writer(int fd) : fd_{fd} { buffer_.reserve(stream_bytes / sizeof(M)); }

  void add(const M& message) {
    buffer_.push_back(message);
    if (buffer_.size() == stream_bytes / sizeof(M)) flush();
  }
  void flush() {
    write_all(fd_, buffer_.data(), buffer_.size() * sizeof(M));
    buffer_.clear();
  }

 private:
  int fd_;
  std::vector<M> buffer_;
};

/// Runs an end over a descriptor to read and one to write; they may be the same.
template <class M>
void run_bytes(end& self, int in, int out) {
  const bool one_cpu = self.one_cpu();
  const auto send = [out](const M& message) { write_all(out, &message, sizeof message); };
  const auto receive = [in, one_cpu] { return read_one<M>(in, one_cpu); };
  switch (self.kind()) {
    case work::spin:
      checked(::fcntl(in, F_SETFL, checked(::fcntl(in, F_GETFL), "cannot ask for flags") | O_NONBLOCK),
              "cannot make a descriptor not block");
      [[fallthrough]];
    case work::parked:
      self.producing() ? ping<M>(self, send, receive) : pong<M>(self, send, receive);
      return;
    case work::batch:
      if (self.producing()) {
        source<M> source;
        buffered_writer<M> writer{out};
        while (const auto round = self.next_round()) {
          source.spoil(self.fault());
          self.begin();
          for (std::uint64_t i = 0; i < round.messages; ++i) writer.add(source.next());
          writer.flush();
          self.done();
        }
        return;
      }
      break;
    default:
      if (self.producing()) return produce<M>(self, send);
      break;
  }
  buffered_reader<M> reader{in, one_cpu};
  consume<M>(self, [&reader] { return reader.next(); });
}

/// For a subject whose end has one descriptor for both directions.
inline void run_socket(end& self) {
  with_message(self.message_bytes(), [&self]<class M>() { run_bytes<M>(self, self.fd(0), self.fd(0)); });
}

}  // namespace bench
