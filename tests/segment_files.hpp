#pragma once
/// Names in every memory for tests, what lies under them, and refusals.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <ostream>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include "memories.hpp"

namespace test {

/// The memories that have names, and may be entered and left under them by anybody at any time: what TEST_CASE_TEMPLATE
/// takes after the name of its parameter.
struct posix_memory {
  static constexpr std::string_view scheme = "posix:";
};
struct system_v_memory {
  static constexpr std::string_view scheme = "sysv:";
};
struct file_memory {
  static constexpr std::string_view scheme = "file:";
};
#define STRAIT_NAMED_MEMORIES test::posix_memory, test::system_v_memory, test::file_memory

/// The schemes of the same, for loops.
inline constexpr std::string_view named_memories[] = {posix_memory::scheme, system_v_memory::scheme,
                                                      file_memory::scheme};

/// Memory that is handed over at a socket. It has no name: `unix:` is followed by the socket's, and only who connects
/// there, once, is given an end. So whatever is about entering by a name does not apply to it (docs/design/unix.md).
inline constexpr std::string_view handed_over_scheme = "unix:";

/// The key of a System V channel: 32-bit FNV-1a of its name.
inline ::key_t key_of(std::string_view name) {
  std::uint32_t hash = 2166136261U;
  for (const char letter : name) hash = (hash ^ static_cast<unsigned char>(letter)) * 16777619U;
  return static_cast<::key_t>(hash);
}

/// The System V segment under a key; -1 when there is none.
inline int system_v_segment(::key_t key) {
  return ::shmget(key, 0, 0);
}

/// A System V segment in this process's address space, whole; its label is not among its bytes.
class attached_segment {
 public:
  explicit attached_segment(int identifier, int flags = 0) : data_{::shmat(identifier, nullptr, flags)} {
    ::shmid_ds kernels{};
    if (data_ == reinterpret_cast<void*>(-1) || ::shmctl(identifier, IPC_STAT, &kernels) != 0) {
      throw std::system_error{errno, std::system_category(), "a System V segment"};
    }
    whole_ = kernels.shm_segsz;
    mode_ = kernels.shm_perm.mode & 07777U;
  }
  attached_segment(const attached_segment&) = delete;
  attached_segment& operator=(const attached_segment&) = delete;
  ~attached_segment() { ::shmdt(data_); }
  [[nodiscard]] char* data() const { return static_cast<char*>(data_); }
  [[nodiscard]] std::size_t size() const { return (whole_ - label_bytes) / 8 * 8; }
  [[nodiscard]] ::mode_t mode() const { return mode_; }

  /// Ends each of our segments: a magic number, the device of the companion, the channel's name.
  static constexpr std::size_t label_bytes = 272;

 private:
  void* data_;
  std::size_t whole_ = 0;
  ::mode_t mode_ = 0;
};

/// A name that no other test run uses. Whatever a failed test leaves under it is taken away.
class channel_name {
 public:
  /// In the memory of this run, unless said otherwise.
  explicit channel_name(std::string_view what, std::string_view scheme = test::scheme()) : scheme_{scheme} {
    static int count = 0;
    directory_ = is_path() ? std::filesystem::temp_directory_path().string() + '/' : "/dev/shm/";
    if (is_system_v()) directory_ += ".strait-sysv-";
    name_ = "strait-test-" + std::to_string(::getpid()) + '-' + std::to_string(++count) + '-' + std::string{what};
  }
  channel_name(const channel_name&) = delete;
  channel_name& operator=(const channel_name&) = delete;
  ~channel_name() {
    if (::unlink(path().c_str()) != 0) ::rmdir(path().c_str());
    if (is_system_v()) ::shmctl(system_v_segment(key_of(name_)), IPC_RMID, nullptr);
  }

  /// The last part of the path; for `posix:` what stands after the scheme.
  [[nodiscard]] const std::string& bare() const noexcept { return name_; }
  /// What the user would write.
  [[nodiscard]] std::string text() const { return scheme_ + (is_path() ? path() : name_); }
  /// Of the file that carries the locks, or of the socket.
  [[nodiscard]] std::string path() const { return directory_ + name_; }
  [[nodiscard]] bool is_system_v() const { return scheme_ == system_v_memory::scheme; }
  /// Whether it is a socket's name, and the memory has none.
  [[nodiscard]] bool is_handed_over() const { return scheme_ == handed_over_scheme; }
  /// Whether the name is there when the last end has left.
  [[nodiscard]] bool outlives_its_ends() const { return scheme_ == file_memory::scheme; }
  /// Whether there is anything under the name.
  [[nodiscard]] bool exists() const {
    struct ::stat file{};
    return ::lstat(path().c_str(), &file) == 0 || (is_system_v() && system_v_segment(key_of(name_)) >= 0);
  }

 private:
  [[nodiscard]] bool is_path() const { return outlives_its_ends() || is_handed_over(); }

  std::string scheme_;
  std::string directory_;
  std::string name_;
};

/// A file as others see it: what it holds, and the marks that a writer would leave.
struct file_state {
  std::vector<char> bytes;
  ::ino_t inode = 0;
  ::mode_t mode = 0;
  std::chrono::nanoseconds modified{};
  friend bool operator==(const file_state&, const file_state&) = default;
};

inline file_state state_of(const std::string& path) {
  struct ::stat file{};
  if (::lstat(path.c_str(), &file) != 0) throw std::system_error{errno, std::system_category(), path};
  file_state state;
  if (S_ISREG(file.st_mode)) {
    std::ifstream stream{path, std::ios::binary};
    state.bytes.assign(std::istreambuf_iterator<char>{stream}, {});
  }
  state.inode = file.st_ino;
  state.mode = file.st_mode;
  state.modified = std::chrono::seconds{file.st_mtim.tv_sec} + std::chrono::nanoseconds{file.st_mtim.tv_nsec};
  return state;
}

/// The same of what is under a name; the bytes are the segment's.
inline file_state state_of(const channel_name& name) {
  file_state state = state_of(name.path());
  const int segment = name.is_system_v() ? system_v_segment(key_of(name.bare())) : -1;
  if (segment < 0) return state;
  const attached_segment seen{segment, SHM_RDONLY};
  state.bytes.assign(seen.data(), seen.data() + seen.size());
  state.inode = static_cast<::ino_t>(segment);
  state.mode = seen.mode();
  return state;
}

inline void write_file(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream stream{path, std::ios::binary | std::ios::trunc};
  stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!stream.flush()) throw std::runtime_error{"cannot write " + path};
}

/// Has these bytes be the segment under the name, as if a crash had left them.
inline void plant(const channel_name& name, const std::vector<char>& bytes) {
  if (!name.is_system_v()) return write_file(name.path(), bytes);
  ::shmctl(system_v_segment(key_of(name.bare())), IPC_RMID, nullptr);
  const std::size_t size = (bytes.size() + 7) / 8 * 8 + attached_segment::label_bytes;
  struct ::stat ours{};
  struct ::stat directory{};
  ::stat("/proc/self/ns/ipc", &ours);
  ::stat("/dev/shm", &directory);
  const std::array<std::uint64_t, 3> companion{0x5354'5241'4954'0b00, size, ours.st_ino};
  write_file(name.path(), {reinterpret_cast<const char*>(companion.data()),
                           reinterpret_cast<const char*>(companion.data() + companion.size())});
  const attached_segment made{::shmget(key_of(name.bare()), size, IPC_CREAT | IPC_EXCL | 0600)};
  std::copy(bytes.begin(), bytes.end(), made.data());
  const std::array<std::uint64_t, 2> label{0x5354'5241'4954'0c00, directory.st_dev};
  std::memcpy(made.data() + made.size(), label.data(), sizeof label);
  name.bare().copy(made.data() + made.size() + sizeof label, name.bare().size());
}

/// Writes a word into the segment under the name, whoever lives in it.
template <class Field>
void overwrite(const channel_name& name, std::size_t at, Field value) {
  if (name.is_system_v()) {
    std::memcpy(attached_segment{system_v_segment(key_of(name.bare()))}.data() + at, &value, sizeof value);
    return;
  }
  const int file = ::open(name.path().c_str(), O_WRONLY | O_CLOEXEC);
  const bool written = ::pwrite(file, &value, sizeof value, static_cast<::off_t>(at)) == sizeof value;
  ::close(file);
  if (!written) throw std::system_error{errno, std::system_category(), name.path()};
}

/// Fails unless `attempt` throws a std::system_error of that code whose text holds all the words.
template <class Attempt>
void check_refused(const std::error_code& expected, std::initializer_list<std::string_view> words, Attempt&& attempt) {
  try {
    attempt();
  } catch (const std::system_error& error) {
    const std::string text = error.what();
    CHECK_MESSAGE(error.code() == expected, "expected \"", expected.message(), "\", found \"", text, "\"");
    for (const std::string_view word : words) {
      CHECK_MESSAGE(text.find(word) != std::string::npos, "expected \"", std::string{word}, "\" in \"", text, "\"");
    }
    return;
  }
  FAIL_CHECK("expected \"" << expected.message() << "\", found no error");
}

/// Waits for a condition that is sure to come; half a minute without it fails the test.
template <class Condition>
void eventually(Condition&& condition) {
  const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds{30};
  while (!condition()) {
    if (std::chrono::steady_clock::now() > patience) FAIL("waited in vain");
    std::this_thread::sleep_for(std::chrono::microseconds{100});  // between two looks, so that the other side can run
  }
}

}  // namespace test
