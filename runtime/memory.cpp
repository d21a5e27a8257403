module;
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>
module strait.memory;

import strait.error;

namespace strait {
namespace {

constexpr std::string_view shm_directory = "/dev/shm/";

std::string path_of(const memory_name& name) { return std::string{shm_directory} + name.name; }

/// The text as an error can show it: a NUL would end the message, and an escape sequence would go to the terminal.
std::string printable(std::string_view text) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string shown;
  for (const char letter : text) {
    const auto code = static_cast<unsigned char>(letter);
    if (code >= 0x20 && code != 0x7f) {
      shown += letter;
    } else {
      shown += {'\\', 'x', digits[code >> 4U], digits[code & 15U]};
    }
  }
  return shown;
}

std::string kind_of(::mode_t mode) {
  switch (mode & S_IFMT) {
    case S_IFREG: return "a file";
    case S_IFDIR: return "a directory";
    case S_IFLNK: return "a symbolic link";
    case S_IFIFO: return "a FIFO";
    case S_IFSOCK: return "a socket";
    default: return "a device";
  }
}

/// What stands in the way at `path`, for the errno of an `open` that failed.
[[noreturn]] void fail_to_open(const memory_name& name, const std::string& path, int error) {
  struct ::stat file{};
  if (::lstat(path.c_str(), &file) == 0) {
    if (!S_ISREG(file.st_mode)) {
      fail(errc::foreign_segment,
           name.text() + ": expected a shared-memory file at " + path + ", found " + kind_of(file.st_mode));
    }
    if (error == EACCES || error == EPERM) {
      std::array<char, 8> mode{};
      std::snprintf(mode.data(), mode.size(), "%04o", static_cast<unsigned>(file.st_mode & 07777U));
      fail(errc::no_permission, name.text() + ": expected a file at " + path + " that user " +
                                    std::to_string(::geteuid()) + " may read and write, found one of user " +
                                    std::to_string(file.st_uid) + " with mode " + mode.data());
    }
  }
  fail_errno(error, name.text() + ": opening " + path);
}

/// Has every byte of the file really allocated: a full tmpfs is an error here and not a SIGBUS at the first message.
/// What the file holds stays.
void allocate(int descriptor, std::size_t bytes, const std::string& what) {
  int error = 0;
  do {
    error = ::posix_fallocate(descriptor, 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  if (error == ENOSPC || error == ENOMEM) {
    struct ::statvfs space{};
    const bool known = ::fstatvfs(descriptor, &space) == 0;
    fail(errc::no_space, what + ": expected " + std::to_string(bytes) + " free bytes in " + std::string{shm_directory} +
                             ", found " +
                             (known ? std::to_string(space.f_bavail * space.f_frsize) : std::string{"fewer"}));
  }
  if (error != 0) fail_errno(error, what + ": allocating " + std::to_string(bytes) + " bytes");
}

void place(std::byte* data, std::size_t bytes, unsigned node, const std::string& what) {
  constexpr std::size_t bits = 8 * sizeof(unsigned long);
  std::array<unsigned long, 16> mask{};
  if (node >= mask.size() * bits) fail_errno(EINVAL, what + ": memory node " + std::to_string(node));
  mask[node / bits] = 1UL << (node % bits);
  // Preferred, not bound: a full node must not become a SIGBUS.
  if (::syscall(SYS_mbind, data, bytes, MPOL_PREFERRED, mask.data(), mask.size() * bits, 0) != 0) {
    // ENOSYS: a kernel without NUMA has one node, and everything lies on it.
    if (errno == ENOSYS && node == 0) return;
    fail_errno(errno, what + ": placing " + std::to_string(bytes) + " bytes on memory node " + std::to_string(node));
  }
}

/// The descriptors of all file_locks, for the child of a fork.
struct lock_list {
  std::mutex mutex;
  std::set<int> descriptors;
  std::atomic<std::uint32_t> generation{0};
};

lock_list& locks_of_process() {
  static auto* list = [] {
    auto* made = new lock_list;  // outlives every end
    ::pthread_atfork([] { locks_of_process().mutex.lock(); }, [] { locks_of_process().mutex.unlock(); },
                     [] {
                       auto& mine = locks_of_process();
                       // The description is shared with the parent: closing our descriptor drops no lock of his.
                       for (const int descriptor : mine.descriptors) ::close(descriptor);
                       mine.descriptors.clear();
                       // relaxed: the child has one thread.
                       mine.generation.fetch_add(1, std::memory_order_relaxed);
                       mine.mutex.unlock();
                     });
    return made;
  }();
  return *list;
}

struct ::flock byte_lock(short type, std::uint64_t byte) {
  struct ::flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(byte);
  lock.l_len = 1;
  return lock;
}

/// A file in the memory file system that has no name yet, filled and with its gate held.
segment make_nameless(const memory_name& name, const segment_plan& plan) {
  const std::string what = name.text();
  segment made;
  made.locks = file_locks{std::string{shm_directory}.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, plan.mode};
  const int descriptor = made.locks.descriptor();
  if (descriptor < 0) fail_errno(errno, what + ": creating a file in " + std::string{shm_directory});
  // The umask must not make a channel narrower than was asked for.
  if (::fchmod(descriptor, static_cast<mode_t>(plan.mode)) != 0) fail_errno(errno, what + ": setting its mode");
  if (::ftruncate(descriptor, static_cast<off_t>(plan.bytes)) != 0) {
    if (errno == EFBIG || errno == EINVAL) {
      fail(errc::no_space, what + ": expected room for " + std::to_string(plan.bytes) +
                               " bytes, found a file system that allows no such file");
    }
    fail_errno(errno, what + ": setting its size to " + std::to_string(plan.bytes));
  }
  made.map = mapping::of_file(descriptor, plan.bytes, plan.node, what);
  allocate(descriptor, plan.bytes, what);
  made.map.populate();
  plan.fill(made.map.data());
  made.locks.lock(gate_byte);
  made.created = true;
  return made;
}

/// Gives the file its name; false when the name is taken.
bool give_name(const memory_name& name, int descriptor) {
  // Through /proc, because linkat with AT_EMPTY_PATH asks for a capability.
  const std::string nameless = "/proc/self/fd/" + std::to_string(descriptor);
  if (::linkat(AT_FDCWD, nameless.c_str(), AT_FDCWD, path_of(name).c_str(), AT_SYMLINK_FOLLOW) == 0) return true;
  if (errno == EEXIST) return false;
  fail_errno(errno, name.text() + ": giving " + path_of(name) + " its name");
}

/// Removes the name from the directory; that it is gone already is no error.
void take_name_away(const memory_name& name, ::uid_t owner, const std::string& purpose) {
  const std::string path = path_of(name);
  if (::unlink(path.c_str()) == 0 || errno == ENOENT) return;
  const int error = errno;
  const std::string what = name.text() + ": expected " + purpose + " at " + path + ", found a file of user " +
                           std::to_string(owner) + " that user " + std::to_string(::geteuid()) + " may not remove";
  if (error == EACCES || error == EPERM) fail(errc::no_permission, what);
  fail_errno(error, what);
}

bool still_named(const memory_name& name, int descriptor) noexcept {
  struct ::stat file{};
  struct ::stat named{};
  return ::fstat(descriptor, &file) == 0 && ::stat(path_of(name).c_str(), &named) == 0 && file.st_ino == named.st_ino &&
         file.st_dev == named.st_dev;
}

}  // namespace

std::string memory_name::text() const {
  switch (scheme) {
    case memory_scheme::private_memory: return "private memory";
    case memory_scheme::posix: return "posix:" + name;
  }
  return name;
}

memory_name parse_memory_name(std::string_view text) {
  constexpr std::string_view known = "posix:";
  memory_name result;
  if (const auto colon = text.find(':'); colon != std::string_view::npos) {
    if (text.substr(0, colon + 1) != known) {
      fail(errc::unknown_scheme, "channel \"" + printable(text) + "\": expected the scheme \"posix:\" or none, found \"" +
                                     printable(text.substr(0, colon + 1)) + "\"");
    }
    text.remove_prefix(colon + 1);
  }
  constexpr std::size_t longest = 255;  // NAME_MAX of tmpfs
  const auto reject = [&](const std::string& found) {
    fail(errc::bad_name, "channel name \"" + printable(text) + "\": expected 1 to " + std::to_string(longest) +
                             " characters without '/' and NUL, and neither \".\" nor \"..\"; found " + found);
  };
  if (text.empty()) reject("an empty name");
  if (text.size() > longest) reject(std::to_string(text.size()) + " characters");
  if (text.find('/') != std::string_view::npos) reject("a '/'");
  if (text.find('\0') != std::string_view::npos) reject("a NUL");
  if (text == "." || text == "..") reject("a directory");
  result.name = text;
  return result;
}

mapping mapping::anonymous(std::size_t bytes, std::optional<unsigned> node) {
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    if (errno == ENOMEM) {
      fail(errc::no_space, "private memory: expected room for " + std::to_string(bytes) + " bytes, found less");
    }
    fail_errno(errno, "private memory: mapping " + std::to_string(bytes) + " bytes");
  }
  mapping made{static_cast<std::byte*>(data), bytes};
  if (node) place(made.data_, bytes, *node, "private memory");
  made.populate();
  return made;
}

mapping mapping::of_file(int descriptor, std::size_t bytes, std::optional<unsigned> node, const std::string& what) {
  // Through a description of its own. A mapping holds the description that it was made from, and fork copies mappings:
  // locks of that description would live on in the children of a dead owner, with no descriptor to be closed.
  const std::string file = "/proc/self/fd/" + std::to_string(descriptor);
  const int fresh = ::open(file.c_str(), O_RDWR | O_CLOEXEC);
  if (fresh < 0) fail_errno(errno, what + ": opening " + file + " to map it");
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fresh, 0);
  const int error = errno;
  ::close(fresh);
  errno = error;
  if (data == MAP_FAILED) {
    if (errno == ENOMEM) {
      fail(errc::no_space, what + ": expected address space for " + std::to_string(bytes) + " bytes, found less");
    }
    fail_errno(errno, what + ": mapping " + std::to_string(bytes) + " bytes");
  }
  mapping made{static_cast<std::byte*>(data), bytes};
  if (node) place(made.data_, bytes, *node, what);
  return made;
}

mapping::~mapping() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

void mapping::populate() noexcept {
#ifdef MADV_POPULATE_WRITE
  // EINVAL: a kernel before 5.14. Where the kernel knows the call and cannot do it, touching would be a signal.
  if (::madvise(data_, bytes_, MADV_POPULATE_WRITE) == 0 || errno != EINVAL) return;
#endif
  // Touch each page for writing without changing it, because another process may be using it. A compare-exchange, because
  // compilers turn an addition of zero whose result nobody wants into nothing at all.
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  for (std::size_t at = 0; at < bytes_; at += page) {
    auto& word = *reinterpret_cast<std::atomic<std::uint32_t>*>(data_ + at);
    std::uint32_t same = word.load(std::memory_order_relaxed);
    while (!word.compare_exchange_weak(same, same, std::memory_order_relaxed)) {
    }
  }
}

file_locks::file_locks(const char* path, int flags, unsigned mode) {
  auto& list = locks_of_process();
  const std::lock_guard guard{list.mutex};
  const int opened = ::open(path, flags, static_cast<mode_t>(mode));
  if (opened < 0) return;
  try {
    list.descriptors.insert(opened);
  } catch (...) {
    ::close(opened);
    throw;
  }
  descriptor_ = opened;
}

file_locks::file_locks(file_locks&& other) noexcept : descriptor_{std::exchange(other.descriptor_, -1)} {}

file_locks& file_locks::operator=(file_locks&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

file_locks::~file_locks() {
  if (descriptor_ < 0) return;
  auto& list = locks_of_process();
  const std::lock_guard guard{list.mutex};
  // After a fork the child's handler has closed it already, and the number may be somebody else's by now.
  if (list.descriptors.erase(descriptor_) != 0) ::close(descriptor_);
}

bool file_locks::try_lock(std::uint64_t byte) noexcept {
  struct ::flock lock = byte_lock(F_WRLCK, byte);
  int result = 0;
  do {
    result = ::fcntl(descriptor_, F_OFD_SETLK, &lock);
  } while (result != 0 && errno == EINTR);
  return result == 0;
}

void file_locks::lock(std::uint64_t byte) noexcept {
  struct ::flock lock = byte_lock(F_WRLCK, byte);
  while (::fcntl(descriptor_, F_OFD_SETLKW, &lock) != 0 && errno == EINTR) {
  }
}

bool file_locks::lock_within(std::uint64_t byte, std::chrono::milliseconds patience) noexcept {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (!try_lock(byte)) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    const timespec moment{.tv_sec = 0, .tv_nsec = 1'000'000};
    ::nanosleep(&moment, nullptr);
  }
  return true;
}

void file_locks::unlock(std::uint64_t byte) noexcept {
  struct ::flock lock = byte_lock(F_UNLCK, byte);
  ::fcntl(descriptor_, F_OFD_SETLK, &lock);
}

bool file_locks::held_by_other(std::uint64_t byte) const noexcept {
  struct ::flock lock = byte_lock(F_WRLCK, byte);
  return ::fcntl(descriptor_, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

std::uint32_t fork_generation() noexcept {
  // relaxed: changes only while the process has one thread.
  return locks_of_process().generation.load(std::memory_order_relaxed);
}

segment open_segment(const memory_name& name, open_mode mode, const segment_plan& plan, std::size_t header_bytes,
                     const std::function<verdict(std::span<const std::byte>, std::uint64_t, const file_locks&)>& examine,
                     const std::function<std::size_t(std::span<const std::byte>)>& bytes_to_map) {
  const std::string path = path_of(name);
  for (;;) {
    // O_NOFOLLOW: a link that somebody planted under the name leads nowhere. O_NONBLOCK: neither does a FIFO.
    segment found;
    found.locks = file_locks{path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0};
    const int descriptor = found.locks.descriptor();
    if (descriptor < 0) {
      if (errno != ENOENT) fail_to_open(name, path, errno);
      if (mode == open_mode::open) fail_errno(ENOENT, name.text() + ": expected an existing channel at " + path);
      segment made = make_nameless(name, plan);
      if (give_name(name, made.locks.descriptor())) return made;
      continue;  // somebody else was faster: open his
    }
    struct ::stat file{};
    if (::fstat(descriptor, &file) != 0) fail_errno(errno, name.text() + ": looking at " + path);
    if (!S_ISREG(file.st_mode)) {
      fail(errc::foreign_segment,
           name.text() + ": expected a shared-memory file at " + path + ", found " + kind_of(file.st_mode));
    }
    // A foreign file must stay as it is, and its locks are not ours to wait for: look before we lock.
    std::vector<std::byte> header(header_bytes);
    const auto read_header = [&] {
      const ::ssize_t got = ::pread(descriptor, header.data(), header.size(), 0);
      if (got < 0) fail_errno(errno, name.text() + ": reading the header of " + path);
      return std::span<const std::byte>{header.data(), static_cast<std::size_t>(got)};
    };
    (void)bytes_to_map(read_header());
    found.locks.lock(gate_byte);
    if (!still_named(name, descriptor)) continue;  // the last one left while we waited for the gate
    const auto seen = read_header();
    if (::fstat(descriptor, &file) != 0) fail_errno(errno, name.text() + ": looking at " + path);
    const auto size = static_cast<std::uint64_t>(file.st_size);
    const verdict judged = examine(seen, size, found.locks);
    if (judged == verdict::replace) {
      take_name_away(name, file.st_uid, "to replace what a crash left");
      continue;
    }
    if (mode == open_mode::create) {
      fail_errno(EEXIST, name.text() + ": expected no channel at " + path + ", found one");
    }
    const std::size_t bytes = bytes_to_map(seen);
    // It was allocated when it was made, but a copy of it, or one that was cut and extended, has holes.
    allocate(descriptor, bytes, name.text());
    found.map = mapping::of_file(descriptor, bytes, std::nullopt, name.text());
    found.map.populate();
    return found;
  }
}

void remove_name(const memory_name& name, const file_locks& locks) noexcept {
  if (still_named(name, locks.descriptor())) ::unlink(path_of(name).c_str());
}

namespace {

/// Opens what is under the name, to be looked at; throws when it is no file.
segment_look open_to_look(const memory_name& name, int access) {
  const std::string path = path_of(name);
  segment_look look;
  // O_NOFOLLOW and O_NONBLOCK: as in open_segment.
  look.locks = file_locks{path.c_str(), access | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0};
  if (look.locks.descriptor() < 0) fail_to_open(name, path, errno);
  struct ::stat file{};
  if (::fstat(look.locks.descriptor(), &file) != 0) fail_errno(errno, name.text() + ": looking at " + path);
  if (!S_ISREG(file.st_mode)) {
    fail(errc::foreign_segment,
         name.text() + ": expected a shared-memory file at " + path + ", found " + kind_of(file.st_mode));
  }
  return look;
}

/// Reads the beginning and the size. Returns whose file it is.
::uid_t read_beginning(const memory_name& name, std::size_t header_bytes, segment_look& look) {
  look.header.resize(header_bytes);
  const ::ssize_t got = ::pread(look.locks.descriptor(), look.header.data(), header_bytes, 0);
  if (got < 0) fail_errno(errno, name.text() + ": reading the header of " + path_of(name));
  look.header.resize(static_cast<std::size_t>(got));
  struct ::stat file{};
  if (::fstat(look.locks.descriptor(), &file) != 0) fail_errno(errno, name.text() + ": looking at " + path_of(name));
  look.size = static_cast<std::uint64_t>(file.st_size);
  return file.st_uid;
}

}  // namespace

std::vector<named_file> named_files() {
  const std::string directory{shm_directory};
  struct closer {
    void operator()(::DIR* open) const noexcept { ::closedir(open); }
  };
  const std::unique_ptr<::DIR, closer> listing{::opendir(directory.c_str())};
  if (!listing) fail_errno(errno, "opening " + directory);
  std::vector<named_file> files;
  for (;;) {
    errno = 0;
    const ::dirent* entry = ::readdir(listing.get());
    if (entry == nullptr) break;
    struct ::stat file{};
    // What has vanished since is not there; a link, a FIFO or a directory is no segment.
    if (::fstatat(::dirfd(listing.get()), entry->d_name, &file, AT_SYMLINK_NOFOLLOW) != 0) continue;
    if (!S_ISREG(file.st_mode)) continue;
    files.push_back({{memory_scheme::posix, entry->d_name}, static_cast<std::uint64_t>(file.st_size)});
  }
  if (errno != 0) fail_errno(errno, "reading " + directory);
  std::ranges::sort(files, {}, [](const named_file& file) -> const std::string& { return file.name.name; });
  return files;
}

segment_look look_at_segment(const memory_name& name, std::size_t header_bytes) {
  segment_look look = open_to_look(name, O_RDONLY);
  look.gate_held = look.locks.held_by_other(gate_byte);
  read_beginning(name, header_bytes, look);
  return look;
}

void remove_segment(const memory_name& name, std::size_t header_bytes,
                    const std::function<void(const segment_look&)>& examine) {
  for (;;) {
    // For writing: only then may the gate be locked.
    segment_look look = open_to_look(name, O_RDWR);
    look.gate_held = look.locks.held_by_other(gate_byte);
    read_beginning(name, header_bytes, look);
    examine(look);
    // Entering and leaving take microseconds; who is at the gate for longer is stopped there, and lives.
    if (!look.locks.lock_within(gate_byte, std::chrono::seconds{1})) {
      fail(errc::end_in_use,
           name.text() + ": expected a channel in which nobody lives, found somebody who is entering or leaving");
    }
    if (!still_named(name, look.locks.descriptor())) continue;  // look at what is there now, if anything
    look.gate_held = false;
    const ::uid_t owner = read_beginning(name, header_bytes, look);
    examine(look);
    take_name_away(name, owner, "to remove what nobody uses");
    return;
  }
}

}  // namespace strait
