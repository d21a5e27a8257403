module;
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>
export module strait.topology;

/// The machine as this process may use it: CPUs, cores, L3 caches, sockets, NUMA nodes; and pinning threads.
///
/// What is found here is numbered in two ways. CPUs and NUMA nodes carry the kernel's numbers, since that is what
/// affinity masks and mbind take; these may have gaps. Cores, L3 groups and sockets are counted from 0 within one
/// `topology` and mean nothing outside it.
export namespace strait {

/// One CPU: a hardware thread, as the kernel counts them.
struct cpu {
  /// The kernel's number.
  unsigned id = 0;
  unsigned core = 0;
  /// CPUs with the same value share an L3 cache. Where none is known, each core is a group of its own.
  unsigned l3 = 0;
  unsigned socket = 0;
  /// The kernel's number of the NUMA node whose memory is local; the lowest if there are several.
  unsigned node = 0;

  bool operator==(const cpu&) const = default;
};

/// A NUMA node that has CPUs.
struct numa_node {
  /// The kernel's number.
  unsigned id = 0;
  /// The kernel's numbers of its CPUs: the first CPU of each core, then the second of each, and so on. Whoever fills
  /// them from the front shares a core only when every core is taken.
  std::vector<unsigned> cpus;
  /// The first CPU of each core: the beginning of `cpus`.
  std::vector<unsigned> cores;
  /// Bytes of memory. 0: the node has none, or this process may not use it, and memory comes from elsewhere.
  std::uint64_t memory = 0;
};

/// How near two CPUs are to each other, nearest first.
enum class placement {
  same_cpu,
  /// Two hardware threads of one core.
  sibling,
  same_l3,
  same_socket,
  other_socket,
};

/// The nearest thing that two CPUs of one `topology` share.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
[[nodiscard]] inline placement between(const cpu& a, const cpu& b) noexcept {
  if (a.id == b.id) return placement::same_cpu;
  if (a.core == b.core) return placement::sibling;
  if (a.l3 == b.l3) return placement::same_l3;
  if (a.socket == b.socket) return placement::same_socket;
  return placement::other_socket;
}

/// The name of a placement as it stands in tables: "same CPU", "sibling", "same L3", "same socket", "other socket".
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
[[nodiscard]] std::string_view to_string(placement p) noexcept;

/// What hwloc knows about the machine, narrowed to the CPUs that this process may use. A value: once made it does not
/// change and may be read by any number of threads.
///
/// Narrowed means: by the cgroup's cpuset and by the affinity masks of the process's threads, at the time of the
/// discovery. A CPU quota (cpu.max) takes away time, not CPUs, and does not show.
class topology {
 public:
  /// The machine, discovered by the first call. A program that narrows its own affinity mask should have called this
  /// before.
  ///
  /// Waits: the first call reads /sys, milliseconds; others that come meanwhile wait for it. Cancel safety: cannot be
  /// cancelled. Allocates: the first call. Errors: those of `discover`, from the first call; the next tries again.
  /// Complexity: constant, but for the first.
  [[nodiscard]] static const topology& machine();

  /// Looks at the machine now. hwloc's environment variables are honoured, so that `HWLOC_SYNTHETIC="pack:2 [numa]
  /// core:4 pu:2"` gives a machine that does not exist (`is_this_machine`).
  ///
  /// Waits: reads /sys, milliseconds. Cancel safety: cannot be cancelled. Allocates: yes. Errors: throws
  /// `std::system_error` with the errno of hwloc when it finds no machine at all. Complexity: linear in CPUs times depth.
  [[nodiscard]] static topology discover();

  /// False when hwloc was told to describe another machine. Then nothing can be pinned.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: constant.
  [[nodiscard]] inline bool is_this_machine() const noexcept { return this_machine_; }

  /// The NUMA nodes that have CPUs this process may use, by the kernel's number; at least one. A machine that tells
  /// nothing about NUMA is one node. Nodes with memory only (CXL, or HBM beside the DRAM of the same CPUs) are left
  /// out: nothing can run there. CPUs whose own node this process may not use belong to the first node.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: constant.
  [[nodiscard]] inline const std::vector<numa_node>& nodes() const noexcept { return nodes_; }

  /// The CPUs, by the kernel's number; at least one.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: constant.
  [[nodiscard]] inline const std::vector<cpu>& cpus() const noexcept { return cpus_; }

  /// How many CPUs, cores, L3 caches (0: not known) and sockets there are.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: constant.
  [[nodiscard]] inline unsigned cpu_count() const noexcept { return static_cast<unsigned>(cpus_.size()); }
  [[nodiscard]] inline unsigned core_count() const noexcept { return cores_; }
  [[nodiscard]] inline unsigned l3_count() const noexcept { return l3s_; }
  [[nodiscard]] inline unsigned socket_count() const noexcept { return sockets_; }

  /// The CPU of that number, or null when this process may not use it or it does not exist.
  ///
  /// Waits: never. Allocates: never. Errors: none. Complexity: logarithmic in CPUs.
  [[nodiscard]] const cpu* find(unsigned id) const noexcept;

  /// One line for people: model, CPUs, cores, L3 caches, sockets, nodes. "AMD EPYC: 2 CPUs, 2 cores, 1 L3, 1 socket, 1
  /// node". Begins with "synthetic" when this is not the machine.
  ///
  /// Waits: never. Allocates: the string. Errors: none. Complexity: constant.
  [[nodiscard]] std::string describe() const;

 private:
  topology() = default;

  std::vector<cpu> cpus_;
  std::vector<numa_node> nodes_;
  std::string model_;
  unsigned cores_ = 0;
  unsigned l3s_ = 0;
  unsigned sockets_ = 0;
  bool this_machine_ = false;
};

/// Binds the calling thread to one CPU of `topology::machine()`. Threads that it starts later inherit the binding.
///
/// Waits: never, but for the first call of `topology::machine()`. Allocates: no more than that call.
/// Errors: `std::errc::invalid_argument` when `machine()` has no such CPU; `std::errc::operation_not_supported` when
/// `machine()` is not this machine, so that a program run under HWLOC_SYNTHETIC may ignore it; else the kernel's errno.
/// In each case the thread stays where it was. Complexity: one system call.
[[nodiscard]] std::error_code pin_this_thread(unsigned cpu);

/// The kernel's number of the CPU on which the calling thread runs at this moment; -1 when the kernel does not tell.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant, no system call.
[[nodiscard]] int this_cpu() noexcept;

/// The NUMA node of a CPU, also of one that this process may not use; empty when the kernel does not tell.
///
/// Waits: never; looks into /sys. Allocates: a path. Errors: `std::bad_alloc`. Complexity: linear in nodes.
[[nodiscard]] std::optional<unsigned> node_of_cpu(unsigned cpu);

}  // namespace strait
