#pragma once
/// Peers at a Unix socket that are not ours: they know how the two sides talk, and keep to it as far as the test likes.
#include <dirent.h>
#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

import strait;

namespace test {

/// A directory that is removed with what is left in it.
class own_directory {
 public:
  own_directory() {
    std::string pattern = "/tmp/strait-door-XXXXXX";
    if (::mkdtemp(pattern.data()) == nullptr) throw std::system_error{errno, std::system_category(), "mkdtemp"};
    path_ = pattern;
  }
  own_directory(const own_directory&) = delete;
  own_directory& operator=(const own_directory&) = delete;
  ~own_directory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  [[nodiscard]] std::string path(const std::string& name) const { return path_ + "/" + name; }
  [[nodiscard]] bool empty() const { return std::filesystem::is_empty(path_); }
  [[nodiscard]] const std::string& text() const { return path_; }

 private:
  std::string path_;
};

inline std::size_t open_descriptors() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& one : std::filesystem::directory_iterator{"/proc/self/fd"}) ++count;
  return count;
}

/// While it lives, this process can open nothing.
class no_descriptors_left {
 public:
  no_descriptors_left() {
    ::getrlimit(RLIMIT_NOFILE, &before_);
    const int next = ::dup(0);
    ::close(next);
    rlimit none = before_;
    none.rlim_cur = static_cast<::rlim_t>(next);
    ::setrlimit(RLIMIT_NOFILE, &none);
  }
  no_descriptors_left(const no_descriptors_left&) = delete;
  no_descriptors_left& operator=(const no_descriptors_left&) = delete;
  ~no_descriptors_left() { give_back(); }
  void give_back() const { ::setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_{};
};

inline ::sockaddr_un address_of(const std::string& path) {
  ::sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return address;
}

/// A socket without manners.
class raw_socket {
 public:
  explicit raw_socket(int descriptor) : descriptor_{descriptor} { REQUIRE(descriptor >= 0); }
  raw_socket(raw_socket&& other) noexcept : descriptor_{std::exchange(other.descriptor_, -1)} {}
  raw_socket& operator=(raw_socket&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~raw_socket() { close(); }
  [[nodiscard]] static raw_socket made() { return raw_socket{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)}; }
  [[nodiscard]] static raw_socket connected(const std::string& path) {
    raw_socket one = made();
    REQUIRE(one.connect(path));
    return one;
  }

  [[nodiscard]] bool connect(const std::string& path) const {
    const ::sockaddr_un to = address_of(path);
    return ::connect(descriptor_, reinterpret_cast<const ::sockaddr*>(&to), sizeof to) == 0;
  }
  [[nodiscard]] int get() const { return descriptor_; }
  void close() {
    if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
  }
  void shut_down_writing() const { ::shutdown(descriptor_, SHUT_WR); }

  void say(const std::vector<std::byte>& bytes, const std::vector<int>& descriptors = {}) const {
    ::iovec part{const_cast<std::byte*>(bytes.data()), bytes.size()};
    std::vector<std::byte> control(CMSG_SPACE(descriptors.size() * sizeof(int)));
    ::msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (!descriptors.empty()) {
      message.msg_control = control.data();
      message.msg_controllen = control.size();
      ::cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
      std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size() * sizeof(int));
    }
    (void)::sendmsg(descriptor_, &message, MSG_NOSIGNAL);
  }
  /// False: there is no room for it.
  [[nodiscard]] bool try_say_byte() const {
    const char byte = 0;
    return ::send(descriptor_, &byte, 1, MSG_NOSIGNAL | MSG_DONTWAIT) == 1;
  }
  /// The next message, cut to that length; empty at the end. Waits for half a minute at most.
  [[nodiscard]] std::vector<std::byte> hears(std::size_t longest, std::vector<int>* descriptors = nullptr) const {
    ::pollfd wait{descriptor_, POLLIN, 0};
    REQUIRE(::poll(&wait, 1, 30'000) == 1);
    std::vector<std::byte> bytes(longest);
    ::iovec part{bytes.data(), bytes.size()};
    std::array<std::byte, 256> control{};
    ::msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ::ssize_t got = ::recvmsg(descriptor_, &message, MSG_CMSG_CLOEXEC);
    bytes.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
    for (::cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
      const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (std::size_t i = 0; i < count; ++i) {
        int one = -1;
        std::memcpy(&one, CMSG_DATA(header) + i * sizeof(int), sizeof one);
        if (descriptors != nullptr) {
          descriptors->push_back(one);
        } else {
          ::close(one);
        }
      }
    }
    return bytes;
  }
  /// Whether the other side hangs up, within half a minute.
  [[nodiscard]] bool hung_up() const {
    for (int i = 0; i < 16; ++i) {
      if (hears(4096).empty()) return true;
    }
    return false;
  }

 private:
  int descriptor_;
};

/// Listens, and leaves its socket behind.
class raw_listener {
 public:
  explicit raw_listener(const std::string& path, int type = SOCK_SEQPACKET)
      : socket_{::socket(AF_UNIX, type | SOCK_CLOEXEC, 0)} {
    const ::sockaddr_un here = address_of(path);
    ::unlink(path.c_str());
    REQUIRE(::bind(socket_.get(), reinterpret_cast<const ::sockaddr*>(&here), sizeof here) == 0);
    REQUIRE(::listen(socket_.get(), 8) == 0);
  }
  [[nodiscard]] raw_socket accept() const {
    return raw_socket{::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC)};
  }
  [[nodiscard]] int get() const { return socket_.get(); }

 private:
  raw_socket socket_;
};

template <class T>
void put(std::vector<std::byte>& bytes, std::size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

/// As runtime/door.cpp lays it out.
inline std::vector<std::byte> bytes_of_welcome() {
  std::vector<std::byte> bytes(512);
  put(bytes, 0, std::uint64_t{0x5354'5241'4954'0d00});
  return bytes;
}

/// A client of which each step is the test's to take.
class raw_client {
 public:
  explicit raw_client(const std::string& path) : socket{raw_socket::connected(path)} {}
  raw_client(const raw_client&) = delete;
  raw_client& operator=(const raw_client&) = delete;
  ~raw_client() {
    leave();
    for (std::size_t lane = 0; lane < 2; ++lane) {
      if (memory_[lane] != nullptr) ::munmap(memory_[lane], sizes_[lane]);
    }
  }

  template <class ToListener, class ToClient>
  void greet(std::uint32_t protocol = 1) const {
    std::vector<std::byte> hello(184);
    put(hello, 0, std::uint64_t{0x5354'5241'4954'0c00});
    put(hello, 8, protocol);
    put(hello, 12, strait::segment_header::expected_layout);
    put(hello, 16, std::uint32_t{1});
    const auto type = [&](std::size_t at, const strait::message_shape& shape) {
      std::memcpy(hello.data() + at, shape.name.data(), shape.name.size());
      put(hello, at + 64, shape.version);
      put(hello, at + 68, shape.bytes);
      put(hello, at + 72, shape.alignment);
    };
    type(24, strait::shape_of<ToListener>);
    type(104, strait::shape_of<ToClient>);
    socket.say(hello);
  }

  /// How many descriptors came.
  std::size_t take_welcome() {
    const auto bytes = socket.hears(512, &handed_);
    if (bytes.size() == 512) reason = reinterpret_cast<const char*>(bytes.data() + 16);
    for (std::size_t lane = 0; lane < 2 && handed_.size() == 3; ++lane) {
      struct ::stat file{};
      ::fstat(handed_[lane], &file);
      sizes_[lane] = static_cast<std::size_t>(file.st_size);
      memory_[lane] = ::mmap(nullptr, sizes_[lane], PROT_READ | PROT_WRITE, MAP_SHARED, handed_[lane], 0);
      REQUIRE(memory_[lane] != MAP_FAILED);
    }
    return handed_.size();
  }

  /// Says that it is in, and looks so.
  void enter() {
    header(0).ends[0].presence = static_cast<std::uint32_t>(strait::presence::awake);
    header(1).ends[1].presence = static_cast<std::uint32_t>(strait::presence::awake);
    std::vector<std::byte> entered(8);
    put(entered, 0, std::uint64_t{0x5354'5241'4954'0e00});
    socket.say(entered);
  }

  /// As an honest peer does; others die at the end of their lines.
  void hold_locks() {
    for (std::size_t lane = 0; lane < 2; ++lane) {
      const std::string link = "/proc/self/fd/" + std::to_string(handed_[lane]);
      locks_[lane] = ::open(link.c_str(), O_RDWR | O_CLOEXEC);
      struct ::flock lock{};
      lock.l_type = F_WRLCK;
      lock.l_whence = SEEK_SET;
      lock.l_start = lane == 0 ? 1 : 2;
      lock.l_len = 1;
      REQUIRE(::fcntl(locks_[lane], F_OFD_SETLK, &lock) == 0);
    }
  }
  /// All of that, as an honest peer.
  template <class ToListener, class ToClient>
  void come_in() {
    greet<ToListener, ToClient>();
    REQUIRE(take_welcome() == 3);
    hold_locks();
    enter();
  }
  void drop_locks() {
    for (int& lock : locks_) {
      if (lock >= 0) ::close(std::exchange(lock, -1));
    }
  }
  void hang_up() {
    socket.close();
    if (handed_.size() == 3) ::close(std::exchange(handed_[2], -1));
  }
  /// Everything but the mappings.
  void leave() {
    hang_up();
    drop_locks();
    for (std::size_t i = 0; i < handed_.size(); ++i) {
      if (handed_[i] >= 0) ::close(std::exchange(handed_[i], -1));
    }
  }

  /// Lane 0 is the one to the listener.
  [[nodiscard]] strait::segment_header& header(std::size_t lane) const {
    return *static_cast<strait::segment_header*>(memory_[lane]);
  }
  template <class T>
  void publish(const T& message) const {
    strait::segment_header& there = header(0);
    const std::uint64_t tail = there.lane.tail;
    std::memcpy(static_cast<std::byte*>(memory_[0]) + there.slots_offset + (tail & (there.capacity - 1)) * sizeof(T),
                &message, sizeof message);
    std::uint64_t word = 0;
    std::memcpy(&word, &message, sizeof word);
    there.lane.copies[tail & 1][0] = word;
    there.lane.tail = tail + 1;
  }

  raw_socket socket;
  std::string reason;

 private:
  std::vector<int> handed_;
  std::array<int, 2> locks_{-1, -1};
  std::array<void*, 2> memory_{};
  std::array<std::size_t, 2> sizes_{};
};

}  // namespace test
