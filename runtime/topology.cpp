module;
#include <errno.h>
#include <hwloc.h>
#include <sched.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>
module strait.topology;

import strait.error;

namespace strait {
namespace {

struct destroy_topology {
  void operator()(hwloc_topology* t) const noexcept { hwloc_topology_destroy(t); }
};
using hwloc_handle = std::unique_ptr<hwloc_topology, destroy_topology>;

struct free_bitmap {
  void operator()(hwloc_bitmap_s* b) const noexcept { hwloc_bitmap_free(b); }
};
using bitmap_handle = std::unique_ptr<hwloc_bitmap_s, free_bitmap>;

hwloc_handle load() {
  hwloc_topology_t raw = nullptr;
  if (hwloc_topology_init(&raw) != 0) fail_errno(errno, "hwloc_topology_init");
  hwloc_handle handle{raw};
  if (hwloc_topology_load(raw) != 0) fail_errno(errno, "hwloc_topology_load: no machine could be discovered");
  if (hwloc_topology_is_thissystem(raw)) {
    // hwloc has left out what the cgroup forbids, but not what the affinity masks do. PROCESS asks for the union over
    // all threads: one that has pinned itself says nothing about where the others may run. A process that cannot be
    // asked is taken to be free.
    const bitmap_handle bound{hwloc_bitmap_alloc()};
    if (bound && hwloc_get_cpubind(raw, bound.get(), HWLOC_CPUBIND_PROCESS) == 0) {
      hwloc_topology_restrict(raw, bound.get(), 0);
    }
  }
  return handle;
}

/// Numbers what it is shown in the order in which it is shown it.
class counter {
 public:
  unsigned number_of(hwloc_obj_t object) {
    return numbers_.try_emplace(object, static_cast<unsigned>(numbers_.size())).first->second;
  }
  unsigned size() const noexcept { return static_cast<unsigned>(numbers_.size()); }

 private:
  std::map<hwloc_obj_t, unsigned> numbers_;
};

std::string model_name(hwloc_topology_t t) {
  hwloc_obj_t package = hwloc_get_obj_by_type(t, HWLOC_OBJ_PACKAGE, 0);
  const char* model = package != nullptr ? hwloc_obj_get_info_by_name(package, "CPUModel") : nullptr;
  if (model == nullptr) model = hwloc_obj_get_info_by_name(hwloc_get_root_obj(t), "CPUModel");
  if (model == nullptr) return "unknown CPU";
  std::string name{model};
  name.erase(name.find_last_not_of(' ') + 1);  // x86 pads the brand string
  return name;
}

std::string counted(unsigned n, std::string_view one) {
  std::string text = std::to_string(n) + ' ';
  text += one;
  if (n != 1) text += 's';
  return text;
}

}  // namespace

std::string_view to_string(placement p) noexcept {
  switch (p) {
    case placement::same_cpu:
      return "same CPU";
    case placement::sibling:
      return "sibling";
    case placement::same_l3:
      return "same L3";
    case placement::same_socket:
      return "same socket";
    case placement::other_socket:
      return "other socket";
  }
  return "unknown placement";
}

topology topology::discover() {
  const hwloc_handle handle = load();
  const hwloc_topology_t t = handle.get();

  topology found;
  found.this_machine_ = hwloc_topology_is_thissystem(t) != 0;
  found.model_ = model_name(t);

  // The first node stands in where hwloc knows of none nearby: the process may use a CPU, but not its memory.
  const hwloc_obj_t first_node = hwloc_get_obj_by_type(t, HWLOC_OBJ_NUMANODE, 0);
  const unsigned fallback_node = first_node != nullptr ? first_node->os_index : 0;

  // hwloc walks the CPUs from left to right through the tree, so those of one core come one after the other.
  counter cores;
  counter l3_groups;
  counter l3_caches;
  counter sockets;
  std::vector<std::vector<cpu>> ranks;    // the first CPU of each core, the second of each, ...
  std::map<unsigned, std::size_t> taken;  // CPUs seen, by core
  for (hwloc_obj_t pu = nullptr; (pu = hwloc_get_next_obj_by_type(t, HWLOC_OBJ_PU, pu)) != nullptr;) {
    hwloc_obj_t core = hwloc_get_ancestor_obj_by_type(t, HWLOC_OBJ_CORE, pu);
    if (core == nullptr) core = pu;
    hwloc_obj_t l3 = hwloc_get_ancestor_obj_by_type(t, HWLOC_OBJ_L3CACHE, pu);
    if (l3 != nullptr) l3_caches.number_of(l3);
    hwloc_obj_t socket = hwloc_get_ancestor_obj_by_type(t, HWLOC_OBJ_PACKAGE, pu);
    if (socket == nullptr) socket = hwloc_get_root_obj(t);
    const int node = hwloc_bitmap_first(pu->nodeset);
    const cpu here{
        .id = pu->os_index,
        .core = cores.number_of(core),
        .l3 = l3_groups.number_of(l3 != nullptr ? l3 : core),
        .socket = sockets.number_of(socket),
        .node = node >= 0 ? static_cast<unsigned>(node) : fallback_node,
    };
    const std::size_t rank = taken[here.core]++;
    if (rank == ranks.size()) ranks.emplace_back();
    ranks[rank].push_back(here);
    found.cpus_.push_back(here);
  }
  found.cores_ = cores.size();
  found.l3s_ = l3_caches.size();
  found.sockets_ = sockets.size();

  std::map<unsigned, numa_node> nodes;
  for (const auto& rank : ranks) {
    for (const cpu& c : rank) {
      numa_node& node = nodes[c.node];
      node.cpus.push_back(c.id);
      if (&rank == &ranks.front()) node.cores.push_back(c.id);
    }
  }
  std::sort(found.cpus_.begin(), found.cpus_.end(), [](const cpu& a, const cpu& b) { return a.id < b.id; });
  for (auto& [id, node] : nodes) {
    node.id = id;
    if (hwloc_obj_t object = hwloc_get_numanode_obj_by_os_index(t, id); object != nullptr) {
      node.memory = object->attr->numanode.local_memory;
    }
    found.nodes_.push_back(std::move(node));
  }
  return found;
}

const topology& topology::machine() {
  static const topology instance = discover();
  return instance;
}

const cpu* topology::find(unsigned id) const noexcept {
  const auto at =
      std::lower_bound(cpus_.begin(), cpus_.end(), id, [](const cpu& c, unsigned wanted) { return c.id < wanted; });
  return at != cpus_.end() && at->id == id ? &*at : nullptr;
}

std::string topology::describe() const {
  std::string line = this_machine_ ? model_ : "synthetic";
  line += ": " + counted(cpu_count(), "CPU") + ", " + counted(cores_, "core") + ", ";
  line += l3s_ == 0 ? std::string{"L3 unknown"} : counted(l3s_, "L3");
  line += ", " + counted(sockets_, "socket") + ", " + counted(static_cast<unsigned>(nodes_.size()), "node");
  return line;
}

std::error_code pin_this_thread(unsigned cpu) {
  const topology& machine = topology::machine();
  if (!machine.is_this_machine()) return std::make_error_code(std::errc::operation_not_supported);
  if (machine.find(cpu) == nullptr) return std::make_error_code(std::errc::invalid_argument);
  // A fixed cpu_set_t ends at CPU 1023.
  struct free_set {
    void operator()(cpu_set_t* s) const noexcept { CPU_FREE(s); }
  };
  const std::unique_ptr<cpu_set_t, free_set> set{CPU_ALLOC(cpu + 1)};
  if (!set) return std::make_error_code(std::errc::not_enough_memory);
  const std::size_t size = CPU_ALLOC_SIZE(cpu + 1);
  CPU_ZERO_S(size, set.get());
  CPU_SET_S(cpu, size, set.get());
  // 0 means the calling thread, not the process.
  if (::sched_setaffinity(0, size, set.get()) != 0) return {errno, std::system_category()};
  return {};
}

int this_cpu() noexcept {
  return ::sched_getcpu();
}

std::optional<unsigned> node_of_cpu(unsigned cpu) {
  // The kernel links a CPU's folder to that of its node under the name "node1".
  std::error_code error;
  const std::filesystem::path folder{"/sys/devices/system/cpu/cpu" + std::to_string(cpu)};
  for (std::filesystem::directory_iterator entry{folder, error}, end_of_folder; !error && entry != end_of_folder;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    constexpr std::string_view prefix = "node";
    unsigned node = 0;
    if (!name.starts_with(prefix)) continue;
    const char* const end = name.data() + name.size();
    const auto parsed = std::from_chars(name.data() + prefix.size(), end, node);
    if (parsed.ec == std::errc{} && parsed.ptr == end) return node;
  }
  return std::nullopt;
}

}  // namespace strait
