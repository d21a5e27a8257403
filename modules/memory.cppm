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
export namespace strait {

enum class memory_scheme : std::uint8_t {
  /// Memory of this process alone; has no name.
  private_memory,
  /// A file in /dev/shm, as `shm_open` makes it.
  posix,
  /// A file of the user's, at any path: it outlives its ends and the machine's reboot.
  file,
};

/// A channel's name, taken apart.
struct memory_name {
  memory_scheme scheme = memory_scheme::posix;
  /// What stands behind the scheme: a name in /dev/shm, or a path.
  std::string name;
  /// As the user would write it: `posix:orders`.
  [[nodiscard]] std::string text() const;
  /// Where its file is: `/dev/shm/orders`; empty for private memory.
  [[nodiscard]] std::string path() const;
  /// Whether the segment stays when its last end leaves, and is then the user's: never removed, never replaced.
  [[nodiscard]] bool outlives_its_ends() const noexcept;
};

/// Takes `posix:orders` apart; no scheme means `posix:`. A relative path of `file:` is completed with the working
/// directory, so that it goes on to mean the same file.
///
/// Waits: never. Allocates: the name. Errors: `unknown_scheme`, `bad_name`. Complexity: linear in the text.
[[nodiscard]] memory_name parse_memory_name(std::string_view text);

/// What to do when the name exists, or does not.
enum class open_mode : std::uint8_t {
  /// Opens what is there, creates it otherwise.
  open_or_create,
  /// Creates it; an error when it is there.
  create,
  /// Opens what is there; an error when there is nothing.
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
/// Waits: never. Allocates: never. Errors: none. Complexity: a system call at most.
[[nodiscard]] std::optional<unsigned> nearest_memory_node() noexcept;

/// Pages of this process's address space; unmapped by the destructor.
class mapping {
 public:
  mapping() = default;
  /// Anonymous memory, with what was asked of its pages.
  ///
  /// Waits: never. Allocates: `bytes` of pages, rounded up to whole ones: of huge ones where they were asked for.
  /// Errors: `no_space`; EINVAL for a node that does not exist or may not be used; what `furnish` throws; or the errno
  /// of mmap and mbind.
  [[nodiscard]] static mapping anonymous(std::size_t bytes, const page_wishes& wishes);
  /// The first `bytes` of a file, shared and writable; its pages are yet to be furnished. The mapping keeps nothing of the
  /// caller's open file description, so that locks on that end when its descriptor is closed.
  [[nodiscard]] static mapping of_file(int descriptor, std::size_t bytes, const page_wishes& wishes,
                                       const std::string& what);
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

  /// Touches every page for writing, so that nobody meets a page fault later. Another process may be using them.
  void populate() noexcept;
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

 private:
  /// Maps `extent` bytes at a multiple of `align`, or anywhere (0). On failure nothing is mapped, and errno tells why.
  void map(std::size_t bytes, std::size_t extent, std::size_t align, int flags, int descriptor) noexcept;

  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  /// What is mapped: whole pages.
  std::size_t extent_ = 0;
  std::string shortfall_;
};

/// Locks on single bytes of a file that belong to one open file description: dropped by the kernel when the process
/// ends, however it ends. In a child made by fork the descriptor is closed, which leaves the parent's locks alone.
class file_locks {
 public:
  file_locks() = default;
  /// Opens the file; no descriptor, and errno set, when it cannot. No fork comes between the opening and the entry in the
  /// list of what a child closes: a child that kept the descriptor would keep the locks after our death.
  file_locks(const char* path, int flags, unsigned mode);
  file_locks(file_locks&& other) noexcept;
  file_locks& operator=(file_locks&& other) noexcept;
  /// Drops all locks.
  ~file_locks();

  [[nodiscard]] inline int descriptor() const noexcept { return descriptor_; }
  /// False when another description holds the byte.
  [[nodiscard]] bool try_lock(std::uint64_t byte) noexcept;
  /// Waits: parks in the kernel until the byte is free.
  void lock(std::uint64_t byte) noexcept;
  /// The same, but not for longer than `patience`; false: somebody holds it still.
  ///
  /// Waits: sleeps a millisecond at a time, because the kernel's wait for a lock knows no time-out.
  [[nodiscard]] bool lock_within(std::uint64_t byte, std::chrono::milliseconds patience) noexcept;
  void unlock(std::uint64_t byte) noexcept;
  /// Whether another description holds the byte.
  [[nodiscard]] bool held_by_other(std::uint64_t byte) const noexcept;

 private:
  int descriptor_ = -1;
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
/// Waits: never. Allocates: never. Errors: none. Complexity: three system calls, once.
[[nodiscard]] boot_identity this_boot() noexcept;

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

/// Opens or creates a named segment and returns with its gate held.
///
/// `examine` is called with the gate held, the first `min(size, header_bytes)` bytes of the file and the file's size; it
/// throws, naming both sides, when the segment is not ours to enter. `bytes_to_map` is called with the same bytes, once
/// before the gate is taken, to see that this is a segment at all, and once to tell how many bytes to map.
///
/// Waits: parks while another end is entering or leaving. Allocates: the segment. Errors: `no_space`, `no_permission`,
/// `foreign_segment` for what is no file, what `examine` throws, or the errno of the failing call. Complexity: a dozen system calls; touching the pages dominates.
[[nodiscard]] segment open_segment(const memory_name& name, open_mode mode, const segment_plan& plan,
                                   std::size_t header_bytes,
                                   const std::function<verdict(std::span<const std::byte> header, std::uint64_t size,
                                                               const file_locks& locks)>& examine,
                                   const std::function<std::size_t(std::span<const std::byte> header)>& bytes_to_map);

/// Takes the name away if it still names the segment behind `locks`. The gate must be held.
void remove_name(const memory_name& name, const file_locks& locks) noexcept;

/// A file where named segments lie.
struct named_file {
  memory_name name;
  std::uint64_t size = 0;
};

/// Every file that may be a named segment, by name.
///
/// Waits: never. Allocates: the names. Errors: the errno of the failing call. Complexity: a system call a file.
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
};

/// Looks at what is under the name, changing nothing.
///
/// Waits: never. Allocates: the header. Errors: `foreign_segment` for what is no file, `no_permission`, or the errno of
/// the failing call. Complexity: half a dozen system calls.
[[nodiscard]] segment_look look_at_segment(const memory_name& name, std::size_t header_bytes);

/// Takes a segment's name away. `examine` throws when it is not to be removed; it is called before the gate is taken,
/// because a foreign file's locks are not ours to take, and again with the gate held.
///
/// Waits: at most a second, for an end that is entering or leaving. Allocates: the header. Errors: what `examine` throws,
/// `end_in_use` when the gate is not to be had, `foreign_segment` for what is no file, `no_permission`, or the errno of
/// the failing call. Complexity: a dozen system calls.
void remove_segment(const memory_name& name, std::size_t header_bytes,
                    const std::function<void(const segment_look& look)>& examine);

}  // namespace strait
