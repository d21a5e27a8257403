/// What needs two memory nodes. Runs in a machine that QEMU makes up (numa.sh): nodes 0 and 1 with two CPUs each, and huge
/// pages set aside. Elsewhere every case fails.
#include <doctest/doctest.h>
#include <errno.h>
#include <hwloc.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <future>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "less_rights.hpp"
#include "other_process.hpp"
#include "segment_files.hpp"

import strait;

using test::channel_name;

namespace {

using message = std::uint64_t;
constexpr unsigned node_count = 2;
constexpr std::size_t capacity = 8192;  // 16 pages

/// The first CPU of a node, as the kernel's own file says.
unsigned cpu_of(unsigned node) {
  std::ifstream file{"/sys/devices/system/node/node" + std::to_string(node) + "/cpulist"};
  unsigned first = 0;
  file >> first;
  return first;
}

/// Does something on a CPU of the node, and waits for it.
template <class Work>
void on_node(unsigned node, Work work) {
  std::thread{[&] {
    REQUIRE_FALSE(strait::pin_this_thread(cpu_of(node)));
    work();
  }}.join();
}

/// The nodes of these pages, asked of the kernel by this test itself. -1: this process has not touched it.
std::set<int> nodes_of(const std::byte* data, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::set<int> found;
  for (std::size_t at = 0; at < bytes; at += page) {
    void* address = const_cast<std::byte*>(data) + at;
    int status = -1;
    REQUIRE(::syscall(SYS_move_pages, 0, 1UL, &address, nullptr, &status, 0) == 0);
    found.insert(status < 0 ? -1 : status);
  }
  return found;
}

std::byte* slots_of(const strait::endpoint& end) {
  return reinterpret_cast<std::byte*>(strait::slots_of<message>(end.lane()));
}

std::set<int> nodes_of(const strait::endpoint& end) {
  return nodes_of(slots_of(end), end.capacity() * sizeof(message));
}

std::set<int> only(unsigned node) {
  return {static_cast<int>(node)};
}

std::unique_ptr<strait::endpoint> open(strait::role mine, const std::string& name,
                                       std::optional<unsigned> node = std::nullopt) {
  return strait::endpoint::open(mine, name, strait::shape_of<message>, {.capacity = capacity, .node = node});
}

}  // namespace

TEST_CASE("numa: the topology sees both nodes, as the kernel and hwloc do") {
  const auto& nodes = strait::topology::machine().nodes();
  REQUIRE(nodes.size() == node_count);
  CHECK(strait::memory_nodes() == std::vector<unsigned>{0, 1});
  hwloc_topology_t machine = nullptr;
  REQUIRE(hwloc_topology_init(&machine) == 0);
  REQUIRE(hwloc_topology_load(machine) == 0);
  CHECK(hwloc_get_nbobjs_by_type(machine, HWLOC_OBJ_NUMANODE) == static_cast<int>(node_count));
  for (unsigned n = 0; n < node_count; ++n) {
    CAPTURE(n);
    CHECK(nodes[n].id == n);
    CHECK(nodes[n].cpus.size() == 2);
    CHECK(nodes[n].cpus.front() == cpu_of(n));
    CHECK(nodes[n].memory > 0);
    const hwloc_obj_t object = hwloc_get_numanode_obj_by_os_index(machine, n);
    REQUIRE(object != nullptr);
    CHECK(nodes[n].memory == object->attr->numanode.local_memory);
    for (const unsigned cpu : nodes[n].cpus) {
      CHECK(hwloc_bitmap_isset(object->cpuset, cpu));
      CHECK(strait::topology::machine().find(cpu)->node == n);
    }
  }
  hwloc_topology_destroy(machine);
  for (unsigned n = 0; n < node_count; ++n) {
    on_node(n, [n] { CHECK(strait::nearest_memory_node() == n); });
    CHECK(strait::node_of_cpu(cpu_of(n)) == n);
  }
}

TEST_CASE("numa: the runtime has pinned workers on both nodes, and a task runs on the node that it is spawned on") {
  strait::runtime rt;
  REQUIRE(rt.node_count() == node_count);
  for (unsigned n = 0; n < node_count; ++n) {
    CAPTURE(n);
    CHECK(rt.node(n).id() == n);
    REQUIRE(rt.node(n).worker_count() == 2);
    for (std::size_t worker = 0; worker < 2; ++worker) {
      std::promise<std::pair<int, std::optional<unsigned>>> where;
      rt.node(n).spawn([](auto& out) -> strait::task<> {
        out.set_value({strait::this_cpu(), strait::nearest_memory_node()});
        co_return;
      }(where));
      const auto [cpu, node] = where.get_future().get();
      CHECK(cpu == static_cast<int>(rt.node(n).cpu(worker)));
      CHECK(node == n);
    }
  }
  rt.join();
}

TEST_CASE("numa: memory is on the node that was asked for, whoever asks") {
  for (unsigned asked = 0; asked < node_count; ++asked) {
    CAPTURE(asked);
    const unsigned other = 1 - asked;
    on_node(other, [&] {
      auto [tx, rx] =
          strait::endpoint::make_private(strait::shape_of<message>, {.capacity = capacity, .node = asked}, nullptr);
      CHECK(nodes_of(*tx) == only(asked));
      // It stays there, wherever the receiver runs.
      (void)rx->look_at_peer(0);
      CHECK(nodes_of(*tx) == only(asked));
    });
    for (const auto creator : {strait::role::sender, strait::role::receiver}) {
      for (const bool creator_asks : {true, false}) {
        CAPTURE(strait::to_string(creator));
        CAPTURE(creator_asks);
        const channel_name name{"asked"};
        on_node(other, [&] {
          const auto first = open(creator, name.text(), creator_asks ? std::optional{asked} : std::nullopt);
          const auto second =
              open(strait::other(creator), name.text(), creator_asks ? std::nullopt : std::optional{asked});
          // By now both have touched all of it, or the kernel would not tell where it is.
          std::byte* const begin = slots_of(*first);
          for (volatile std::byte* at = begin; at < begin + capacity * sizeof(message); at += 4096) {
            *at = *at;
          }
          (void)first->look_at_peer(0);
          (void)second->look_at_peer(0);
          CHECK(nodes_of(*first) == only(asked));
        });
      }
    }
  }
}

TEST_CASE("numa: memory that nobody placed follows the receiver to the node where it first waits") {
  for (unsigned receiving = 0; receiving < node_count; ++receiving) {
    CAPTURE(receiving);
    const unsigned other = 1 - receiving;
    std::pair<std::unique_ptr<strait::endpoint>, std::unique_ptr<strait::endpoint>> ends;
    on_node(other, [&] {
      ends = strait::endpoint::make_private(strait::shape_of<message>, {.capacity = capacity}, nullptr);
      CHECK(nodes_of(*ends.first) == only(other));
      (void)ends.first->look_at_peer(0);
      CHECK(nodes_of(*ends.first) == only(other));
    });
    on_node(receiving, [&] { (void)ends.second->look_at_peer(0); });
    CHECK(nodes_of(*ends.first) == only(receiving));
    on_node(other, [&] { (void)ends.second->look_at_peer(0); });
    CHECK(nodes_of(*ends.first) == only(receiving));  // once
  }
}

TEST_CASE("numa: a channel between two nodes of a runtime lies where its receiver runs, and loses nothing meanwhile") {
  strait::runtime rt;
  auto [tx, rx] = strait::make_channel<message>({.capacity = capacity});
  static constexpr message count = 20'000;
  rt.node(0).spawn([](strait::sender<message> out) -> strait::task<> {
    for (message i = 0; i < count; ++i) co_await out.send(i);
  }(std::move(tx)));
  rt.node(1).spawn([](strait::receiver<message> in) -> strait::task<> {
    std::set<int> nodes;
    message expected = 0;
    for (;;) {
      const auto there = co_await in.peek();
      if (there.empty()) break;
      for (const message one : there) CHECK(one == expected++);
      // After the first wait: the moment before this, unless the sender was faster.
      if (expected == count) nodes = nodes_of(reinterpret_cast<const std::byte*>(there.data()), 1);
      in.release(there.size());
    }
    CHECK(expected == count);
    CHECK(nodes == only(1));
    const strait::explanation told = in.explain();
    const auto& here = told.ends[static_cast<std::size_t>(strait::role::receiver)];
    const auto& there = told.ends[static_cast<std::size_t>(strait::role::sender)];
    CHECK(here.node == 1U);
    REQUIRE(told.pages.nodes.size() == 1);
    CHECK(told.pages.nodes.front().node == 1);
    CHECK_FALSE(told.node_asked);
    CHECK(told.text().find("100% on node 1; no node was asked for, so it follows the receiver") != std::string::npos);
    if (there.cpu) {  // the sender may never have slept
      CHECK(there.node == 0U);
      CHECK(told.text().find("two nodes: each cache line of messages crosses between them") != std::string::npos);
    }
    MESSAGE(told.text());
  }(std::move(rx)));
  rt.join();
}

TEST_CASE("child: a sender on node 0" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string name = test::parent_says();
  if (test::parent_says() == "nobody") test::become_nobody();
  REQUIRE_FALSE(strait::pin_this_thread(cpu_of(0)));
  auto tx = strait::open_sender<message>(name, {.capacity = capacity});
  tx.blocking_send(7);
  test::tell_parent("in");
  test::parent_says();
  for (message i = 0; i < 2 * capacity; ++i) tx.blocking_send(i);
}

TEST_CASE("child: a receiver on node 1" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string name = test::parent_says();
  if (test::parent_says() == "nobody") test::become_nobody();
  // It is opened on the other node, as by a program whose main opens what its workers use.
  REQUIRE_FALSE(strait::pin_this_thread(cpu_of(0)));
  const auto end = open(strait::role::receiver, name);
  REQUIRE_FALSE(strait::pin_this_thread(cpu_of(1)));
  (void)end->look_at_peer(0);
  // All but what the sender has touched and a stranger may not move: the page of its first message.
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  CHECK(nodes_of(slots_of(*end) + page, capacity * sizeof(message) - 2 * page) == only(1));
  test::tell_parent("moved");
  test::parent_says();
}

TEST_CASE("numa: between processes, too, whichever end comes first, and without more rights than others have") {
  for (const std::string user : {"root", "nobody"}) {
    for (const bool sender_first : {true, false}) {
      CAPTURE(user);
      CAPTURE(sender_first);
      const channel_name name{"follows"};
      test::other_process sender{"child: a sender on node 0"};
      test::other_process receiver{"child: a receiver on node 1"};
      const auto start_sender = [&] {
        sender.say(name.text());
        sender.say(user);
        REQUIRE(sender.hears() == "in");
      };
      const auto start_receiver = [&] {
        receiver.say(name.text());
        receiver.say(user);
        REQUIRE(receiver.hears() == "moved");
      };
      if (sender_first) {
        start_sender();
        start_receiver();
      } else {
        start_receiver();
        start_sender();
      }
      sender.kill();
      receiver.say("enough");
      CHECK(receiver.finish() == 0);
    }
  }
}

TEST_CASE("child: no mbind" * doctest::skip()) {
  if (!test::is_child()) return;
  REQUIRE_FALSE(strait::pin_this_thread(cpu_of(0)));
  test::refuse_call(SYS_mbind, EPERM);
  const auto asked = strait::mapping::anonymous(8192, {.node = 1}).report();
  CHECK(asked.shortfall.find("not placed on node 1: the kernel refuses mbind") != std::string::npos);
  CHECK(asked.nodes == std::vector<strait::node_share>{{0, 2}});
  const channel_name name{"refused"};
  auto tx = strait::open_sender<message>(name.text(), {.capacity = capacity, .node = 1});
  auto rx = strait::open_receiver<message>(name.text());
  tx.blocking_send(42);
  CHECK(rx.blocking_recv() == message{42});
}

TEST_CASE("numa: where the kernel refuses to place memory, the channel works and the report says so") {
  test::other_process child{"child: no mbind"};
  CHECK(child.finish() == 0);
}

TEST_CASE("numa: huge pages that were set aside: private, and a file of hugetlbfs") {
  constexpr std::size_t huge = std::size_t{2} << 20;
  for (unsigned node = 0; node < node_count; ++node) {
    const auto memory = strait::mapping::anonymous(8192, {.node = node, .kind = strait::page_kind::huge});
    const auto report = memory.report();
    CHECK(report.shortfall.empty());
    CHECK(report.page_bytes == huge);
    CHECK(report.bytes == huge);
    CHECK(nodes_of(memory.data(), huge) == only(node));
  }
  // More than there are.
  const auto more = strait::mapping::anonymous(64 * huge, {.kind = strait::page_kind::huge}).report();
  CHECK(more.shortfall.find("no hugetlb pages: expected 64 free ones of 2048 KiB") != std::string::npos);
  CHECK(more.transparent_bytes == more.bytes);

  // Handed over at a socket.
  const strait::memory_name handed{.scheme = strait::memory_scheme::handed_over, .name = "/tmp/ring"};
  {
    strait::segment_plan plan;
    plan.bytes = 8192;
    plan.pages = {.node = 1, .kind = strait::page_kind::huge};
    plan.fill = [](std::byte* memory) { *memory = std::byte{7}; };
    strait::unshared_descriptor memory;
    strait::segment made;
    on_node(0, [&] { made = strait::make_sealed_segment(handed, plan, memory); });
    CHECK(made.map.report().shortfall.empty());
    CHECK(made.map.report().page_bytes == huge);
    CHECK(nodes_of(made.map.data(), huge) == only(1));
    const auto enter = [&](strait::page_kind kind) {
      return strait::enter_sealed_segment(
          handed, memory.get(), 64, [](std::span<const std::byte>) -> std::size_t { return 8192; }, {.kind = kind});
    };
    // Who has not asked for such pages does not depend on what few of them there are.
    test::check_refused(strait::errc::foreign_segment, {handed.text(), "expected memory of ordinary pages"},
                        [&] { (void)enter(strait::page_kind::transparent); });
    const auto entered = enter(strait::page_kind::huge);
    CHECK(*entered.map.data() == std::byte{7});
    CHECK(entered.map.report().page_bytes == huge);
    // More than there are: small ones, and said so.
    plan.bytes = 64 * huge;
    strait::unshared_descriptor other;
    const auto fallen_back = strait::make_sealed_segment(handed, plan, other);
    CHECK(fallen_back.map.report().page_bytes == 4096);
    CHECK(fallen_back.map.report().shortfall.find("no hugetlb pages") != std::string::npos);
  }

  // A System V segment, for both of its ends; and in the child of a fork there is other memory in its place.
  {
    const channel_name name{"huge", test::system_v_memory::scheme};
    const strait::channel_options options{.capacity = 4 * capacity, .node = 1, .pages = strait::page_kind::huge};
    auto tx = strait::open_sender<message>(name.text(), options);
    auto rx = strait::open_receiver<message>(name.text(), options);
    for (const auto& told : {tx.explain(), rx.explain()}) {
      CHECK(told.pages.shortfall == "");
      CHECK(told.pages.page_bytes == huge);
      CHECK(told.pages.bytes == huge);
      CHECK(told.pages.nodes == std::vector<strait::node_share>{{1, huge / 4096}});
    }
    const ::pid_t forked = ::fork();
    if (forked == 0) {
      std::error_code error;
      (void)rx.try_recv(error);  // it looks at cursors that cannot be
      ::_exit(error == strait::errc::inherited ? 0 : 1);
    }
    int status = -1;
    REQUIRE(::waitpid(forked, &status, 0) == forked);
    CHECK(status == 0);
    tx.blocking_send(42);
    CHECK(rx.blocking_recv() == message{42});
    tx.close();
    rx.close();
    CHECK_FALSE(name.exists());
    // More than there are.
    auto small = strait::open_sender<message>(
        name.text(), {.capacity = 64 * huge / sizeof(message), .pages = strait::page_kind::huge});
    CHECK(small.explain().pages.page_bytes == 4096);
    CHECK(small.explain().pages.shortfall.find("no hugetlb pages: expected 65 free ones of 2048 KiB") !=
          std::string::npos);
  }

  REQUIRE((::mkdir("/dev/hugepages", 0755) == 0 || errno == EEXIST));
  REQUIRE(::mount("hugetlbfs", "/dev/hugepages", "hugetlbfs", 0, nullptr) == 0);
  {
    const strait::channel_options options{.capacity = 4 * capacity, .node = 1, .pages = strait::page_kind::huge};
    auto tx = strait::open_sender<message>("file:/dev/hugepages/ring", options);
    auto rx = strait::open_receiver<message>("file:/dev/hugepages/ring", options);
    std::thread sending{[&] {
      for (message i = 0; i < 100'000; ++i) tx.blocking_send(i);
    }};
    bool in_order = true;
    for (message i = 0; i < 100'000; ++i) in_order = rx.blocking_recv() == i && in_order;
    sending.join();
    CHECK(in_order);
  }
  CHECK(strait::inspect("file:/dev/hugepages/ring").condition == strait::channel_condition::stale);
  strait::remove_channel("file:/dev/hugepages/ring");
  CHECK(::umount("/dev/hugepages") == 0);
}

TEST_CASE("numa: what moving costs beside touching") {
  constexpr std::size_t bytes = std::size_t{8} << 20;
  constexpr std::size_t pages = bytes / 4096;
  on_node(0, [&] {
    const auto clock = [] { return std::chrono::steady_clock::now(); };
    const auto us = [](auto span) { return std::chrono::duration<double, std::micro>{span}.count(); };
    auto memory = strait::mapping::anonymous(bytes, {.prefault = false});
    const auto begin = clock();
    memory.populate();
    const auto touched = clock();
    CHECK_FALSE(memory.move_to(1));
    const auto moved = clock();
    CHECK(nodes_of(memory.data(), bytes) == only(1));
    MESSAGE("touching a page: ", us(touched - begin) / pages, " us, moving it: ", us(moved - touched) / pages, " us");
  });
}
