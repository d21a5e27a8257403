#include "placement.hpp"

#include <sched.h>

#include <cerrno>
#include <fstream>
#include <system_error>
#include <vector>

#include <fmt/format.h>

namespace bench {
namespace {

// The topology room knows more; but the baselines must be pinned the same way on a machine where strait is what fails.
std::string read_line(const std::string& path) {
  std::ifstream file{path};
  std::string line;
  std::getline(file, line);
  return line;
}

struct cpu {
  unsigned number;
  std::string core;
  std::string package;
  std::string last_cache;
};

cpu describe(unsigned number) {
  const std::string base = fmt::format("/sys/devices/system/cpu/cpu{}/", number);
  cpu found{.number = number,
            .core = read_line(base + "topology/thread_siblings_list"),
            .package = read_line(base + "topology/physical_package_id"),
            .last_cache = {}};
  for (unsigned i = 0; i < 10; ++i) {
    const std::string cache = fmt::format("{}cache/index{}/", base, i);
    if (read_line(cache + "level") == "3") found.last_cache = read_line(cache + "shared_cpu_list");
  }
  // Without /sys each CPU passes for a core: the kernel that hides it is a sandbox's, and it says nothing else.
  if (found.core.empty()) found.core = fmt::format("{}", number);
  return found;
}

int distance(const cpu& a, const cpu& b) {
  if (a.core == b.core) return 3;
  if (!a.last_cache.empty() && a.last_cache == b.last_cache) return 0;
  if (a.package == b.package) return 1;
  return 2;
}

std::string words(const cpu& a, const cpu& b) {
  switch (distance(a, b)) {
    case 0:
      return "different cores, same L3";
    case 1:
      return a.last_cache.empty() ? "different cores, L3 unknown" : "different cores, different L3";
    case 2:
      return "different sockets";
    default:
      return "siblings of one core";
  }
}

}  // namespace

placement choose_placement() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof set, &set) != 0) {
    throw std::system_error{errno, std::system_category(), "cannot ask which CPUs this process may use"};
  }
  std::vector<cpu> cpus;
  for (unsigned i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &set)) cpus.push_back(describe(i));
  }
  if (cpus.size() == 1) return {cpus[0].number, cpus[0].number, "one CPU"};
  const cpu* first = &cpus[0];
  const cpu* second = &cpus[1];
  for (const cpu& other : cpus) {
    if (&other != first && distance(*first, other) < distance(*first, *second)) second = &other;
  }
  return {first->number, second->number, words(*first, *second)};
}

void pin_to(unsigned cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  if (::sched_setaffinity(0, sizeof set, &set) != 0) {
    throw std::system_error{errno, std::system_category(), fmt::format("cannot pin to CPU {}", cpu)};
  }
}

}  // namespace bench
