module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>
export module strait.memory;

/// Segments: where the shared words live, how they come into being at once, and the locks that tell who is alive.
///
/// A named segment is a file: in a memory file system, or, to outlive everybody, in any other. Three things about it are
/// the kernel's word, not ours:
///
///  - It appears whole. It is made as a file without a name, filled, and given its name by one `linkat`; a creator that
///    dies before that leaves nothing. (A file system that knows no nameless files gets a hidden name, which the next
///    creator takes away if its maker died.)
///  - An end is alive as long as it holds the lock on its byte. The lock belongs to an open file description of its own
///    (an OFD lock), which dies with the process and with nothing else.
///  - Entering and leaving are one at a time: who holds the lock on the first byte, the gate, may do either.
///
/// A System V segment is no file and can be neither made without a name nor locked. It gets a *companion*, a small file
/// that comes to be as any segment does and carries the locks; the segment itself is made, and removed, under its gate.
export namespace strait {

enum class memory_scheme : std::uint8_t {
  /// Memory of this process alone; has no name.
  private_memory,
  /// A file in /dev/shm, as `shm_open` makes it.
  posix,
  /// System V shared memory (shmget), with its locks on a companion file in /dev/shm.
  system_v,
  /// A file of the user's, at any path: it outlives its ends and the machine's reboot.
  file,
  /// A sealed memfd that is handed over a Unix socket: it has no name, and the socket's is what people call it by.
  handed_over,
};

/// A channel's name, taken apart.
struct memory_name {
  memory_scheme scheme = memory_scheme::posix;
  /// What stands behind the scheme: a name, a path, or the name of a socket behind an '@'.
  std::string name;
  /// As the user would write it: `posix:orders`.
  ///
  /// Waits: never. Allocates: the text. Errors: `std::bad_alloc`. Complexity: linear in the name.
  [[nodiscard]] std::string text() const;
  /// Where the file is that carries its locks: `/dev/shm/orders`, for System V that of its companion; empty for memory
  /// that has no name.
  ///
  /// Waits: never. Allocates: the text. Errors: `std::bad_alloc`. Complexity: linear in the name.
  [[nodiscard]] std::string path() const;
  /// Whether the segment stays when its last end leaves, and is then the user's: never removed, never replaced.
  [[nodiscard]] bool outlives_its_ends() const noexcept;
};

/// Takes `posix:orders` apart; no scheme means `posix:`. A relative path of `file:` or `unix:` is completed with the
/// working directory, so that it goes on to mean the same file.
///
/// Waits: never. Allocates: the name. Errors: `unknown_scheme`, `bad_name`. Complexity: linear in the text.
[[nodiscard]] memory_name parse_memory_name(std::string_view text);

/// Sixteen hexadecimal digits, always the same for the last part of a path: so that the hidden name beside a file can be
/// found again, and is short however long the file's is.
///
/// Waits: never. Allocates: the text. Errors: `std::bad_alloc`. Complexity: linear in the path.
[[nodiscard]] std::string digest_of_last_part(std::string_view path);

/// The least multiple of `step` that is not less than `value`.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
[[nodiscard]] constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t step) noexcept {
  return (value + step - 1) / step * step;
}

/// What to do when the name exists, or does not.
enum class open_mode : std::uint8_t {
  /// Opens what is there, creates it otherwise.
  open_or_create,
  /// Creates it; an error when it is there.
  create,
  /// Opens what is there; an error when there is nothing, or still nothing when the patience has come to its end.
  open,
};

/// What kind of pages memory is made of.
enum class page_kind : std::uint8_t {
  /// What the system gives.
  automatic,
  /// Transparent huge pages, which the kernel makes of free memory: fewer misses in the TLB.
  transparent,
  /// Huge pages that were set aside for it (hugetlb), where the memory has them; else transparent ones.
  huge,
};
[[nodiscard]] constexpr std::string_view to_string(page_kind k) noexcept {
  switch (k) {
    case page_kind::automatic:
      return "automatic";
    case page_kind::transparent:
      return "transparent";
    case page_kind::huge:
      return "huge";
  }
  return "unknown";
}

/// What is asked of a mapping's pages.
struct page_wishes {
  /// The memory node to have them on. Default: that of whoever touches them first.
  std::optional<unsigned> node = std::nullopt;
  page_kind kind = page_kind::automatic;
  /// Whether all are touched at once, so that nobody meets a page fault later.
  bool prefault = true;
  /// Whether they are kept from being swapped out; touches them all, too.
  bool lock = false;
};

/// How many pages lie on one memory node.
struct node_share {
  unsigned node = 0;
  std::size_t pages = 0;
  friend bool operator==(const node_share&, const node_share&) = default;
};

/// What a mapping's pages turned out to be, as the kernel tells it.
struct page_report {
  /// Of address space: whole pages.
  std::size_t bytes = 0;
  /// By node, in base pages (`sysconf(_SC_PAGESIZE)`). Only what this process has touched: the kernel tells no more.
  std::vector<node_share> nodes;
  std::size_t untouched = 0;
  /// Why `nodes` is not known, where the kernel refuses to tell; else empty.
  std::string nodes_refused;
  /// Of one page: more than a base page for hugetlb. 0: /proc does not tell.
  std::size_t page_bytes = 0;
  /// How much of it is in transparent huge pages.
  std::size_t transparent_bytes = 0;
  /// How much of it cannot be swapped out.
  std::size_t locked_bytes = 0;
  /// Why less was had than was asked for; else empty.
  std::string shortfall;
};

/// The memory nodes of this machine, by the kernel's number: at least one. A machine that tells nothing is node 0.
///
/// Waits: never; the first call reads a file of /sys. Allocates: the first call. Errors: none. Complexity: constant.
[[nodiscard]] const std::vector<unsigned>& memory_nodes();

/// The memory node of the CPU on which this thread runs; empty where that has no memory or the kernel does not tell.
///
/// Waits: never. Allocates: as `memory_nodes`. Errors: none. Complexity: a system call at most.
[[nodiscard]] std::optional<unsigned> nearest_memory_node() noexcept;

/// Pages of this process's address space; unmapped by the destructor.
///
/// Waits: never. Allocates: pages, where it is said. Errors: `no_space`, or the errno of mmap, shmat and mbind, when it is
/// made; afterwards as they say. Complexity: a system call; touching is linear in the pages.
class mapping {
 public:
  mapping() = default;
  /// Anonymous memory, with what was asked of its pages.
  ///
  /// Waits: never. Allocates: `bytes` of pages, rounded up to whole ones: of huge ones where they were asked for.
  /// Errors: `no_space`; EINVAL for a node that does not exist or may not be used; what `furnish` throws; or the errno
  /// of mmap and mbind. Complexity: linear in the pages.
  [[nodiscard]] static mapping anonymous(std::size_t bytes, const page_wishes& wishes);
  /// The first `bytes` of a file, shared and writable; its pages are yet to be furnished. The mapping keeps nothing of the
  /// caller's open file description, so that locks on that end when its descriptor is closed.
  [[nodiscard]] static mapping of_file(int descriptor, std::size_t bytes, const page_wishes& wishes,
                                       const std::string& what);
  /// The first `bytes` of a System V segment, writable; its pages are yet to be furnished. `lack`: why it has no huge
  /// pages, where they were asked for and its maker knows.
  [[nodiscard]] static mapping of_system_v(int identifier, std::size_t bytes, const page_wishes& wishes,
                                           const std::string& what, const std::string& lack = {});
  inline mapping(mapping&& other) noexcept { *this = std::move(other); }
  inline mapping& operator=(mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(extent_, other.extent_);
    std::swap(shortfall_, other.shortfall_);
    return *this;
  }
  ~mapping();

  [[nodiscard]] inline std::byte* data() const noexcept { return data_; }
  /// As many bytes as were asked for.
  [[nodiscard]] inline std::size_t size() const noexcept { return bytes_; }

  /// Touches every page for writing, so that nobody meets a page fault later. Another process may be using them. False:
  /// the kernel does not have them all, and who touches one that it has not is sent a signal.
  bool populate() noexcept;
  /// Touches the pages, makes huge ones of them and locks them, as asked. A file's must be allocated.
  ///
  /// Waits: never. Allocates: pages. Errors: EPERM or ENOMEM when they cannot be locked, naming the limit. Complexity:
  /// linear.
  void furnish(const page_wishes& wishes, const std::string& what);
  /// Has the pages move to `node`, and new ones made there. Of pages that other processes have touched, too, the kernel
  /// moves only those of callers with CAP_SYS_NICE. Whoever uses them meanwhile waits for the page, and loses nothing.
  ///
  /// Waits: until they are moved. Allocates: pages there. Errors: the errno of mbind. Complexity: linear.
  [[nodiscard]] std::error_code move_to(unsigned node) noexcept;
  /// The same, for a node that somebody asked for. Where the kernel refuses, the report says so.
  ///
  /// Errors: EINVAL for a node that does not exist or may not be used.
  void ask_for_node(unsigned node, const std::string& what);
  /// Where the pages are, and of what kind.
  ///
  /// Waits: never. Allocates: the result. Errors: `std::bad_alloc`; what the kernel does not tell is said so. Complexity:
  /// linear.
  [[nodiscard]] page_report report() const;

  /// Has the file behind it be on its disk as it is now: pages and everything that is needed to find them again.
  ///
  /// Waits: for the disk. Cancel safety: cannot be cancelled. Allocates: never. Errors: what the kernel says. Complexity:
  /// linear in the pages that were written to since they were last on the disk.
  [[nodiscard]] std::error_code write_to_disk() noexcept;

  /// From now on a child made by fork has memory of its own in this place: whatever it writes here, nobody else sees. It
  /// holds the first `bytes` (4096 at most) as they were, with the changes that `change` makes, and zeros behind them.
  ///
  /// Waits: never. Allocates: an entry in a list. Errors: `std::bad_alloc`. Complexity: logarithmic in such mappings.
  void keep_from_children(std::size_t bytes, void (*change)(std::byte* data) noexcept);

 private:
  /// Maps `extent` bytes at a multiple of `align`, or anywhere (0). On failure nothing is mapped, and errno tells why.
  void map(std::size_t bytes, std::size_t extent, std::size_t align, int flags, int descriptor) noexcept;

  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  /// What is mapped: whole pages. A System V segment is attached whole, and is longer than was asked for.
  std::size_t extent_ = 0;
  std::string shortfall_;
};

/// Holds off every fork while it lives, so that a child never has a descriptor that nobody knows of. No descriptor of the
/// kind below may be closed meanwhile.
class [[nodiscard]] fork_pause {
 public:
  fork_pause();
  ~fork_pause();
  fork_pause(const fork_pause&) = delete;
  fork_pause& operator=(const fork_pause&) = delete;
};

/// A descriptor of this process alone: closed by the destructor, and in every child made by fork. What the kernel ends
/// with the last copy of a descriptor, as a lock or a connection, then ends with this process.
class unshared_descriptor {
 public:
  unshared_descriptor() = default;
  /// Takes over what was opened during the pause; a negative number is none, and errno stays as it is.
  unshared_descriptor(const fork_pause& pause, int opened);
  inline unshared_descriptor(unshared_descriptor&& other) noexcept : value_{std::exchange(other.value_, -1)} {}
  inline unshared_descriptor& operator=(unshared_descriptor&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~unshared_descriptor();

  [[nodiscard]] inline int get() const noexcept { return value_; }
  explicit inline operator bool() const noexcept { return value_ >= 0; }

 private:
  int value_ = -1;
};

/// Locks on single bytes of a file that belong to one open file description: dropped by the kernel when the process
/// ends, however it ends. In a child made by fork the descriptor is closed, which leaves the parent's locks alone.
///
/// Waits: never, but where it is said. Cancel safety: cannot be cancelled. Allocates: an entry in a list, when it is made.
/// Errors: as `errno` has them, when it is made. Complexity: one system call.
class file_locks {
 public:
  file_locks() = default;
  /// Opens the file; no descriptor, and errno set, when it cannot. The destructor drops all locks.
  file_locks(const char* path, int flags, unsigned mode);

  [[nodiscard]] inline int descriptor() const noexcept { return descriptor_.get(); }
  /// False when another description holds the byte.
  [[nodiscard]] bool try_lock(std::uint64_t byte) noexcept;
  /// Parks in the kernel until the byte is free.
  void lock(std::uint64_t byte) noexcept;
  /// The same, but not for longer than `patience`; false: somebody holds it still.
  ///
  /// Sleeps a millisecond at a time, because the kernel's wait for a lock knows no time-out.
  [[nodiscard]] bool lock_within(std::uint64_t byte, std::chrono::milliseconds patience) noexcept;
  void unlock(std::uint64_t byte) noexcept;
  /// Whether another description holds the byte.
  [[nodiscard]] bool held_by_other(std::uint64_t byte) const noexcept;
  /// Whether another description holds any byte behind the gate: somebody lives in the segment.
  [[nodiscard]] bool inhabited_by_other() const noexcept;

 private:
  unshared_descriptor descriptor_;
};

/// The byte whose lock is the gate: entering, leaving and declaring dead happen one at a time.
inline constexpr std::uint64_t gate_byte = 0;

/// The kernel's name for the time since the machine was started; all zero where /proc does not tell.
struct boot_identity {
  std::uint64_t high = 0;
  std::uint64_t low = 0;
  friend bool operator==(const boot_identity&, const boot_identity&) = default;
};

/// This boot, as /proc/sys/kernel/random/boot_id tells it: the same in every container of the machine.
///
/// Waits: never. Allocates: never. Errors: EMFILE, ENFILE or ENOMEM when there is no descriptor to read it with; the next
/// call tries again. Complexity: three system calls, once.
[[nodiscard]] boot_identity this_boot();

/// Counts the forks that led to this process; an end that was opened under another count belongs to a parent.
[[nodiscard]] std::uint32_t fork_generation() noexcept;

/// A named segment that is open and whose gate this end holds.
struct segment {
  mapping map;
  file_locks locks;
  /// Whether this call created it.
  bool created = false;
};

/// How to make a segment that is not there yet.
struct segment_plan {
  std::size_t bytes = 0;
  unsigned mode = 0600;
  /// The group that it is given to; the creator's own otherwise.
  std::optional<unsigned> group;
  /// Its `node` counts where the segment is created.
  page_wishes pages;
  /// Writes the first contents; everything else is zero.
  std::function<void(std::byte*)> fill;
};

/// What the examination of an existing segment came to.
enum class verdict : std::uint8_t {
  /// Ours to enter.
  enter,
  /// Nobody lives in it and it does not fit: take its name away and make a new one. Not for a segment that outlives its
  /// ends.
  replace,
};

/// Opens or creates a named segment and returns with its gate held. Where there is nothing to be opened, that is an error
/// from `deadline` on.
///
/// `examine` is called with the gate held, the first `min(size, header_bytes)` bytes of the file and the file's size; it
/// throws, naming both sides, when the segment is not ours to enter. `bytes_to_map` is called with the same bytes, once
/// before the gate is taken, to see that this is a segment at all, and once to tell how many bytes to map.
///
/// Waits: parks while another end is entering or leaving; until the deadline, looking again each millisecond, for what is
/// to be opened. Cancel safety: cannot be cancelled. Allocates: the segment. Errors: `no_space`, `no_permission`,
/// `foreign_segment` for what is no file, `end_in_use` for a System V segment that was removed from under its ends, what
/// `examine` throws, or the errno of the failing call. Complexity: a dozen system calls; touching the pages dominates.
[[nodiscard]] segment open_segment(const memory_name& name, open_mode mode,
                                   std::chrono::steady_clock::time_point deadline, const segment_plan& plan,
                                   std::size_t header_bytes,
                                   const std::function<verdict(std::span<const std::byte> header, std::uint64_t size,
                                                               const file_locks& locks)>& examine,
                                   const std::function<std::size_t(std::span<const std::byte> header)>& bytes_to_map);

/// Takes the name away if it still names the segment behind `locks`, and a System V segment with it. The gate must be
/// held.
///
/// Waits: never. Allocates: the path. Errors: none; what cannot be removed stays. Complexity: a few system calls.
void remove_name(const memory_name& name, const file_locks& locks) noexcept;

/// Makes the memory of a channel that is to be handed over: a memfd, really allocated, filled, and then sealed against
/// shrinking, growing and further seals, so that whoever maps it can rely on its size. `name` is what /proc shows of it.
///
/// The returned segment has an open file description of its own for its locks; `to_hand_over` is what the peer is given,
/// and is not needed here afterwards.
///
/// Waits: never. Allocates: the segment. Errors: `no_space`, or the errno of the failing call (ENOENT: no /proc).
/// Complexity: a dozen system calls; touching the pages dominates.
[[nodiscard]] segment make_sealed_segment(const memory_name& name, const segment_plan& plan,
                                          unshared_descriptor& to_hand_over);

/// Maps memory that a peer handed over, of which nothing is believed: it must be a memfd that is sealed as
/// `make_sealed_segment` does it and really allocated, so that no access to it can fault, and as long as `bytes_to_map`
/// says, or as the huge pages that hold so much. That is called with the first `header_bytes` bytes, and throws when they do not begin a channel that fits.
///
/// Waits: never. Allocates: the mapping. Errors: `foreign_segment` for any other kind of descriptor, `truncated_segment`
/// and `layout_mismatch` for a size or an allocation that does not fit the header, what `bytes_to_map` throws, or the
/// errno of the failing call. Complexity: half a dozen system calls; touching the pages dominates.
[[nodiscard]] segment enter_sealed_segment(
    const memory_name& name, int handed_over, std::size_t header_bytes,
    const std::function<std::size_t(std::span<const std::byte> header)>& bytes_to_map, page_wishes wishes);

/// Something that may be a named segment.
struct named_file {
  memory_name name;
  /// Of the file, which for System V is the companion.
  std::uint64_t size = 0;
  /// Where /proc shows it, if it was handed over; its name is that of the socket and, behind a '#', a number of its own.
  std::string link = {};
};

/// Everything that may be a named segment, by name: the files in /dev/shm, the System V segments whose companion is gone,
/// and, of processes which this user may look into, those files elsewhere that they hold a lock on, and what was handed over.
///
/// Waits: never. Allocates: the names. Errors: the errno of the failing call. Complexity: a system call a file, and two
/// for each descriptor of those processes.
[[nodiscard]] std::vector<named_file> named_files();

/// A named segment that is looked at and not entered.
struct segment_look {
  /// The file, open. Holds no lock, but for the gate where `remove_segment` made this.
  file_locks locks;
  /// The first bytes of the file, as many as were asked for and are there.
  std::vector<std::byte> header;
  /// Of the file.
  std::uint64_t size = 0;
  /// Whether somebody else was entering or leaving before anything else was looked at.
  bool gate_held = false;
  /// It has its name too early: somebody is making it, or died of it, or only half of it is left. There is no header.
  bool unfinished = false;
};

/// Looks at what is under the name, changing nothing.
///
/// Waits: never. Allocates: the header. Errors: `foreign_segment` for what is no file, `no_permission`, or the errno of
/// the failing call. Complexity: half a dozen system calls.
[[nodiscard]] segment_look look_at_segment(const memory_name& name, std::size_t header_bytes);

/// The same for a segment that was handed over, by the descriptor of a process that lives in it.
///
/// Waits: never. Allocates: the header. Errors: `foreign_segment` for what is none, or none by now, or the errno of the
/// failing call. Complexity: half a dozen system calls.
[[nodiscard]] segment_look look_at_handed_over(const memory_name& name, const std::string& link,
                                               std::size_t header_bytes);

/// Takes a segment's name away. `examine` throws when it is not to be removed; it is called before the gate is taken,
/// because a foreign file's locks are not ours to take, and again with the gate held.
///
/// Waits: at most a second, for an end that is entering or leaving. Cancel safety: cannot be cancelled. Allocates: the
/// header. Errors: what `examine` throws, `end_in_use` when the gate is not to be had, `foreign_segment` for what is no
/// file, `no_permission`, or the errno of the failing call. Complexity: a dozen system calls.
void remove_segment(const memory_name& name, std::size_t header_bytes,
                    const std::function<void(const segment_look& look)>& examine);

}  // namespace strait

// Of this room alone.
namespace strait {

/// The size of a page that is nothing special.
[[nodiscard]] std::size_t base_page() noexcept;

/// The size of the pages at the beginning of a mapping.
[[nodiscard]] std::size_t page_of_mapping(const std::byte* data);

/// Why there are no huge pages for so many bytes.
[[nodiscard]] std::string lack_of_hugetlb_pages(std::size_t bytes);

/// `fallocate` of the first `bytes` bytes. Returns an errno, or 0.
[[nodiscard]] int allocate_bytes(int descriptor, std::size_t bytes, int mode = 0) noexcept;

/// The size of a page in the file behind the descriptor, where it is one of hugetlbfs; else 0.
[[nodiscard]] std::size_t hugetlb_page_of(int descriptor) noexcept;

/// How long a file is that holds so many bytes: huge pages must lie in it as a whole.
[[nodiscard]] std::size_t file_bytes(int descriptor, std::size_t bytes, const page_wishes& wishes);

/// What the kernel has for a System V channel.
struct system_v_segment {
  int identifier = -1;
  /// Without the label at its end.
  std::uint64_t bytes = 0;
  /// How many have it attached, looking on included.
  std::uint64_t attached = 0;
  /// Whether its creator came to the end.
  bool finished = false;
  /// How many of its first bytes were copied.
  std::size_t copied = 0;
};

/// What stands in a companion. Written before it has a name, and never again.
struct system_v_companion {
  std::uint64_t magic = expected_magic;
  /// Of the segment, its label included: a segment of this length without a label is what a creator left that died.
  std::uint64_t segment_bytes = 0;
  /// The IPC namespace in which the key was given, as its inode; 0 where /proc does not tell.
  std::uint64_t ipc_namespace = 0;

  static constexpr std::uint64_t expected_magic = 0x5354'5241'4954'0b00;  // "STRAIT\v\0"
  /// For a segment of so many bytes, in this namespace.
  [[nodiscard]] static system_v_companion of(std::uint64_t bytes);
};

/// Looks for the segment under the name's key. Throws `foreign_segment` when the one there is not this channel's.
/// `owner` is whose the companion is, where there was one before; `into` is filled with its beginning.
[[nodiscard]] std::optional<system_v_segment> find_system_v(const memory_name& name,
                                                            const system_v_companion& companion,
                                                            std::optional<unsigned> owner,
                                                            std::span<std::byte> into = {});

/// Makes it. A death before the end leaves an unfinished one. The companion's gate must be held.
[[nodiscard]] mapping make_system_v(const memory_name& name, const segment_plan& plan);

/// Takes it away; those who have it attached keep it. Returns an errno, or 0; that it is gone already is no error.
[[nodiscard]] int remove_system_v(const system_v_segment& segment) noexcept;

/// The name of what a process has open as `link`, of which /proc shows `shown`; none if that is no segment that was handed
/// over.
[[nodiscard]] std::optional<memory_name> name_of_handed_over(std::string_view shown, const char* link);

/// The names on the labels of all segments that this user may read and whose companions are to be in our /dev/shm.
[[nodiscard]] std::vector<std::string> labelled_system_v();

}  // namespace strait
