module;
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/mempolicy.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>
module strait.memory;

import strait.error;

namespace strait {
namespace {

constexpr std::string_view shm_directory = "/dev/shm/";
/// How the names of companions begin, and of what is being made where files need a name for that.
constexpr std::string_view companion_prefix = ".strait-sysv-";
constexpr std::string_view makeshift_prefix = ".strait-new-";

// Of madvise, for headers that are older than the kernel.
constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, Linux 5.14
constexpr int collapse = 25;        // MADV_COLLAPSE, Linux 6.1

/// The directory of a path that has one, with the slash.
std::string directory_of(const std::string& path) {
  return path.substr(0, path.rfind('/') + 1);
}

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
    case S_IFREG:
      return "a file";
    case S_IFDIR:
      return "a directory";
    case S_IFLNK:
      return "a symbolic link";
    case S_IFIFO:
      return "a FIFO";
    case S_IFSOCK:
      return "a socket";
    default:
      return "a device";
  }
}

/// What stands in the way at `path`, for the errno of an `open` that failed.
[[noreturn]] void fail_to_open(const memory_name& name, const std::string& path, int error) {
  struct ::stat file{};
  if (::lstat(path.c_str(), &file) == 0) {
    if (!S_ISREG(file.st_mode)) {
      fail(errc::foreign_segment,
           name.text() + ": expected a regular file at " + path + ", found " + kind_of(file.st_mode));
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

/// Has every byte of the file really allocated: a full file system is an error here and not a SIGBUS at the first
/// message. What the file holds stays. `shared`: others may be writing to it.
void allocate(int descriptor, std::size_t bytes, bool shared, const memory_name& name) {
  const std::string what = name.text();
  int error = allocate_bytes(descriptor, bytes);
  if (error == EOPNOTSUPP) {
    // The C library then rewrites a byte of each block, which would undo what another end writes at that moment. A file
    // that was there has been allocated like this by its creator.
    if (shared) return;
    error = ::posix_fallocate(descriptor, 0, static_cast<off_t>(bytes));
  }
  if (error == ENOSPC || error == ENOMEM || error == EDQUOT) {
    struct ::statvfs space{};
    const bool known = ::fstatvfs(descriptor, &space) == 0;
    fail(errc::no_space, what + ": expected " + std::to_string(bytes) + " free bytes in " + directory_of(name.path()) +
                             ", found " +
                             (known ? std::to_string(space.f_bavail * space.f_frsize) : std::string{"fewer"}));
  }
  if (error != 0) fail_errno(error, what + ": allocating " + std::to_string(bytes) + " bytes");
}

constexpr std::size_t most_kept = 4096;

/// What the child of a fork must let go of, because it is the parent's.
struct estate {
  std::mutex mutex;
  /// Of all unshared descriptors.
  std::set<int> descriptors;
  struct shared_memory {
    std::size_t bytes;
    std::size_t kept;
    void (*change)(std::byte* data) noexcept;
  };
  std::map<std::byte*, shared_memory> mappings;
  std::atomic<std::uint32_t> generation{0};

  /// In the child, which has one thread. Closes and maps, and allocates nothing.
  void renounce() noexcept {
    // The description is shared with the parent: closing our descriptor drops no lock of his.
    for (const int descriptor : descriptors) ::close(descriptor);
    descriptors.clear();
    for (const auto& [data, memory] : mappings) {
      std::array<std::byte, most_kept> kept;
      std::memcpy(kept.data(), data, memory.kept);
      const void* own = ::mmap(data, memory.bytes, PROT_READ | PROT_WRITE,
                               MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      // Without memory for that the child dies at its first access: better than one that meddles with the parent's.
      if (own == MAP_FAILED) {
        ::mprotect(data, memory.bytes, PROT_NONE);
        continue;
      }
      std::memcpy(data, kept.data(), memory.kept);
      memory.change(data);
    }
    // relaxed: one thread.
    generation.fetch_add(1, std::memory_order_relaxed);
  }
};

estate& estate_of_process() {
  static auto* list = [] {
    auto* made = new estate;  // outlives every end
    ::pthread_atfork([] { estate_of_process().mutex.lock(); }, [] { estate_of_process().mutex.unlock(); },
                     [] {
                       estate_of_process().renounce();
                       estate_of_process().mutex.unlock();
                     });
    return made;
  }();
  return *list;
}

/// Between two looks at what the kernel does not let us wait for.
void sleep_a_moment() noexcept {
  const timespec moment{.tv_sec = 0, .tv_nsec = 1'000'000};
  ::nanosleep(&moment, nullptr);
}

struct ::flock byte_lock(short type, std::uint64_t byte) {
  struct ::flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(byte);
  lock.l_len = 1;
  return lock;
}

/// The segment whose locks are on an open file: that file's own bytes, or a System V segment that the file is the
/// companion of. What is asked of it is asked of the kernel each time, because others may be at work on it.
class body {
 public:
  /// Throws when the file is none, or no companion where it should be one.
  body(const memory_name& name, int descriptor) : name_{name}, descriptor_{descriptor} {
    if (!S_ISREG(status().st_mode)) {
      fail(errc::foreign_segment,
           name.text() + ": expected a regular file at " + name.path() + ", found " + kind_of(status().st_mode));
    }
    if (name.scheme != memory_scheme::system_v) return;
    const ::ssize_t got = ::pread(descriptor, &companion_, sizeof companion_, 0);
    if (got < 0) fail_errno(errno, name.text() + ": reading the companion " + name.path());
    if (got != sizeof companion_ || companion_.magic != system_v_companion::expected_magic) {
      fail(errc::foreign_segment, name.text() + ": expected the companion of a System V segment at " + name.path() +
                                      ", found a file that does not begin like one");
    }
  }

  struct beginning {
    std::span<const std::byte> bytes;
    /// Of the whole.
    std::uint64_t size = 0;
  };
  /// Its first bytes, as many as fit and are there. Nothing: a companion without segment, or with an unfinished one; its
  /// creator died half-way, or is still at work.
  [[nodiscard]] std::optional<beginning> read(std::vector<std::byte>& into) const {
    if (name_.scheme == memory_scheme::system_v) {
      const auto found = find(into);
      if (!found || !found->finished) return std::nullopt;
      return beginning{std::span{into}.first(found->copied), found->bytes};
    }
    const ::ssize_t got = ::pread(descriptor_, into.data(), into.size(), 0);
    if (got < 0) fail_errno(errno, name_.text() + ": reading the header of " + name_.path());
    return beginning{std::span{into}.first(static_cast<std::size_t>(got)),
                     static_cast<std::uint64_t>(status().st_size)};
  }

  /// Maps it, with every byte really there. The gate must be held.
  [[nodiscard]] mapping map(std::size_t bytes, const page_wishes& wishes) const {
    if (name_.scheme == memory_scheme::system_v) {
      const auto found = find();
      if (!found) fail_errno(EIDRM, name_.text() + ": attaching its System V segment");
      return mapping::of_system_v(found->identifier, bytes, wishes, name_.text());
    }
    // It was allocated when it was made, but a copy of it, or one that was cut and extended, has holes.
    allocate(descriptor_, bytes, true, name_);
    return mapping::of_file(descriptor_, bytes, wishes, name_.text());
  }

  /// Removes the segment, and its name from the directory; that they are gone already is no error. The gate must be
  /// held. Returns an errno, or 0.
  [[nodiscard]] int remove() const {
    if (name_.scheme == memory_scheme::system_v) {
      // First, because without its companion nobody would find it.
      if (const auto found = find()) {
        if (const int error = remove_system_v(*found); error != 0) return error;
      }
    }
    return ::unlink(name_.path().c_str()) == 0 || errno == ENOENT ? 0 : errno;
  }
  /// The same; `purpose` tells what is wrong when it fails.
  void remove(const std::string& purpose) const {
    const int error = remove();
    if (error == 0) return;
    const std::string what = name_.text() + ": expected " + purpose + " at " + name_.path() +
                             ", found a file of user " + std::to_string(status().st_uid) + " that user " +
                             std::to_string(::geteuid()) + " may not remove";
    if (error == EACCES || error == EPERM) fail(errc::no_permission, what);
    fail_errno(error, what);
  }

  [[nodiscard]] struct ::stat status() const {
    struct ::stat file{};
    if (::fstat(descriptor_, &file) != 0) fail_errno(errno, name_.text() + ": looking at " + name_.path());
    return file;
  }

 private:
  [[nodiscard]] std::optional<system_v_segment> find(std::span<std::byte> into = {}) const {
    return find_system_v(name_, companion_, status().st_uid, into);
  }

  const memory_name& name_;
  int descriptor_;
  system_v_companion companion_;
};

bool still_named(const std::string& path, int descriptor) noexcept {
  struct ::stat file{};
  struct ::stat named{};
  return ::fstat(descriptor, &file) == 0 && ::lstat(path.c_str(), &named) == 0 && file.st_ino == named.st_ino &&
         file.st_dev == named.st_dev;
}

/// A hidden name beside `path`, for file systems without nameless files. Always the same for the same path, so that the
/// next creator finds what a dead one left.
std::string makeshift_path(const std::string& path) {
  return directory_of(path).append(makeshift_prefix) + digest_of_last_part(path);
}

/// Takes away the makeshift name that a creator of `path` left when it died, before or after it gave the file its own.
/// One that lives holds the gate, or looks once more when it has it.
void clear_makeshift(const std::string& path) {
  const std::string makeshift = makeshift_path(path);
  file_locks left{makeshift.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0};
  if (left.descriptor() < 0 || !left.try_lock(gate_byte) || !still_named(makeshift, left.descriptor())) return;
  ::unlink(makeshift.c_str());
}

/// A segment that is being made, and the names that it has too early: one on file systems without nameless files, and
/// that of a companion whose segment is not there yet. They are taken away by the destructor.
class nursling {
 public:
  nursling(const memory_name& name, const segment_plan& plan) : name_{name}, plan_{plan}, path_{name.path()} {
    made_.created = true;
    open_nameless(plan.mode);
    if (made_.locks.descriptor() < 0) open_under_makeshift(plan.mode);
    // Before the mode, because a change of group may take bits of it away.
    if (plan.group && ::fchown(made_.locks.descriptor(), static_cast<::uid_t>(-1), *plan.group) != 0) {
      const std::string what = name_.text() + ": expected that user " + std::to_string(::geteuid()) +
                               " may give it to group " + std::to_string(*plan.group);
      if (errno == EPERM) fail(errc::no_permission, what + ", found that the user is no member of it");
      fail_errno(errno, what);
    }
    // The umask must not make a channel narrower than was asked for.
    if (::fchmod(made_.locks.descriptor(), static_cast<::mode_t>(plan.mode)) != 0) {
      fail_errno(errno, name_.text() + ": setting its mode");
    }
  }
  nursling(const nursling&) = delete;
  nursling& operator=(const nursling&) = delete;
  ~nursling() {
    if (!makeshift_.empty()) ::unlink(makeshift_.c_str());
    if (lonely_companion_) ::unlink(path_.c_str());
  }

  /// Makes it and gives it its name; false when the name is taken.
  [[nodiscard]] bool come_to_be() {
    if (name_.scheme == memory_scheme::file) {
      // Opened before there is a name, so that a lack of descriptors leaves nothing.
      const file_locks directory{directory_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0};
      if (directory.descriptor() < 0 && errno != EACCES) fail_to_create(directory_of(path_));
      fill();
      if (!give_name()) return false;
      write_name_to_disk(directory.descriptor());
      return true;
    }
    if (name_.scheme != memory_scheme::system_v) {
      fill();
      return give_name();
    }
    if (!come_as_companion()) return false;
    made_.map = make_system_v(name_, plan_);
    lonely_companion_ = false;
    return true;
  }

  /// Makes the companion of a System V segment that is to come, and sees to it that there is none yet; false when there
  /// is a companion. The gate keeps others from both; who finds it free knows that we died.
  [[nodiscard]] bool come_as_companion() {
    const auto companion = system_v_companion::of(plan_.bytes);
    if (::pwrite(made_.locks.descriptor(), &companion, sizeof companion, 0) != sizeof companion) {
      if (errno == ENOSPC) {
        fail(errc::no_space,
             name_.text() + ": expected room for a small file in " + directory_of(path_) + ", found none");
      }
      fail_errno(errno, name_.text() + ": writing the companion " + path_);
    }
    if (!give_name()) return false;
    lonely_companion_ = true;
    if (const auto orphan = find_system_v(name_, companion, std::nullopt)) {
      if (orphan->attached != 0) {
        fail(errc::end_in_use, name_.text() + ": expected the companion " + path_ +
                                   " of a System V segment that is attached " + std::to_string(orphan->attached) +
                                   " times, found that it was removed");
      }
      // Whoever removed the companion removed the channel, as `rm` does with a file.
      if (const int error = remove_system_v(*orphan); error != 0) {
        fail_errno(error, name_.text() + ": removing a System V segment without companion");
      }
    }
    return true;
  }

  [[nodiscard]] segment take() { return std::move(made_); }

 private:
  /// Gives the file its size and contents.
  void fill() {
    const segment_plan& plan = plan_;
    const std::string what = name_.text();
    const int descriptor = made_.locks.descriptor();
    const std::size_t bytes = file_bytes(descriptor, plan.bytes, plan.pages);
    if (::ftruncate(descriptor, static_cast<off_t>(bytes)) != 0) {
      if (errno == EFBIG || errno == EINVAL) {
        fail(errc::no_space, what + ": expected room for " + std::to_string(bytes) +
                                 " bytes, found a file system that allows no such file");
      }
      fail_errno(errno, what + ": setting its size to " + std::to_string(bytes));
    }
    made_.map = mapping::of_file(descriptor, plan.bytes, plan.pages, what);
    allocate(descriptor, bytes, false, name_);
    made_.map.furnish(plan.pages, what);
    plan.fill(made_.map.data());
    // A name that a power failure kept without its contents would be in the user's way for good.
    if (name_.outlives_its_ends() && ::fsync(descriptor) != 0) fail_errno(errno, what + ": writing it to the disk");
  }

  /// Gives the file its name; false when the name is taken.
  [[nodiscard]] bool give_name() {
    if (makeshift_.empty()) {
      // Through /proc, because linkat with AT_EMPTY_PATH asks for a capability.
      const std::string nameless = "/proc/self/fd/" + std::to_string(made_.locks.descriptor());
      if (::linkat(AT_FDCWD, nameless.c_str(), AT_FDCWD, path_.c_str(), AT_SYMLINK_FOLLOW) == 0) return true;
    } else {
      if (::link(makeshift_.c_str(), path_.c_str()) == 0) return true;
      // Where files have no second names, they may still be renamed without replacing anything.
      if (errno != EEXIST &&
          ::syscall(SYS_renameat2, AT_FDCWD, makeshift_.c_str(), AT_FDCWD, path_.c_str(), RENAME_NOREPLACE) == 0) {
        makeshift_.clear();
        return true;
      }
    }
    if (errno == EEXIST) return false;
    fail_errno(errno, name_.text() + ": giving " + path_ + " its name");
  }

  /// A file's name is the directory's, and goes to the disk with that. A directory that may be written to and not read
  /// cannot be asked for it, and some file systems have nothing to say to that (EINVAL).
  void write_name_to_disk(int directory) const {
    if (directory >= 0 && ::fsync(directory) != 0 && errno != EINVAL) {
      fail_errno(errno, name_.text() + ": writing its name to the disk");
    }
  }

  void open_nameless(unsigned mode) {
    const std::string directory = directory_of(path_);
    made_.locks = file_locks{directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, mode};
    if (made_.locks.descriptor() >= 0) {
      made_.locks.lock(gate_byte);
      return;
    }
    // EISDIR: a kernel whose file systems have never heard of it.
    if (errno != EOPNOTSUPP && errno != EISDIR) fail_to_create(directory);
  }

  void open_under_makeshift(unsigned mode) {
    const std::string path = makeshift_path(path_);
    for (;;) {
      // The gate tells whether its maker lives. Between the opening and the locking it looks as if he did not, so he
      // looks afterwards whether somebody thought so.
      file_locks mine{path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, mode};
      if (mine.descriptor() >= 0) {
        if (!mine.try_lock(gate_byte) || !still_named(path, mine.descriptor())) continue;
        made_.locks = std::move(mine);
        makeshift_ = path;
        return;
      }
      if (errno != EEXIST) fail_to_create(path);
      file_locks theirs{path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0};
      if (theirs.descriptor() < 0) {
        if (errno == ENOENT) continue;
        fail_to_open(name_, path, errno);
      }
      theirs.lock(gate_byte);
      if (still_named(path, theirs.descriptor()) && ::unlink(path.c_str()) != 0 && errno != ENOENT) {
        fail_errno(errno, name_.text() + ": removing " + path + ", which a creator left that died");
      }
    }
  }

  [[noreturn]] void fail_to_create(const std::string& where) const {
    if (errno == ENOSPC || errno == EDQUOT) {
      fail(errc::no_space, name_.text() + ": expected room for a file in " + directory_of(where) + ", found none");
    }
    fail_errno(errno, name_.text() + ": creating a file in " + directory_of(where));
  }

  const memory_name& name_;
  const segment_plan& plan_;
  std::string path_;
  std::string makeshift_;
  bool lonely_companion_ = false;
  segment made_;
};

}  // namespace

std::string memory_name::text() const {
  switch (scheme) {
    case memory_scheme::private_memory:
      return "private memory";
    case memory_scheme::posix:
      return "posix:" + name;
    case memory_scheme::system_v:
      return "sysv:" + name;
    case memory_scheme::file:
      return "file:" + name;
    case memory_scheme::handed_over:
      return "unix:" + name;
  }
  return name;
}

std::string memory_name::path() const {
  switch (scheme) {
    case memory_scheme::private_memory:
    case memory_scheme::handed_over:
      return {};
    case memory_scheme::posix:
      return std::string{shm_directory} + name;
    case memory_scheme::system_v:
      return std::string{shm_directory}.append(companion_prefix) + name;
    case memory_scheme::file:
      return name;
  }
  return {};
}

bool memory_name::outlives_its_ends() const noexcept {
  return scheme == memory_scheme::file;
}

namespace {

/// A scheme and then a path, which may be relative; for a socket also a name behind an '@'.
memory_name parse_path(memory_scheme scheme, std::string_view path) {
  // PATH_MAX, or what fits into a socket's address; both without the NUL.
  const bool of_socket = scheme == memory_scheme::handed_over;
  const std::size_t longest = of_socket ? 107 : 4095;
  memory_name result{.scheme = scheme, .name = std::string{path}};
  const auto reject = [&](const std::string& found) {
    fail(errc::bad_name, "channel name \"" + printable(result.text()) + "\": expected the path of a " +
                             (of_socket ? "socket" : "file") + ", of 1 to " + std::to_string(longest) +
                             " bytes without NUL; found " + found);
  };
  if (path.empty()) reject("an empty path");
  if (path.find('\0') != std::string_view::npos) reject("a NUL");
  if (!(of_socket && path.front() == '@')) {
    const std::string_view last = path.substr(path.rfind('/') + 1);  // all of it when there is no slash
    if (last.empty() || last == "." || last == "..") reject("a directory");
    if (path.front() != '/') {
      std::error_code error;
      const std::string here = std::filesystem::current_path(error).string();
      if (error) fail_errno(error.value(), result.text() + ": completing the path with the working directory");
      result.name.insert(0, here.ends_with('/') ? here : here + '/');
    }
  }
  if (result.name.size() > longest) reject(std::to_string(result.name.size()) + " bytes");
  return result;
}

}  // namespace

memory_name parse_memory_name(std::string_view text) {
  memory_name result;
  if (const auto colon = text.find(':'); colon != std::string_view::npos) {
    const std::string_view scheme = text.substr(0, colon + 1);
    if (scheme == "file:") return parse_path(memory_scheme::file, text.substr(colon + 1));
    if (scheme == "unix:") return parse_path(memory_scheme::handed_over, text.substr(colon + 1));
    if (scheme == "sysv:") {
      result.scheme = memory_scheme::system_v;
    } else if (scheme != "posix:") {
      fail(errc::unknown_scheme,
           "channel \"" + printable(text) +
               "\": expected the scheme \"posix:\", \"sysv:\", \"file:\" or \"unix:\", or none, found \"" +
               printable(scheme) + "\"");
    }
    text.remove_prefix(colon + 1);
  }
  // NAME_MAX of tmpfs
  const std::size_t longest = 255 - (result.scheme == memory_scheme::system_v ? companion_prefix.size() : 0);
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

std::string digest_of_last_part(std::string_view path) {
  std::uint64_t hash = 0xcbf2'9ce4'8422'2325;  // FNV-1a
  for (const char letter : path.substr(path.rfind('/') + 1)) {
    hash = (hash ^ static_cast<unsigned char>(letter)) * 0x100'0000'01b3;
  }
  std::array<char, 24> digits{};
  std::snprintf(digits.data(), digits.size(), "%016llx", static_cast<unsigned long long>(hash));
  return digits.data();
}

std::size_t base_page() noexcept {
  static const auto bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

int allocate_bytes(int descriptor, std::size_t bytes, int mode) noexcept {
  int error = 0;
  do {
    error = ::fallocate(descriptor, mode, 0, static_cast<::off_t>(bytes)) == 0 ? 0 : errno;
  } while (error == EINTR);
  return error;
}

namespace {

/// The first line of a file that the kernel writes; empty where there is none.
std::string first_line(const std::string& path) {
  std::ifstream file{path};
  std::string line;
  std::getline(file, line);
  return line;
}

std::size_t number_in(const std::string& path, std::size_t otherwise) {
  const std::string line = first_line(path);
  std::size_t number = 0;
  return std::from_chars(line.data(), line.data() + line.size(), number).ec == std::errc{} ? number : otherwise;
}

/// Of a transparent huge page; 0: the kernel makes none.
std::size_t transparent_page() {
  static const std::size_t bytes = number_in("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", 0);
  return bytes;
}

/// What memory of that size is aligned to: large memory to a huge page, so that wherever the kernel has made one, it can
/// be mapped as one.
std::size_t alignment_for(std::size_t extent) {
  const std::size_t page = transparent_page();
  return extent >= page ? page : 0;
}

/// The number behind that key in /proc/meminfo; 0 where there is none.
std::size_t memory_figure(std::string_view key) {
  std::ifstream file{"/proc/meminfo"};
  std::string line;
  while (std::getline(file, line)) {
    if (line.starts_with(key)) return std::strtoull(line.c_str() + key.size(), nullptr, 10);
  }
  return 0;
}

/// Of a huge page that was set aside, as MAP_HUGETLB gives them; 0: the kernel has none.
std::size_t hugetlb_page() {
  static const std::size_t bytes = memory_figure("Hugepagesize:") * 1024;
  return bytes;
}

std::string list_of(const std::vector<unsigned>& numbers) {
  std::string text;
  for (const unsigned number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return text;
}

/// Has the kernel make these pages on `node`, and move those that are there. Preferred, not bound: a full node must not
/// become a SIGBUS.
int bind_pages(std::byte* data, std::size_t bytes, unsigned node, unsigned flags) noexcept {
  constexpr std::size_t bits = 8 * sizeof(unsigned long);
  std::array<unsigned long, 16> mask{};
  if (node >= mask.size() * bits) return EINVAL;
  mask[node / bits] = 1UL << (node % bits);
  return ::syscall(SYS_mbind, data, bytes, MPOL_PREFERRED, mask.data(), mask.size() * bits, flags) == 0 ? 0 : errno;
}

/// Throws unless the node exists.
void check_node(unsigned node, const std::string& what) {
  const auto& nodes = memory_nodes();
  if (std::ranges::find(nodes, node) != nodes.end()) return;
  fail_errno(EINVAL, what + ": expected a memory node of this machine (" + list_of(nodes) + "), found node " +
                         std::to_string(node));
}

void add_reason(std::string& text, const std::string& reason) {
  if (!reason.empty()) text += (text.empty() ? "" : "; ") + reason;
}

/// What /proc tells of the mappings within an address range.
struct range_facts {
  std::size_t page_bytes = 0;
  std::size_t transparent_bytes = 0;
  std::size_t locked_bytes = 0;
};

range_facts facts_of(const std::byte* data, std::size_t bytes) {
  range_facts facts;
  const auto first = reinterpret_cast<std::uintptr_t>(data);
  std::ifstream file{"/proc/self/smaps"};
  bool inside = false;
  std::string line;
  while (std::getline(file, line)) {
    std::uintptr_t from = 0;
    std::uintptr_t to = 0;
    // A line of the form "7f00-7f20 rw-p ..." begins a mapping; those of the form "Key:  4 kB" tell of it.
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR, &from, &to) == 2) {
      inside = from < first + bytes && first < to;
      continue;
    }
    const std::size_t colon = line.find(':');
    if (!inside || colon == std::string::npos) continue;
    const std::string_view key = std::string_view{line}.substr(0, colon);
    const std::size_t value = static_cast<std::size_t>(std::strtoull(line.c_str() + colon + 1, nullptr, 10)) * 1024;
    if (key == "KernelPageSize") facts.page_bytes = value;
    if (key == "AnonHugePages" || key == "ShmemPmdMapped" || key == "FilePmdMapped") facts.transparent_bytes += value;
    if (key == "Locked") facts.locked_bytes += value;
  }
  // The kernel counts neighbours in, where it has made one mapping of several.
  facts.transparent_bytes = std::min(facts.transparent_bytes, bytes);
  facts.locked_bytes = std::min(facts.locked_bytes, bytes);
  return facts;
}

}  // namespace

std::size_t page_of_mapping(const std::byte* data) {
  // A look at all mappings of the process takes its time, and on most machines there are no other pages.
  if (memory_figure("HugePages_Total:") == 0) return base_page();
  return std::max(facts_of(data, 1).page_bytes, base_page());
}

std::string lack_of_hugetlb_pages(std::size_t bytes) {
  const std::size_t page = hugetlb_page();
  if (page == 0) return "no hugetlb pages: this kernel has none";
  const std::string size = std::to_string(page / 1024);
  const std::size_t free = number_in("/sys/kernel/mm/hugepages/hugepages-" + size + "kB/free_hugepages", 0);
  return "no hugetlb pages: expected " + std::to_string(round_up(bytes, page) / page) + " free ones of " + size +
         " KiB, found " + std::to_string(free) + " (/proc/sys/vm/nr_hugepages)";
}

std::size_t hugetlb_page_of(int descriptor) noexcept {
  struct ::statfs system{};
  constexpr long hugetlbfs = 0x958458f6;
  if (::fstatfs(descriptor, &system) != 0 || system.f_type != hugetlbfs) return 0;
  return static_cast<std::size_t>(system.f_bsize);
}

std::size_t file_bytes(int descriptor, std::size_t bytes, const page_wishes& wishes) {
  if (const std::size_t page = hugetlb_page_of(descriptor); page != 0) return round_up(bytes, page);
  if (wishes.kind == page_kind::automatic || transparent_page() == 0) return bytes;
  return round_up(bytes, transparent_page());
}

const std::vector<unsigned>& memory_nodes() {
  static const std::vector<unsigned> known = [] {
    std::vector<unsigned> nodes;
    const std::string line = first_line("/sys/devices/system/node/has_memory");  // "0-1,4"
    const char* at = line.data();
    const char* const end = at + line.size();
    while (at < end) {
      unsigned from = 0;
      auto parsed = std::from_chars(at, end, from);
      if (parsed.ec != std::errc{}) break;
      unsigned to = from;
      if (parsed.ptr < end && *parsed.ptr == '-') parsed = std::from_chars(parsed.ptr + 1, end, to);
      for (unsigned node = from; node <= to; ++node) nodes.push_back(node);
      at = parsed.ptr + 1;
    }
    if (nodes.empty()) nodes.push_back(0);
    return nodes;
  }();
  return known;
}

std::optional<unsigned> nearest_memory_node() noexcept {
  unsigned cpu = 0;
  unsigned node = 0;
  if (::getcpu(&cpu, &node) != 0) return std::nullopt;
  const auto& nodes = memory_nodes();
  if (std::ranges::find(nodes, node) == nodes.end()) return std::nullopt;
  return node;
}

void mapping::map(std::size_t bytes, std::size_t extent, std::size_t align, int flags, int descriptor) noexcept {
  std::byte* at = nullptr;
  if (align != 0) {
    void* room = ::mmap(nullptr, extent + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return;
    auto* const begin = static_cast<std::byte*>(room);
    at = begin + (round_up(reinterpret_cast<std::uintptr_t>(begin), align) - reinterpret_cast<std::uintptr_t>(begin));
    if (at != begin) ::munmap(begin, static_cast<std::size_t>(at - begin));
    std::byte* const end = at + round_up(extent, base_page());
    ::munmap(end, static_cast<std::size_t>(begin + extent + align - end));
    flags |= MAP_FIXED;
  }
  void* data = ::mmap(at, extent, PROT_READ | PROT_WRITE, flags, descriptor, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    if (at != nullptr) ::munmap(at, extent);
    errno = error;
    return;
  }
  data_ = static_cast<std::byte*>(data);
  bytes_ = bytes;
  extent_ = extent;
}

mapping mapping::anonymous(std::size_t bytes, const page_wishes& wishes) {
  const std::string what = "private memory";
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS;
  std::string reason;
  if (const std::size_t page = hugetlb_page(); wishes.kind == page_kind::huge && page != 0) {
    const std::size_t extent = round_up(bytes, page);
    mapping made;
    made.map(bytes, extent, 0, flags | MAP_HUGETLB, -1);
    if (made.data_ != nullptr) {
      if (wishes.node) made.ask_for_node(*wishes.node, what);
      // A control group may hold back what the machine has. Touching then fails here; a SIGBUS would come later.
      if (made.populate()) {
        made.furnish(wishes, what);
        return made;
      }
    }
  }
  if (wishes.kind == page_kind::huge) reason = lack_of_hugetlb_pages(bytes);
  const bool transparent = wishes.kind != page_kind::automatic && transparent_page() != 0;
  const std::size_t extent = round_up(bytes, transparent ? transparent_page() : base_page());
  mapping made;
  made.map(bytes, extent, alignment_for(extent), flags, -1);
  if (made.data_ == nullptr) {
    if (errno == ENOMEM) {
      fail(errc::no_space, what + ": expected room for " + std::to_string(bytes) + " bytes, found less");
    }
    fail_errno(errno, what + ": mapping " + std::to_string(bytes) + " bytes");
  }
  add_reason(made.shortfall_, reason);
  if (wishes.node) made.ask_for_node(*wishes.node, what);
  made.furnish(wishes, what);
  return made;
}

mapping mapping::of_file(int descriptor, std::size_t bytes, const page_wishes& wishes, const std::string& what) {
  // Through a description of its own. A mapping holds the description that it was made from, and fork copies mappings:
  // locks of that description would live on in the children of a dead owner, with no descriptor to be closed.
  const std::string file = "/proc/self/fd/" + std::to_string(descriptor);
  const int fresh = ::open(file.c_str(), O_RDWR | O_CLOEXEC);
  if (fresh < 0) fail_errno(errno, what + ": opening " + file + " to map it");
  const std::size_t hugetlb = hugetlb_page_of(fresh);
  std::size_t extent = round_up(bytes, hugetlb != 0 ? hugetlb : base_page());
  struct ::stat found{};
  if (hugetlb == 0 && wishes.kind != page_kind::automatic && ::fstat(fresh, &found) == 0) {
    // All that its creator rounded it up to; beyond the end of the file there is nothing but a signal.
    extent = std::max(extent, std::min(file_bytes(fresh, bytes, wishes), static_cast<std::size_t>(found.st_size)));
  }
  mapping made;
  made.map(bytes, extent, hugetlb != 0 ? 0 : alignment_for(extent), MAP_SHARED, fresh);
  const int error = errno;
  ::close(fresh);
  if (made.data_ == nullptr) {
    if (error == ENOMEM) {
      fail(errc::no_space, what + ": expected address space for " + std::to_string(bytes) + " bytes, found less");
    }
    fail_errno(error, what + ": mapping " + std::to_string(bytes) + " bytes");
  }
  if (wishes.kind == page_kind::huge && hugetlb == 0) {
    made.shortfall_ = "no hugetlb pages: expected a file of hugetlbfs, found one of another file system";
  }
  if (wishes.node) made.ask_for_node(*wishes.node, what);
  return made;
}

mapping::~mapping() {
  if (data_ == nullptr) return;
  auto& list = estate_of_process();
  const std::lock_guard guard{list.mutex};
  list.mappings.erase(data_);  // before somebody else's mapping may be in this place
  ::munmap(data_, extent_);
}

void mapping::keep_from_children(std::size_t bytes, void (*change)(std::byte*) noexcept) {
  auto& list = estate_of_process();
  const std::lock_guard guard{list.mutex};
  list.mappings.insert_or_assign(data_, estate::shared_memory{extent_, std::min(bytes, most_kept), change});
}

std::error_code mapping::write_to_disk() noexcept {
  return {::msync(data_, extent_, MS_SYNC) == 0 ? 0 : errno, std::system_category()};
}

bool mapping::populate() noexcept {
  // EINVAL: a kernel before 5.14. Where the kernel knows the call and cannot do it, touching would be a signal.
  if (::madvise(data_, extent_, populate_write) == 0) return true;
  if (errno != EINVAL) return false;
  // Touch each page for writing without changing it, because another process may be using it. A compare-exchange, because
  // compilers turn an addition of zero whose result nobody wants into nothing at all.
  for (std::size_t at = 0; at < extent_; at += base_page()) {
    auto& word = *reinterpret_cast<std::atomic<std::uint32_t>*>(data_ + at);
    std::uint32_t same = word.load(std::memory_order_relaxed);
    while (!word.compare_exchange_weak(same, same, std::memory_order_relaxed)) {
    }
  }
  return true;
}

void mapping::furnish(const page_wishes& wishes, const std::string& what) {
  const bool set_aside = wishes.kind == page_kind::huge && facts_of(data_, extent_).page_bytes > base_page();
  const bool transparent = wishes.kind != page_kind::automatic && !set_aside;
  int refused = 0;
  if (transparent) refused = ::madvise(data_, extent_, MADV_HUGEPAGE) == 0 ? 0 : errno;
  if (wishes.prefault) populate();
  // A file of hugetlbfs was allocated where its maker ran: its pages know the wish of a mapping only from now on. Why it
  // cannot be fulfilled was told when it was made.
  if (wishes.node) (void)move_to(*wishes.node);
  if (transparent) {
    std::size_t had = facts_of(data_, extent_).transparent_bytes;
    if (had < extent_ && wishes.prefault && refused == 0) {
      // A file system in memory makes huge pages by itself only where its mount says so; asked for it, it makes them of
      // the small ones. Not before Linux 6.1.
      if (::madvise(data_, extent_, collapse) != 0) refused = errno;
      populate();  // the collapsed pages are to be mapped again
      had = facts_of(data_, extent_).transparent_bytes;
    }
    if (had < extent_) {
      std::string reason = "transparent huge pages: expected " + std::to_string(extent_) + " bytes of them, found " +
                           std::to_string(had);
      if (!wishes.prefault) {
        reason += ", because the kernel makes them when they are touched";
      } else if (refused != 0) {
        reason += " (madvise: " + std::system_category().message(refused) + ')';
      }
      add_reason(shortfall_, reason);
    }
  }
  // The call itself: the sanitizers have a function of this name that does nothing.
  if (!wishes.lock || ::syscall(SYS_mlock, data_, extent_) == 0) return;
  const int error = errno;
  struct ::rlimit limit{};
  ::getrlimit(RLIMIT_MEMLOCK, &limit);
  fail_errno(error, what + ": expected to lock " + std::to_string(extent_) + " bytes in memory, found " +
                        (limit.rlim_cur == RLIM_INFINITY
                             ? std::string{"no limit, and not the memory"}
                             : "a limit of " + std::to_string(limit.rlim_cur) +
                                   " bytes for all that this process locks (RLIMIT_MEMLOCK, `ulimit -l`)"));
}

void mapping::ask_for_node(unsigned node, const std::string& what) {
  check_node(node, what);
  const std::error_code error = move_to(node);
  if (!error) return;
  // A kernel without the call, or a filter such as Docker's, which allows it only together with CAP_SYS_NICE.
  if (error.value() != ENOSYS && error.value() != EPERM) {
    fail_errno(error.value(), what + ": placing " + std::to_string(extent_) + " bytes on memory node " +
                                  std::to_string(node) + ", which exists; expected one that this process may use");
  }
  add_reason(shortfall_,
             "not placed on node " + std::to_string(node) + ": the kernel refuses mbind (" + error.message() + ')');
}

std::error_code mapping::move_to(unsigned node) noexcept {
  if (memory_nodes().size() == 1) return {};  // it cannot be anywhere else
  int error = bind_pages(data_, extent_, node, MPOL_MF_MOVE_ALL);
  if (error == EPERM) error = bind_pages(data_, extent_, node, MPOL_MF_MOVE);
  return {error, std::system_category()};
}

page_report mapping::report() const {
  page_report told;
  told.bytes = extent_;
  told.shortfall = shortfall_;
  const range_facts facts = facts_of(data_, extent_);
  told.page_bytes = facts.page_bytes;
  told.transparent_bytes = facts.transparent_bytes;
  told.locked_bytes = facts.locked_bytes;

  std::map<unsigned, std::size_t> by_node;
  std::vector<void*> pages(512);
  std::vector<int> status(pages.size());
  for (std::size_t at = 0; at < extent_;) {
    std::size_t count = 0;
    for (; count < pages.size() && at < extent_; ++count, at += base_page()) pages[count] = data_ + at;
    // With no nodes to move to, it tells where they are.
    if (::syscall(SYS_move_pages, 0, count, pages.data(), nullptr, status.data(), 0) != 0) {
      // ENOSYS: a kernel without NUMA has one node, and everything that is there lies on it.
      told.nodes_refused = std::system_category().message(errno);
      return told;
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (status[i] >= 0) {
        ++by_node[static_cast<unsigned>(status[i])];
      } else {
        ++told.untouched;
      }
    }
  }
  for (const auto& [node, count] : by_node) told.nodes.push_back({node, count});
  return told;
}

fork_pause::fork_pause() {
  estate_of_process().mutex.lock();
}

fork_pause::~fork_pause() {
  estate_of_process().mutex.unlock();
}

unshared_descriptor::unshared_descriptor(const fork_pause&, int opened) {
  if (opened < 0) return;
  const int error = errno;
  try {
    estate_of_process().descriptors.insert(opened);
  } catch (...) {
    ::close(opened);
    throw;
  }
  errno = error;
  value_ = opened;
}

unshared_descriptor::~unshared_descriptor() {
  if (value_ < 0) return;
  auto& list = estate_of_process();
  const std::lock_guard guard{list.mutex};
  // After a fork the child's handler has closed it already, and the number may be somebody else's by now.
  if (list.descriptors.erase(value_) != 0) ::close(value_);
}

file_locks::file_locks(const char* path, int flags, unsigned mode) {
  const fork_pause pause;
  descriptor_ = unshared_descriptor{pause, ::open(path, flags, static_cast<mode_t>(mode))};
}

bool file_locks::try_lock(std::uint64_t byte) noexcept {
  struct ::flock lock = byte_lock(F_WRLCK, byte);
  int result = 0;
  do {
    result = ::fcntl(descriptor(), F_OFD_SETLK, &lock);
  } while (result != 0 && errno == EINTR);
  return result == 0;
}

void file_locks::lock(std::uint64_t byte) noexcept {
  struct ::flock lock = byte_lock(F_WRLCK, byte);
  while (::fcntl(descriptor(), F_OFD_SETLKW, &lock) != 0 && errno == EINTR) {
  }
}

bool file_locks::lock_within(std::uint64_t byte, std::chrono::milliseconds patience) noexcept {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (!try_lock(byte)) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    sleep_a_moment();
  }
  return true;
}

void file_locks::unlock(std::uint64_t byte) noexcept {
  struct ::flock lock = byte_lock(F_UNLCK, byte);
  ::fcntl(descriptor(), F_OFD_SETLK, &lock);
}

bool file_locks::held_by_other(std::uint64_t byte) const noexcept {
  struct ::flock lock = byte_lock(F_WRLCK, byte);
  return ::fcntl(descriptor(), F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

bool file_locks::inhabited_by_other() const noexcept {
  struct ::flock lock = byte_lock(F_WRLCK, gate_byte + 1);
  lock.l_len = 0;  // to the end, wherever that is
  return ::fcntl(descriptor(), F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

boot_identity this_boot() {
  static const boot_identity known = [] {
    boot_identity read;
    constexpr const char* path = "/proc/sys/kernel/random/boot_id";
    const int file = ::open(path, O_RDONLY | O_CLOEXEC);
    // Only what stays as it is may be remembered: who once took this boot for another would be let in nowhere any more.
    if (file < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM)) {
      fail_errno(errno, std::string{"which boot this is: opening "} + path);
    }
    if (file < 0) return read;
    std::array<char, 36> text{};  // 32 digits and four dashes
    const ::ssize_t got = ::read(file, text.data(), text.size());
    ::close(file);
    if (got != static_cast<::ssize_t>(text.size())) return read;
    for (const char letter : text) {
      if (letter == '-') continue;
      const auto digit = static_cast<std::uint64_t>(letter <= '9' ? letter - '0' : letter - 'a' + 10) & 15U;
      read.high = read.high << 4U | read.low >> 60U;
      read.low = read.low << 4U | digit;
    }
    return read;
  }();
  return known;
}

std::uint32_t fork_generation() noexcept {
  // relaxed: changes only while the process has one thread.
  return estate_of_process().generation.load(std::memory_order_relaxed);
}

segment open_segment(
    const memory_name& name, open_mode mode, std::chrono::steady_clock::time_point deadline, const segment_plan& plan,
    std::size_t header_bytes,
    const std::function<verdict(std::span<const std::byte>, std::uint64_t, const file_locks&)>& examine,
    const std::function<std::size_t(std::span<const std::byte>)>& bytes_to_map) {
  const std::string path = name.path();
  const auto wait_for_it = [&] {
    if (std::chrono::steady_clock::now() >= deadline) {
      fail_errno(ENOENT, name.text() + ": expected an existing channel at " + path);
    }
    // Looked for rather than watched: inotify sees neither what comes over a network nor into a directory that is yet to
    // be made, and a look costs two microseconds.
    sleep_a_moment();
  };
  for (;;) {
    // O_NOFOLLOW: a link that somebody planted under the name leads nowhere. O_NONBLOCK: neither does a FIFO.
    segment found;
    found.locks = file_locks{path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0};
    const int descriptor = found.locks.descriptor();
    if (descriptor < 0) {
      if (errno != ENOENT) fail_to_open(name, path, errno);
      if (mode == open_mode::open) {
        wait_for_it();
        continue;
      }
      nursling made{name, plan};
      if (made.come_to_be()) return made.take();
      continue;  // somebody else was faster: open his
    }
    const body contents{name, descriptor};
    std::vector<std::byte> header(header_bytes);
    // A foreign file must stay as it is, and its locks are not ours to wait for: look before we lock.
    // (Of a companion we know by now that it is one, and its segment may be replaced at any moment.)
    if (name.scheme != memory_scheme::system_v) (void)bytes_to_map(contents.read(header).value().bytes);
    found.locks.lock(gate_byte);
    if (!still_named(path, descriptor)) continue;  // the last one left while we waited for the gate
    const auto beginning = contents.read(header);
    if (!beginning) {
      if (found.locks.inhabited_by_other()) {
        fail(errc::end_in_use, name.text() +
                                   ": expected the System V segment that somebody lives in, found that it "
                                   "was removed (ipcrm)");
      }
      if (mode == open_mode::open) {
        found = {};  // whoever makes it needs the gate
        wait_for_it();
        continue;
      }
      contents.remove("to remove what a creator left that died");
      continue;
    }
    const verdict judged = examine(beginning->bytes, beginning->size, found.locks);
    if (judged == verdict::replace) {
      contents.remove("to replace what a crash left");
      continue;
    }
    if (mode == open_mode::create) {
      fail_errno(EEXIST, name.text() + ": expected no channel at " + path + ", found one");
    }
    // Its creator died between giving it its name and taking away the one that it was made under.
    const std::string makeshift = makeshift_path(path);
    if (contents.status().st_nlink > 1 && still_named(makeshift, descriptor)) ::unlink(makeshift.c_str());
    page_wishes wishes = plan.pages;
    wishes.node.reset();  // where they are, they are; the end that enters may have them moved
    found.map = contents.map(bytes_to_map(beginning->bytes), wishes);
    found.map.furnish(wishes, name.text());
    return found;
  }
}

void remove_name(const memory_name& name, const file_locks& locks) noexcept {
  if (!still_named(name.path(), locks.descriptor())) return;
  try {
    (void)body{name, locks.descriptor()}.remove();
  } catch (const std::exception&) {
    // The segment under the key is not ours any more, or there is no memory for a path: `strait rm` is left.
  }
}

namespace {

/// Opens what is under the name, to be looked at; throws when it is no file.
segment_look open_to_look(const memory_name& name, int access) {
  const std::string path = name.path();
  segment_look look;
  // O_NOFOLLOW and O_NONBLOCK: as in open_segment.
  look.locks = file_locks{path.c_str(), access | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0};
  if (look.locks.descriptor() < 0) fail_to_open(name, path, errno);
  return look;
}

/// Whether this is the name under which another segment is being made, or was.
bool is_makeshift(const memory_name& name) {
  return name.scheme == memory_scheme::posix && name.name.starts_with(makeshift_prefix);
}

/// Whether there is a System V segment of that name, and no companion.
bool lost_its_companion(const memory_name& name) {
  struct ::stat file{};
  const auto has_none = [&] { return ::lstat(name.path().c_str(), &file) != 0 && errno == ENOENT; };
  if (name.scheme != memory_scheme::system_v || !has_none()) return false;
  const auto identifier = [&] {
    const auto found = find_system_v(name, system_v_companion::of(0), std::nullopt);
    return found ? found->identifier : -1;
  };
  // The same segment before and after, and no companion in between: they did not come or go meanwhile, because the
  // companion is there first and goes last.
  const int before = identifier();
  return before >= 0 && has_none() && identifier() == before;
}

/// Reads the beginning and the size.
void read_beginning(const memory_name& name, const body& contents, std::size_t header_bytes, segment_look& look) {
  look.header.resize(header_bytes);
  const auto beginning = contents.read(look.header);
  look.unfinished = is_makeshift(name) || !beginning;
  look.header.resize(look.unfinished ? 0 : beginning->bytes.size());
  look.size = look.unfinished ? 0 : beginning->size;
}

/// One look at what is under the name. Nothing: it was replaced meanwhile.
std::optional<segment_look> try_to_look(const memory_name& name, int access, std::size_t header_bytes) {
  segment_look look = open_to_look(name, access);
  look.gate_held = look.locks.held_by_other(gate_byte);
  // Of a System V segment only the companion tells that all of it was of one.
  const auto is_still_there = [&] {
    return name.scheme != memory_scheme::system_v || still_named(name.path(), look.locks.descriptor());
  };
  try {
    read_beginning(name, body{name, look.locks.descriptor()}, header_bytes, look);
  } catch (const std::system_error&) {
    // The key may lead to the segment of a later companion, which that of ours says nothing of.
    if (is_still_there()) throw;
    return std::nullopt;
  }
  // Once more: whoever was at the gate then may have gone, and somebody else have come to remove it.
  if (look.unfinished) look.gate_held = look.gate_held || look.locks.held_by_other(gate_byte);
  if (!is_still_there()) return std::nullopt;
  return look;
}

/// Where the file is that a process has open as `link`, whose target /proc gives as `path`; empty when it has no name.
std::string current_path(const std::filesystem::path& link, const std::filesystem::path& path) {
  namespace fs = std::filesystem;
  std::error_code gone;
  // The path may be that of another mount namespace.
  if (fs::equivalent(path, link, gone)) return path.native();
  // To its creator it is for ever the nameless file that it was, in the directory where it got its name.
  struct ::stat file{};
  if (!path.filename().native().starts_with('#') || ::stat(link.c_str(), &file) != 0) return {};
  std::error_code over;
  for (fs::directory_iterator entry{path.parent_path(), over}, end; !over && entry != end; entry.increment(over)) {
    struct ::stat named{};
    if (::lstat(entry->path().c_str(), &named) != 0) continue;
    if (named.st_ino == file.st_ino && named.st_dev == file.st_dev) return entry->path().native();
  }
  return {};
}

/// Whether anybody holds a lock as our ends do on a file outside of /dev/shm, or on memory without a
/// name: one look, where the next one below is at
/// every descriptor of every process.
bool has_locks_elsewhere() {
  struct ::stat directory{};
  std::ifstream locks{"/proc/locks"};
  if (!locks || ::stat(std::string{shm_directory}.c_str(), &directory) != 0) return true;
  for (std::string lock; std::getline(locks, lock);) {
    const std::size_t at = lock.find(" OFDLCK ");
    unsigned major = 0;
    unsigned minor = 0;
    // 1: OFDLCK ADVISORY  WRITE -1 00:1a:12345 1 1
    if (at == std::string::npos) continue;
    if (std::sscanf(lock.c_str() + at, " OFDLCK %*s %*s %*d %x:%x:", &major, &minor) != 2) return true;
    if (::makedev(major, minor) != directory.st_dev) return true;
  }
  return false;
}

/// What processes show that live in segments without a place of their own in the list.
struct shown_by_processes {
  /// The files outside of /dev/shm on which somebody holds locks as our ends do: those that live in `file:` channels are
  /// among them.
  std::set<std::string> paths;
  /// By name, because both ends show them, where /proc has what was handed over.
  std::map<std::string, std::string> handed_over;
};

/// Of processes that this user may not look into, nothing is known.
shown_by_processes look_into_processes() {
  namespace fs = std::filesystem;
  shown_by_processes found;
  if (!has_locks_elsewhere()) return found;
  std::error_code over;  // whatever ends while we look
  for (fs::directory_iterator process{"/proc", over}, end; !over && process != end; process.increment(over)) {
    if (process->path().filename().native().find_first_not_of("0123456789") != std::string::npos) continue;
    std::error_code hidden;
    for (fs::directory_iterator file{process->path() / "fd", hidden}; !hidden && file != end; file.increment(hidden)) {
      std::error_code gone;
      const std::string path = fs::read_symlink(file->path(), gone).native();
      if (gone || !path.starts_with('/') || path.starts_with(shm_directory)) continue;
      if (const auto name = name_of_handed_over(path, file->path().c_str())) {
        found.handed_over.try_emplace(name->name, file->path().native());
        continue;
      }
      std::ifstream facts{process->path() / "fdinfo" / file->path().filename()};
      bool locks = false;
      for (std::string fact; !locks && std::getline(facts, fact);) {
        locks = fact.starts_with("lock:") && fact.find(" OFDLCK ") != std::string::npos;
      }
      if (locks) found.paths.insert(current_path(file->path(), path));
    }
  }
  found.paths.erase(std::string{});
  return found;
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
    const std::string_view name = entry->d_name;
    const bool companion = name.starts_with(companion_prefix) && name.size() > companion_prefix.size();
    files.push_back({{companion ? memory_scheme::system_v : memory_scheme::posix,
                      std::string{name.substr(companion ? companion_prefix.size() : 0)}},
                     static_cast<std::uint64_t>(file.st_size)});
  }
  if (errno != 0) fail_errno(errno, "reading " + directory);
  for (std::string& label : labelled_system_v()) {
    const memory_name name{memory_scheme::system_v, std::move(label)};
    const bool known = std::ranges::any_of(
        files, [&](const named_file& file) { return file.name.scheme == name.scheme && file.name.name == name.name; });
    if (!known) files.push_back({name, 0});
  }
  const shown_by_processes shown = look_into_processes();
  for (const auto& [name, link] : shown.handed_over) files.push_back({{memory_scheme::handed_over, name}, 0, link});
  for (const std::string& path : shown.paths) {
    struct ::stat file{};
    if (::lstat(path.c_str(), &file) == 0 && S_ISREG(file.st_mode)) {
      files.push_back({{memory_scheme::file, path}, static_cast<std::uint64_t>(file.st_size)});
    }
  }
  std::ranges::sort(files, {}, [](const named_file& file) { return std::pair{file.name.name, file.name.scheme}; });
  return files;
}

segment_look look_at_segment(const memory_name& name, std::size_t header_bytes) {
  for (;;) {
    if (lost_its_companion(name)) {
      segment_look look;
      look.unfinished = true;
      return look;
    }
    if (auto look = try_to_look(name, O_RDONLY, header_bytes)) return std::move(*look);
  }
}

void remove_segment(const memory_name& name, std::size_t header_bytes,
                    const std::function<void(const segment_look&)>& examine) {
  clear_makeshift(name.path());
  for (;;) {
    if (lost_its_companion(name)) {
      // Under the gate of a new one, which goes with the nursling.
      if (nursling{name, segment_plan{}}.come_as_companion()) return;
    }
    // For writing: only then may the gate be locked.
    auto found = try_to_look(name, O_RDWR, header_bytes);
    if (!found) continue;
    segment_look& look = *found;
    examine(look);
    // Entering and leaving take microseconds; who is at the gate for longer is stopped there, and lives.
    if (!look.locks.lock_within(gate_byte, std::chrono::seconds{1})) {
      fail(errc::end_in_use,
           name.text() + ": expected a channel in which nobody lives, found somebody who is entering or leaving");
    }
    if (!still_named(name.path(), look.locks.descriptor())) continue;  // look at what is there now, if anything
    look.gate_held = false;
    const body contents{name, look.locks.descriptor()};
    read_beginning(name, contents, header_bytes, look);
    examine(look);
    contents.remove("to remove what nobody uses");
    return;
  }
}

}  // namespace strait
