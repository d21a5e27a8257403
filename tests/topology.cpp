#include <doctest/doctest.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <limits>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

import strait.topology;

namespace {

using strait::between;
using strait::placement;
using strait::topology;

/// The machine that hwloc makes up from this description.
topology synthetic(const char* description) {
  ::setenv("HWLOC_SYNTHETIC", description, 1);
  topology t = topology::discover();
  ::unsetenv("HWLOC_SYNTHETIC");
  REQUIRE(!t.is_this_machine());
  return t;
}

using ids = std::vector<unsigned>;

/// The exit status of this program, run anew with that one skipped case after `prepare()`; a process discovers its
/// `machine()` once, and what a sanitizer started has the affinity mask of its beginnings.
template <class Prepare>
int status_of(const char* skipped_case, Prepare prepare) {
  const std::string filter = std::string{"--test-case="} + skipped_case;
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    if (!prepare()) ::_exit(126);
    ::execl("/proc/self/exe", "test-topology", "--no-skip", filter.c_str(), static_cast<char*>(nullptr));
    ::_exit(127);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  return WEXITSTATUS(status);
}

}  // namespace

TEST_CASE("a machine of one node without hardware threads") {
  const topology t = synthetic("core:4 pu:1");
  CHECK(t.cpu_count() == 4);
  CHECK(t.core_count() == 4);
  CHECK(t.socket_count() == 1);
  REQUIRE(t.nodes().size() == 1);
  CHECK(t.nodes()[0].id == 0);
  CHECK(t.nodes()[0].cpus == ids{0, 1, 2, 3});
  CHECK(t.nodes()[0].cores == ids{0, 1, 2, 3});
}

TEST_CASE("two nodes with hardware threads: the first CPU of each core comes first") {
  const topology t = synthetic("node:2 core:4 pu:2");
  CHECK(t.cpu_count() == 16);
  CHECK(t.core_count() == 8);
  REQUIRE(t.nodes().size() == 2);
  CHECK(t.nodes()[0].cores == ids{0, 2, 4, 6});
  CHECK(t.nodes()[0].cpus == ids{0, 2, 4, 6, 1, 3, 5, 7});
  CHECK(t.nodes()[1].id == 1);
  CHECK(t.nodes()[1].cores == ids{8, 10, 12, 14});
  CHECK(t.nodes()[1].memory > 0);
  CHECK(t.find(9)->node == 1);
}

TEST_CASE("siblings are recognised by their core, not by their numbers") {
  // As Linux numbers them on most machines: the second threads after all the first ones.
  const topology t = synthetic("core:4 pu:2(indexes=0,4,1,5,2,6,3,7)");
  REQUIRE(t.nodes().size() == 1);
  CHECK(t.nodes()[0].cpus == ids{0, 1, 2, 3, 4, 5, 6, 7});
  CHECK(t.nodes()[0].cores == ids{0, 1, 2, 3});
  CHECK(between(*t.find(1), *t.find(5)) == placement::sibling);
  CHECK(between(*t.find(0), *t.find(1)) != placement::sibling);
}

TEST_CASE("two sockets with two L3 groups each: every placement occurs") {
  const topology t = synthetic("pack:2 [numa] l3:2 core:2 pu:2");
  CHECK(t.cpu_count() == 16);
  CHECK(t.core_count() == 8);
  CHECK(t.l3_count() == 4);
  CHECK(t.socket_count() == 2);
  CHECK(t.nodes().size() == 2);
  const strait::cpu& first = *t.find(0);
  CHECK(between(first, *t.find(0)) == placement::same_cpu);
  CHECK(between(first, *t.find(1)) == placement::sibling);
  CHECK(between(first, *t.find(2)) == placement::same_l3);
  CHECK(between(first, *t.find(4)) == placement::same_socket);
  CHECK(between(first, *t.find(8)) == placement::other_socket);
  CHECK(between(*t.find(8), first) == placement::other_socket);
  CHECK(t.describe() == "synthetic: 16 CPUs, 8 cores, 4 L3s, 2 sockets, 2 nodes");
}

TEST_CASE("several nodes in one socket") {
  const topology t = synthetic("pack:2 numa:2 l3:1 core:2 pu:1");
  REQUIRE(t.nodes().size() == 4);
  CHECK(t.socket_count() == 2);
  CHECK(between(*t.find(0), *t.find(2)) == placement::same_socket);
}

TEST_CASE("without a known L3 cache no two cores share one") {
  const topology t = synthetic("pack:1 core:2 pu:2");
  CHECK(t.l3_count() == 0);
  CHECK(between(*t.find(0), *t.find(1)) == placement::sibling);
  CHECK(between(*t.find(0), *t.find(2)) == placement::same_socket);
  CHECK(t.describe() == "synthetic: 4 CPUs, 2 cores, L3 unknown, 1 socket, 1 node");
}

TEST_CASE("a second memory beside the same CPUs is no node to work on") {
  const topology t = synthetic("pack:2 [numa] [numa] core:2 pu:1");
  REQUIRE(t.nodes().size() == 2);
  CHECK(t.nodes()[0].cpus == ids{0, 1});
  CHECK(t.nodes()[1].cpus == ids{2, 3});
  CHECK(t.nodes()[0].id != t.nodes()[1].id);
}

TEST_CASE("a node tells how much memory it has") {
  const topology t = synthetic("pack:2 [numa(memory=4294967296)] core:2 pu:1");
  REQUIRE(t.nodes().size() == 2);
  CHECK(t.nodes()[1].cpus == ids{2, 3});
  CHECK(t.nodes()[1].memory == 4294967296);
}

TEST_CASE("placements have names") {
  CHECK(to_string(placement::same_cpu) == "same CPU");
  CHECK(to_string(placement::sibling) == "sibling");
  CHECK(to_string(placement::same_l3) == "same L3");
  CHECK(to_string(placement::same_socket) == "same socket");
  CHECK(to_string(placement::other_socket) == "other socket");
}

TEST_CASE("this machine: every CPU that the process may use, once, in one node") {
  const topology& t = topology::machine();
  CHECK(&t == &topology::machine());
  REQUIRE(t.is_this_machine());
  CHECK(t.describe().find(" CPU") != std::string::npos);
  MESSAGE(t.describe());

  cpu_set_t allowed;
  REQUIRE(::sched_getaffinity(0, sizeof allowed, &allowed) == 0);
  CHECK(t.cpu_count() == static_cast<unsigned>(CPU_COUNT(&allowed)));
  std::set<unsigned> in_nodes;
  for (const auto& node : t.nodes()) {
    CHECK(!node.cores.empty());
    CHECK(ids(node.cpus.begin(), node.cpus.begin() + static_cast<long>(node.cores.size())) == node.cores);
    for (const unsigned id : node.cpus) {
      CHECK(in_nodes.insert(id).second);
      REQUIRE(t.find(id) != nullptr);
      CHECK(t.find(id)->node == node.id);
      CHECK(CPU_ISSET(id, &allowed));
    }
  }
  CHECK(in_nodes.size() == t.cpu_count());
}

// Run by the case below.
TEST_CASE("child: narrowed to one CPU" * doctest::skip()) {
  const topology& t = topology::machine();
  CHECK(t.cpu_count() == 1);
  CHECK(t.core_count() == 1);
  CHECK(t.nodes().size() == 1);
  CHECK(strait::this_cpu() == static_cast<int>(t.cpus()[0].id));
}

TEST_CASE("a narrowed affinity mask narrows the machine") {
  const unsigned last = topology::machine().cpus().back().id;
  CHECK(status_of("child: narrowed to one CPU", [last] {
          cpu_set_t one;
          CPU_ZERO(&one);
          CPU_SET(last, &one);
          return ::sched_setaffinity(0, sizeof one, &one) == 0;
        }) == 0);
}

TEST_CASE("a pinned thread runs on its CPU and on no other") {
  for (const auto& cpu : topology::machine().cpus()) {
    // A thread of its own, so that the others stay free.
    std::thread{[&cpu] {
      CHECK(!strait::pin_this_thread(cpu.id));
      cpu_set_t now;
      REQUIRE(::sched_getaffinity(0, sizeof now, &now) == 0);
      CHECK(CPU_COUNT(&now) == 1);
      CHECK(CPU_ISSET(cpu.id, &now));
      CHECK(strait::this_cpu() == static_cast<int>(cpu.id));
    }}.join();
  }
}

TEST_CASE("pinning to a CPU that does not exist is refused and changes nothing") {
  cpu_set_t before;
  cpu_set_t after;
  REQUIRE(::sched_getaffinity(0, sizeof before, &before) == 0);
  const unsigned beyond = topology::machine().cpus().back().id + 1;
  CHECK(topology::machine().find(beyond) == nullptr);
  CHECK(strait::pin_this_thread(beyond) == std::errc::invalid_argument);
  CHECK(strait::pin_this_thread(std::numeric_limits<unsigned>::max()) == std::errc::invalid_argument);
  REQUIRE(::sched_getaffinity(0, sizeof after, &after) == 0);
  CHECK(CPU_EQUAL(&before, &after));
}

// Run by the case below.
TEST_CASE("child: pinning on a synthetic machine" * doctest::skip()) {
  REQUIRE(!topology::machine().is_this_machine());
  CHECK(topology::machine().cpu_count() == 2);
  CHECK(strait::pin_this_thread(0) == std::errc::operation_not_supported);
}

TEST_CASE("on a synthetic machine nothing is pinned") {
  CHECK(status_of("child: pinning on a synthetic machine",
                  [] { return ::setenv("HWLOC_SYNTHETIC", "core:2 pu:1", 1) == 0; }) == 0);
}
