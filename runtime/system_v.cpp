module;
#include <errno.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>
module strait.memory;

import strait.error;

/// System V segments: a key from the name, and a label at the end that tells whose it is.
///
/// | what                | written by                               | a SIGKILL of its writer leaves                      |
/// |---------------------|------------------------------------------|-----------------------------------------------------|
/// | the companion       | the creator, before it has a name        | nothing                                             |
/// | the segment's bytes | the creator, under the gate, label last  | a segment without label, as long as the companion says |
/// | the key             | whoever makes or removes, under the gate | a companion without segment                         |
///
/// Whoever comes next finds the gate free, and takes either away.
namespace strait {
namespace {

/// Copies from memory into which others write meanwhile: whole words as far as there are any, each read once.
void copy_shared(const std::byte* from, std::span<std::byte> into) noexcept {
  using word = std::uint64_t;
  static_assert(std::atomic<word>::is_always_lock_free && std::atomic<std::byte>::is_always_lock_free);
  // relaxed, both: nothing is concluded from the copy until it was checked.
  std::size_t at = 0;
  for (; at + sizeof(word) <= into.size(); at += sizeof(word)) {
    const word one = reinterpret_cast<const std::atomic<word>*>(from + at)->load(std::memory_order_relaxed);
    std::memcpy(into.data() + at, &one, sizeof one);
  }
  for (; at < into.size(); ++at) {
    into[at] = reinterpret_cast<const std::atomic<std::byte>*>(from + at)->load(std::memory_order_relaxed);
  }
}

/// Ends the segment. Different names may come to one key, and programs that know nothing of us use keys, too.
struct system_v_label {
  /// Stored last.
  std::atomic<std::uint64_t> magic;
  /// The file system in which the companion is: who has another /dev/shm and the same System V segments would take each
  /// of them for one whose companion is gone.
  std::uint64_t device;
  char name[256];

  static constexpr std::uint64_t expected_magic = 0x5354'5241'4954'0c00;  // "STRAIT\f\0"
};
static_assert(sizeof(system_v_label) == 272);

/// Where the label begins in a segment of so many bytes.
constexpr std::size_t label_offset(std::uint64_t segment_bytes) noexcept {
  return static_cast<std::size_t>(segment_bytes - sizeof(system_v_label)) & ~(alignof(system_v_label) - 1);
}

/// How long a segment is that holds so many bytes and a label.
constexpr std::uint64_t with_label(std::uint64_t bytes) noexcept {
  return round_up(bytes, alignof(system_v_label)) + sizeof(system_v_label);
}

::key_t key_of(std::string_view name) noexcept {
  std::uint32_t hash = 0x811c'9dc5;  // FNV-1a
  for (const char letter : name) hash = (hash ^ static_cast<unsigned char>(letter)) * 0x0100'0193;
  static_assert(IPC_PRIVATE == 0);  // never a key: it would name a new segment each time
  return static_cast<::key_t>(hash == 0 ? 1 : hash);
}

std::string shown(::key_t key) {
  std::array<char, 16> text{};
  std::snprintf(text.data(), text.size(), "0x%08x", static_cast<unsigned>(key));
  return text.data();
}

std::uint64_t this_ipc_namespace() noexcept {
  struct ::stat file{};
  return ::stat("/proc/self/ns/ipc", &file) == 0 ? file.st_ino : 0;
}

/// The file system of the companions that we see.
std::uint64_t this_device() noexcept {
  struct ::stat directory{};
  return ::stat("/dev/shm", &directory) == 0 ? directory.st_dev : 0;
}

/// An attached segment, whole.
class attachment {
 public:
  /// `flags`: SHM_RDONLY or 0. Nothing, and errno set, when it cannot be had.
  attachment(int identifier, int flags) noexcept {
    void* data = ::shmat(identifier, nullptr, flags);
    if (data != reinterpret_cast<void*>(-1)) data_ = static_cast<std::byte*>(data);
  }
  attachment(const attachment&) = delete;
  attachment& operator=(const attachment&) = delete;
  ~attachment() {
    if (data_ != nullptr) ::shmdt(data_);
  }
  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::byte* release() noexcept { return std::exchange(data_, nullptr); }

 private:
  std::byte* data_ = nullptr;
};

/// A segment that is being made. The destructor removes it, unless it came to the end.
class unfinished_segment {
 public:
  unfinished_segment() = default;
  /// `flags`: SHM_HUGETLB or 0. None, and errno set, when it cannot be had.
  unfinished_segment(::key_t key, std::uint64_t bytes, int flags) noexcept
      // Ours alone until it is whole: the mode that was asked for may forbid what its creator has to do.
      : identifier_{::shmget(key, static_cast<std::size_t>(bytes), IPC_CREAT | IPC_EXCL | 0600 | flags)} {}
  unfinished_segment(unfinished_segment&& other) noexcept : identifier_{std::exchange(other.identifier_, -1)} {}
  unfinished_segment& operator=(unfinished_segment&& other) noexcept {
    std::swap(identifier_, other.identifier_);
    return *this;
  }
  ~unfinished_segment() {
    if (identifier_ >= 0) ::shmctl(identifier_, IPC_RMID, nullptr);
  }
  explicit operator bool() const noexcept { return identifier_ >= 0; }
  [[nodiscard]] int identifier() const noexcept { return identifier_; }
  void is_whole() noexcept { identifier_ = -1; }

 private:
  int identifier_ = -1;
};

struct label_text {
  std::uint64_t device;
  std::string name;
};

/// What stands on the label of a segment that is attached; nothing where there is no label.
std::optional<label_text> read_label(const std::byte* data, std::uint64_t segment_bytes) {
  const auto* label = reinterpret_cast<const system_v_label*>(data + label_offset(segment_bytes));
  // acquire: pairs with the release in make_system_v; what comes with the label is complete. Whoever may look without
  // the gate has nothing else that would order it.
  if (label->magic.load(std::memory_order_acquire) != system_v_label::expected_magic) return std::nullopt;
  std::array<char, sizeof label->name> name{};
  std::memcpy(name.data(), label->name, name.size());
  return label_text{label->device, {name.data(), ::strnlen(name.data(), name.size())}};
}

[[noreturn]] void fail_to_attach(const memory_name& name, int identifier, int error) {
  const std::string what = name.text() + ": ";
  ::shmid_ds seen{};
  if (error == EACCES && ::shmctl(identifier, IPC_STAT, &seen) == 0) {
    std::array<char, 8> mode{};
    std::snprintf(mode.data(), mode.size(), "%04o", static_cast<unsigned>(seen.shm_perm.mode & 0777U));
    fail(errc::no_permission, what + "expected a System V segment that user " + std::to_string(::geteuid()) +
                                  " may read and write, found one of user " + std::to_string(seen.shm_perm.uid) +
                                  " with mode " + mode.data());
  }
  if (error == EACCES) {
    fail(errc::no_permission, what + "expected a System V segment under key " + shown(key_of(name.name)) +
                                  " that user " + std::to_string(::geteuid()) + " may read and write, found none");
  }
  if (error == ENOMEM) fail(errc::no_space, what + "expected address space for a System V segment, found none");
  fail_errno(error, what + "attaching System V segment " + std::to_string(identifier));
}

/// A setting of the kernel.
std::uint64_t kernel_limit(const char* which) {
  std::uint64_t value = 0;
  std::ifstream{std::string{"/proc/sys/kernel/"} + which} >> value;
  return value;
}

/// Which limit a `shmget` of so many bytes has hit.
[[noreturn]] void fail_to_make(const memory_name& name, std::uint64_t bytes, int error) {
  const std::string what = name.text() + ": ";
  const auto number = [](std::uint64_t value) { return std::to_string(value); };
  if (error == EINVAL) {
    fail(errc::no_space, what + "expected System V segments of " + number(bytes) +
                             " bytes to be allowed, found kernel.shmmax = " + number(kernel_limit("shmmax")));
  }
  if (error == ENOSPC) {
    struct ::shm_info used{};
    ::shmctl(0, SHM_INFO, reinterpret_cast<::shmid_ds*>(&used));
    const std::uint64_t most = kernel_limit("shmmni");
    if (used.used_ids >= 0 && static_cast<std::uint64_t>(used.used_ids) >= most) {
      fail(errc::no_space,
           what + "expected a free System V segment (kernel.shmmni), found all " + number(most) + " in use");
    }
    fail(errc::no_space, what + "expected " + number(bytes) + " bytes within kernel.shmall = " +
                             number(kernel_limit("shmall")) + " pages, found " + number(used.shm_tot) + " in use");
  }
  if (error == ENOMEM) {
    fail(errc::no_space, what + "expected room for a System V segment of " + number(bytes) + " bytes, found less");
  }
  fail_errno(error, what + "making a System V segment of " + number(bytes) + " bytes");
}

}  // namespace

system_v_companion system_v_companion::of(std::uint64_t bytes) {
  system_v_companion made;
  made.segment_bytes = with_label(bytes);
  made.ipc_namespace = this_ipc_namespace();
  return made;
}

std::optional<system_v_segment> find_system_v(const memory_name& name, const system_v_companion& companion,
                                              std::optional<unsigned> owner, std::span<std::byte> into) {
  if (companion.ipc_namespace != this_ipc_namespace()) {
    fail(errc::foreign_segment, name.text() + ": expected a channel of this IPC namespace (" +
                                    std::to_string(this_ipc_namespace()) + "), found one of namespace " +
                                    std::to_string(companion.ipc_namespace) + " (ipcs shows this one's segments)");
  }
  const ::key_t key = key_of(name.name);
  system_v_segment found;
  found.identifier = ::shmget(key, 0, 0);
  if (found.identifier < 0) {
    if (errno == ENOENT) return std::nullopt;
    fail_errno(errno, name.text() + ": looking for the System V segment with key " + shown(key));
  }
  const auto refuse = [&](const std::string& what) {
    fail(errc::foreign_segment, name.text() + ": expected its own System V segment under key " + shown(key) +
                                    ", found segment " + std::to_string(found.identifier) + ' ' + what);
  };
  const attachment seen{found.identifier, SHM_RDONLY};
  if (seen.data() == nullptr) {
    if (errno == EINVAL || errno == EIDRM) return std::nullopt;  // removed since
    fail_to_attach(name, found.identifier, errno);
  }
  ::shmid_ds state{};
  if (::shmctl(found.identifier, IPC_STAT, &state) != 0) {
    if (errno == EINVAL || errno == EIDRM) return std::nullopt;
    fail_errno(errno, name.text() + ": looking at System V segment " + std::to_string(found.identifier));
  }
  found.attached = state.shm_nattch - 1;  // without this look
  if (owner && state.shm_perm.uid != *owner) refuse("of user " + std::to_string(state.shm_perm.uid));
  if (state.shm_segsz < sizeof(system_v_label)) refuse("of " + std::to_string(state.shm_segsz) + " bytes");
  found.bytes = label_offset(state.shm_segsz);
  if (const auto label = read_label(seen.data(), state.shm_segsz)) {
    if (label->name != name.name) refuse("of sysv:" + label->name);
    if (label->device != this_device()) refuse("whose companion is in another /dev/shm");
    found.finished = true;
  } else if (state.shm_segsz != companion.segment_bytes ||
             std::any_of(seen.data() + label_offset(state.shm_segsz), seen.data() + label_offset(state.shm_segsz) + 8,
                         [](std::byte one) { return one != std::byte{0}; })) {
    refuse("of " + std::to_string(state.shm_segsz) + " bytes without a strait label");
  }
  found.copied = static_cast<std::size_t>(std::min<std::uint64_t>(into.size(), found.bytes));
  copy_shared(seen.data(), into.first(found.copied));
  return found;
}

mapping make_system_v(const memory_name& name, const segment_plan& plan) {
  const ::key_t key = key_of(name.name);
  const std::uint64_t bytes = with_label(plan.bytes);
  unfinished_segment segment;
  mapping made;
  std::string lack;
  if (plan.pages.kind == page_kind::huge) {
    segment = unfinished_segment{key, bytes, SHM_HUGETLB};
    if (segment) {
      made = mapping::of_system_v(segment.identifier(), plan.bytes, plan.pages, name.text());
      // A control group may hold back what the machine has. Touching then fails here; a SIGBUS would come later.
      if (!made.populate()) {
        made = {};
        segment = {};
        errno = ENOMEM;
      }
    }
    if (!segment) {
      lack = errno == EPERM
                 ? "no hugetlb pages: expected that user " + std::to_string(::geteuid()) +
                       " may have them in a System V segment (CAP_IPC_LOCK, or a group in vm.hugetlb_shm_group)"
                 : lack_of_hugetlb_pages(bytes);
    }
  }
  if (!segment) {
    segment = unfinished_segment{key, bytes, 0};
    if (!segment) {
      if (errno == EEXIST) {
        fail(errc::foreign_segment, name.text() + ": expected no System V segment under key " + shown(key) +
                                        ", found one that was made without its companion");
      }
      fail_to_make(name, bytes, errno);
    }
    made = mapping::of_system_v(segment.identifier(), plan.bytes, plan.pages, name.text(), lack);
  }
  made.furnish(plan.pages, name.text());
  ::shmid_ds state{};
  if (::shmctl(segment.identifier(), IPC_STAT, &state) != 0) {
    fail_errno(errno, name.text() + ": looking at System V segment " + std::to_string(segment.identifier()));
  }
  state.shm_perm.mode = static_cast<unsigned short>(plan.mode & 0777U);
  if (plan.group) state.shm_perm.gid = static_cast<::gid_t>(*plan.group);
  if (::shmctl(segment.identifier(), IPC_SET, &state) != 0) fail_errno(errno, name.text() + ": setting its mode");
  plan.fill(made.data());
  auto* label = ::new (static_cast<void*>(made.data() + label_offset(bytes))) system_v_label{};
  name.name.copy(label->name, sizeof label->name - 1);
  label->device = this_device();
  // release: pairs with the acquire in read_label. After everything else, because a segment with a label is whole.
  label->magic.store(system_v_label::expected_magic, std::memory_order_release);
  segment.is_whole();
  return made;
}

int remove_system_v(const system_v_segment& segment) noexcept {
  if (::shmctl(segment.identifier, IPC_RMID, nullptr) == 0 || errno == EINVAL || errno == EIDRM) return 0;
  return errno;
}

std::vector<std::string> labelled_system_v() {
  std::vector<std::string> names;
  std::ifstream table{"/proc/sysvipc/shm"};
  std::string line;
  std::getline(table, line);  // the titles
  while (std::getline(table, line)) {
    int key = 0;
    int identifier = -1;
    unsigned mode = 0;
    unsigned long long bytes = 0;
    if (std::sscanf(line.c_str(), "%d %d %o %llu", &key, &identifier, &mode, &bytes) != 4) continue;
    if (key == IPC_PRIVATE || bytes < sizeof(system_v_label)) continue;
    const attachment seen{identifier, SHM_RDONLY};
    if (seen.data() == nullptr) continue;  // not ours to read, or removed since
    ::shmid_ds state{};
    if (::shmctl(identifier, IPC_STAT, &state) != 0 || state.shm_segsz != bytes) continue;
    auto label = read_label(seen.data(), bytes);
    if (label && key_of(label->name) == key && label->device == this_device()) names.push_back(std::move(label->name));
  }
  return names;
}

mapping mapping::of_system_v(int identifier, std::size_t bytes, const page_wishes& wishes, const std::string& what,
                             const std::string& lack) {
  attachment whole{identifier, 0};
  if (whole.data() == nullptr) {
    if (errno == EACCES) fail(errc::no_permission, what + ": expected a System V segment that this user may write");
    if (errno == ENOMEM) {
      fail(errc::no_space, what + ": expected address space for " + std::to_string(bytes) + " bytes, found less");
    }
    fail_errno(errno, what + ": attaching System V segment " + std::to_string(identifier));
  }
  ::shmid_ds state{};
  if (::shmctl(identifier, IPC_STAT, &state) != 0) {
    fail_errno(errno, what + ": looking at System V segment " + std::to_string(identifier));
  }
  if (state.shm_segsz < bytes) {
    fail(errc::truncated_segment, what + ": expected a System V segment of " + std::to_string(bytes) +
                                      " bytes, found " + std::to_string(state.shm_segsz));
  }
  // munmap detaches as shmdt does, provided that all of it goes.
  mapping made;
  made.data_ = whole.release();
  made.bytes_ = bytes;
  // Nothing but the mapping itself tells of what pages it is.
  const std::size_t page = page_of_mapping(made.data_);
  made.extent_ = round_up(static_cast<std::size_t>(state.shm_segsz), page);
  if (wishes.kind == page_kind::huge && page == base_page()) {
    made.shortfall_ =
        lack.empty() ? "no hugetlb pages: expected a System V segment that was made of them, found one of small pages"
                     : lack;
  }
  if (wishes.node) made.ask_for_node(*wishes.node, what);
  return made;
}

}  // namespace strait
