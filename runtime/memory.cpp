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
#include <ctime>
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
  int error = 0;
  do {
    error = ::fallocate(descriptor, 0, 0, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  } while (error == EINTR);
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

std::size_t file_bytes(int descriptor, std::size_t bytes, const page_wishes& wishes);

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

/// Removes the name from the directory; that it is gone already is no error.
void take_name_away(const memory_name& name, ::uid_t owner, const std::string& purpose) {
  const std::string path = name.path();
  if (::unlink(path.c_str()) == 0 || errno == ENOENT) return;
  const int error = errno;
  const std::string what = name.text() + ": expected " + purpose + " at " + path + ", found a file of user " +
                           std::to_string(owner) + " that user " + std::to_string(::geteuid()) + " may not remove";
  if (error == EACCES || error == EPERM) fail(errc::no_permission, what);
  fail_errno(error, what);
}

bool still_named(const std::string& path, int descriptor) noexcept {
  struct ::stat file{};
  struct ::stat named{};
  return ::fstat(descriptor, &file) == 0 && ::lstat(path.c_str(), &named) == 0 && file.st_ino == named.st_ino &&
         file.st_dev == named.st_dev;
}

/// A hidden name beside `path`, for file systems without nameless files. Always the same for the same path, so that the
/// next creator finds what a dead one left.
std::string makeshift_path(const std::string& path) {
  std::uint64_t hash = 0xcbf2'9ce4'8422'2325;  // FNV-1a, so that the longest name has a makeshift, too
  for (const char letter : std::string_view{path}.substr(path.rfind('/') + 1)) {
    hash = (hash ^ static_cast<unsigned char>(letter)) * 0x100'0000'01b3;
  }
  std::array<char, 40> name{};
  std::snprintf(name.data(), name.size(), ".strait-new-%016llx", static_cast<unsigned long long>(hash));
  return directory_of(path) + name.data();
}

/// A segment that is being made, and the makeshift name that it has on file systems without nameless files; that name
/// is taken away by the destructor.
class nursling {
 public:
  explicit nursling(const memory_name& name, unsigned mode) : name_{name}, path_{name.path()} {
    made_.created = true;
    open_nameless(mode);
    if (made_.locks.descriptor() < 0) open_under_makeshift(mode);
    // The umask must not make a channel narrower than was asked for.
    if (::fchmod(made_.locks.descriptor(), static_cast<::mode_t>(mode)) != 0) {
      fail_errno(errno, name_.text() + ": setting its mode");
    }
  }
  nursling(const nursling&) = delete;
  nursling& operator=(const nursling&) = delete;
  ~nursling() {
    if (!makeshift_.empty()) ::unlink(makeshift_.c_str());
  }

  /// Gives it its size and contents.
  void grow(const segment_plan& plan) {
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

  [[nodiscard]] segment take() { return std::move(made_); }

 private:
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
  std::string path_;
  std::string makeshift_;
  segment made_;
};

}  // namespace

std::string memory_name::text() const {
  switch (scheme) {
    case memory_scheme::private_memory:
      return "private memory";
    case memory_scheme::posix:
      return "posix:" + name;
    case memory_scheme::file:
      return "file:" + name;
  }
  return name;
}

std::string memory_name::path() const {
  switch (scheme) {
    case memory_scheme::private_memory:
      return {};
    case memory_scheme::posix:
      return std::string{shm_directory} + name;
    case memory_scheme::file:
      return name;
  }
  return {};
}

bool memory_name::outlives_its_ends() const noexcept {
  return scheme == memory_scheme::file;
}

namespace {

/// `file:` and then a path, which may be relative.
memory_name parse_path(std::string_view path) {
  constexpr std::size_t longest = 4095;  // PATH_MAX, without the NUL
  const auto reject = [&](const std::string& found) {
    fail(errc::bad_name, "channel name \"file:" + printable(path) + "\": expected the path of a file, of 1 to " +
                             std::to_string(longest) + " bytes without NUL; found " + found);
  };
  if (path.empty()) reject("an empty path");
  if (path.find('\0') != std::string_view::npos) reject("a NUL");
  const std::string_view last = path.substr(path.rfind('/') + 1);  // all of it when there is no slash
  if (last.empty() || last == "." || last == "..") reject("a directory");
  memory_name result{.scheme = memory_scheme::file, .name = std::string{path}};
  if (path.front() != '/') {
    std::error_code error;
    const std::string here = std::filesystem::current_path(error).string();
    if (error) fail_errno(error.value(), result.text() + ": completing the path with the working directory");
    result.name.insert(0, here.ends_with('/') ? here : here + '/');
  }
  if (result.name.size() > longest) reject(std::to_string(result.name.size()) + " bytes");
  return result;
}

}  // namespace

memory_name parse_memory_name(std::string_view text) {
  memory_name result;
  if (const auto colon = text.find(':'); colon != std::string_view::npos) {
    const std::string_view scheme = text.substr(0, colon + 1);
    if (scheme == "file:") return parse_path(text.substr(colon + 1));
    if (scheme != "posix:") {
      fail(errc::unknown_scheme, "channel \"" + printable(text) +
                                     "\": expected the scheme \"posix:\" or \"file:\", or none, found \"" +
                                     printable(scheme) + "\"");
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

namespace {

std::size_t base_page() noexcept {
  static const auto bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

std::size_t round_up(std::size_t value, std::size_t step) noexcept {
  return (value + step - 1) / step * step;
}

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

/// Of a huge page that was set aside, as MAP_HUGETLB gives them; 0: the kernel has none.
std::size_t hugetlb_page() {
  static const std::size_t bytes = [] {
    std::ifstream file{"/proc/meminfo"};
    std::string line;
    constexpr std::string_view key = "Hugepagesize:";
    while (std::getline(file, line)) {
      if (!line.starts_with(key)) continue;
      return static_cast<std::size_t>(std::strtoull(line.c_str() + key.size(), nullptr, 10)) * 1024;
    }
    return std::size_t{0};
  }();
  return bytes;
}

/// The size of a page in the file behind the descriptor, where it is one of hugetlbfs; else 0.
std::size_t hugetlb_page_of(int descriptor) noexcept {
  struct ::statfs system{};
  constexpr long hugetlbfs = 0x958458f6;
  if (::fstatfs(descriptor, &system) != 0 || system.f_type != hugetlbfs) return 0;
  return static_cast<std::size_t>(system.f_bsize);
}

/// How long a new file is: huge pages must lie in it as a whole.
std::size_t file_bytes(int descriptor, std::size_t bytes, const page_wishes& wishes) {
  if (const std::size_t page = hugetlb_page_of(descriptor); page != 0) return round_up(bytes, page);
  if (wishes.kind == page_kind::automatic || transparent_page() == 0) return bytes;
  return round_up(bytes, transparent_page());
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
      if (::madvise(made.data_, extent, populate_write) == 0 || errno == EINVAL) {
        made.furnish(wishes, what);
        return made;
      }
    }
    const std::string sizes = "/sys/kernel/mm/hugepages/hugepages-" + std::to_string(page / 1024) + "kB/free_hugepages";
    reason = "no hugetlb pages: expected " + std::to_string(extent / page) + " free ones of " +
             std::to_string(page / 1024) + " KiB, found " + std::to_string(number_in(sizes, 0)) +
             " (/proc/sys/vm/nr_hugepages)";
  } else if (wishes.kind == page_kind::huge) {
    reason = "no hugetlb pages: this kernel has none";
  }
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
  if (data_ != nullptr) ::munmap(data_, extent_);
}

void mapping::populate() noexcept {
  // EINVAL: a kernel before 5.14. Where the kernel knows the call and cannot do it, touching would be a signal.
  if (::madvise(data_, extent_, populate_write) == 0 || errno != EINVAL) return;
  // Touch each page for writing without changing it, because another process may be using it. A compare-exchange, because
  // compilers turn an addition of zero whose result nobody wants into nothing at all.
  for (std::size_t at = 0; at < extent_; at += base_page()) {
    auto& word = *reinterpret_cast<std::atomic<std::uint32_t>*>(data_ + at);
    std::uint32_t same = word.load(std::memory_order_relaxed);
    while (!word.compare_exchange_weak(same, same, std::memory_order_relaxed)) {
    }
  }
}

void mapping::furnish(const page_wishes& wishes, const std::string& what) {
  const bool set_aside = wishes.kind == page_kind::huge && facts_of(data_, extent_).page_bytes > base_page();
  const bool transparent = wishes.kind != page_kind::automatic && !set_aside;
  int refused = 0;
  if (transparent) refused = ::madvise(data_, extent_, MADV_HUGEPAGE) == 0 ? 0 : errno;
  if (wishes.prefault) populate();
  if (transparent && wishes.prefault && refused == 0 && facts_of(data_, extent_).transparent_bytes < extent_) {
    // A file system in memory makes huge pages by itself only where its mount says so; asked for it, it makes them of the
    // small ones. Not before Linux 6.1.
    if (::madvise(data_, extent_, collapse) != 0) refused = errno;
    populate();  // the collapsed pages are to be mapped again
  }
  if (transparent) {
    const std::size_t had = facts_of(data_, extent_).transparent_bytes;
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
  if (!wishes.lock || ::mlock(data_, extent_) == 0) return;
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

boot_identity this_boot() noexcept {
  static const boot_identity known = [] {
    boot_identity read;
    const int file = ::open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
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
  return locks_of_process().generation.load(std::memory_order_relaxed);
}

segment open_segment(
    const memory_name& name, open_mode mode, const segment_plan& plan, std::size_t header_bytes,
    const std::function<verdict(std::span<const std::byte>, std::uint64_t, const file_locks&)>& examine,
    const std::function<std::size_t(std::span<const std::byte>)>& bytes_to_map) {
  const std::string path = name.path();
  for (;;) {
    // O_NOFOLLOW: a link that somebody planted under the name leads nowhere. O_NONBLOCK: neither does a FIFO.
    segment found;
    found.locks = file_locks{path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0};
    const int descriptor = found.locks.descriptor();
    if (descriptor < 0) {
      if (errno != ENOENT) fail_to_open(name, path, errno);
      if (mode == open_mode::open) fail_errno(ENOENT, name.text() + ": expected an existing channel at " + path);
      nursling made{name, plan.mode};
      made.grow(plan);
      if (made.give_name()) return made.take();
      continue;  // somebody else was faster: open his
    }
    struct ::stat file{};
    if (::fstat(descriptor, &file) != 0) fail_errno(errno, name.text() + ": looking at " + path);
    if (!S_ISREG(file.st_mode)) {
      fail(errc::foreign_segment,
           name.text() + ": expected a regular file at " + path + ", found " + kind_of(file.st_mode));
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
    if (!still_named(path, descriptor)) continue;  // the last one left while we waited for the gate
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
    // Its creator died between giving it its name and taking away the one that it was made under.
    const std::string makeshift = makeshift_path(path);
    if (file.st_nlink > 1 && still_named(makeshift, descriptor)) ::unlink(makeshift.c_str());
    const std::size_t bytes = bytes_to_map(seen);
    // It was allocated when it was made, but a copy of it, or one that was cut and extended, has holes.
    allocate(descriptor, bytes, true, name);
    page_wishes wishes = plan.pages;
    wishes.node.reset();  // where they are, they are; the end that enters may have them moved
    found.map = mapping::of_file(descriptor, bytes, wishes, name.text());
    found.map.furnish(wishes, name.text());
    return found;
  }
}

void remove_name(const memory_name& name, const file_locks& locks) noexcept {
  const std::string path = name.path();
  if (still_named(path, locks.descriptor())) ::unlink(path.c_str());
}

namespace {

/// Opens what is under the name, to be looked at; throws when it is no file.
segment_look open_to_look(const memory_name& name, int access) {
  const std::string path = name.path();
  segment_look look;
  // O_NOFOLLOW and O_NONBLOCK: as in open_segment.
  look.locks = file_locks{path.c_str(), access | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0};
  if (look.locks.descriptor() < 0) fail_to_open(name, path, errno);
  struct ::stat file{};
  if (::fstat(look.locks.descriptor(), &file) != 0) fail_errno(errno, name.text() + ": looking at " + path);
  if (!S_ISREG(file.st_mode)) {
    fail(errc::foreign_segment,
         name.text() + ": expected a regular file at " + path + ", found " + kind_of(file.st_mode));
  }
  return look;
}

/// Reads the beginning and the size. Returns whose file it is.
::uid_t read_beginning(const memory_name& name, std::size_t header_bytes, segment_look& look) {
  look.header.resize(header_bytes);
  const ::ssize_t got = ::pread(look.locks.descriptor(), look.header.data(), header_bytes, 0);
  if (got < 0) fail_errno(errno, name.text() + ": reading the header of " + name.path());
  look.header.resize(static_cast<std::size_t>(got));
  struct ::stat file{};
  if (::fstat(look.locks.descriptor(), &file) != 0) fail_errno(errno, name.text() + ": looking at " + name.path());
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
    if (!still_named(name.path(), look.locks.descriptor())) continue;  // look at what is there now, if anything
    look.gate_held = false;
    const ::uid_t owner = read_beginning(name, header_bytes, look);
    examine(look);
    take_name_away(name, owner, "to remove what nobody uses");
    return;
  }
}

}  // namespace strait
