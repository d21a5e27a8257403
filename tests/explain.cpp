/// What an end tells of its channel: where the memory is, where the ends run, and how they wait.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "other_process.hpp"
#include "segment_files.hpp"

import strait;

using namespace std::chrono_literals;
using strait::bell_kind;
using strait::explanation;
using strait::presence;
using strait::role;
using test::channel_name;
using test::eventually;

namespace {

using message = std::uint64_t;

const strait::end_place& place_of(const explanation& told, role which) {
  return told.ends[static_cast<std::size_t>(which)];
}

void check_line(const explanation& told, std::string_view begin, std::string_view word) {
  const std::string text = told.text();
  const std::size_t at = text.find('\n' + std::string{begin} + ' ');
  REQUIRE_MESSAGE(at != std::string::npos, "expected a line \"", std::string{begin}, "\" in:\n", text);
  const std::string line = text.substr(at + 1, text.find('\n', at + 1) - at - 1);
  CHECK_MESSAGE(line.find(word) != std::string::npos, "expected \"", std::string{word}, "\" in: ", line);
}

unsigned this_cpu() {
  return static_cast<unsigned>(strait::this_cpu());
}

}  // namespace

TEST_CASE("explain: a channel of this process: its memory, both ends, and what each thing costs") {
  REQUIRE_FALSE(strait::pin_this_thread(strait::topology::machine().cpus().front().id));
  auto [tx, rx] = strait::make_channel<message>({.capacity = 4096, .longest_spin = 20us});
  const explanation told = rx.explain();
  CHECK(told.channel == "private channel");
  CHECK(told.which == role::receiver);
  CHECK(tx.explain().which == role::sender);
  CHECK(told.capacity == 4096);
  CHECK(told.message_bytes == sizeof(message));
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  CHECK(told.pages.bytes >= 4096 * sizeof(message));
  CHECK(told.pages.bytes % page == 0);
  CHECK(told.pages.page_bytes == page);
  CHECK(told.pages.untouched == 0);
  std::size_t pages = 0;
  for (const auto& share : told.pages.nodes) pages += share.pages;
  if (told.pages.nodes_refused.empty()) CHECK(pages == told.pages.bytes / page);
  CHECK_FALSE(told.node_asked);
  for (const role r : {role::sender, role::receiver}) {
    CHECK(place_of(told, r).state == presence::awake);
    CHECK(place_of(told, r).pid == static_cast<std::uint32_t>(::getpid()));
  }
  CHECK(place_of(told, role::receiver).cpu == this_cpu());
  CHECK(place_of(told, role::receiver).node == strait::node_of_cpu(this_cpu()));
  CHECK_FALSE(place_of(told, role::sender).cpu);  // it has not slept
  CHECK(told.wait == strait::wait_policy::adaptive);
  CHECK(told.longest_spin == 20us);
  CHECK(told.spin <= 20us);
  CHECK(told.barrier_cost > 0ns);
  CHECK(told.barrier_cost < 10ms);
  CHECK(told.bell == bell_kind::none);

  CHECK(told.text().starts_with("channel    private channel: 4096 messages of 8 bytes\n"));
  CHECK(told.text().ends_with('\n'));
  check_line(told, "memory", std::to_string(told.pages.bytes) + " bytes in pages of " + std::to_string(page));
  check_line(told, "placed", "no node was asked for, so it follows the receiver");
  check_line(told, "this end", "receiver in process " + std::to_string(::getpid()) + ", awake; on CPU ");
  check_line(told, "other end", "it has not slept yet");
  check_line(told, "waiting", "adaptive");
  check_line(told, "waiting", "20.0 us at most");
  check_line(told, "bell", "none yet");
}

TEST_CASE("explain: the options that were asked for, and what came of them") {
  const unsigned node = strait::memory_nodes().front();
  auto [tx, rx] = strait::make_channel<message>({.capacity = 64,
                                                 .node = node,
                                                 .wait = strait::wait_policy::busy,
                                                 .order = strait::ordering::fence,
                                                 .pages = strait::page_kind::transparent,
                                                 .lock = true});
  const explanation told = tx.explain();
  CHECK(told.node_asked == node);
  CHECK(told.barrier == strait::store_load::by_fence);
  CHECK(told.pages.locked_bytes == told.pages.bytes);
  check_line(told, "placed", "node " + std::to_string(node) + " was asked for");
  check_line(told, "memory", "locked");
  if (told.pages.shortfall.empty()) {
    check_line(told, "memory", "in transparent huge pages");
  } else {
    check_line(told, "not had", "transparent huge pages: expected");
  }
  check_line(told, "order", "a fence in each send");
  check_line(told, "waiting", "busy: never sleeps");

  auto [other_tx, other_rx] =
      strait::make_channel<message>({.capacity = 4096, .wait = strait::wait_policy::park, .prefault = false});
  const explanation lazy = other_tx.explain();
  CHECK(lazy.spin == 0ns);
  CHECK(lazy.pages.untouched > 0);
  check_line(lazy, "waiting", "park: sleeps at once");
  check_line(lazy, "placed", "pages that this process has not touched");
  if (lazy.barrier != strait::store_load::by_fence) check_line(lazy, "order", "membarrier by who waits");
}

TEST_CASE("explain: a thread is woken by a futex, and then its CPU is known to the other end") {
  auto [tx, rx] = strait::make_channel<message>({.capacity = 64, .wait = strait::wait_policy::park});
  const unsigned cpu = strait::topology::machine().cpus().back().id;
  explanation woken;
  std::thread receiving{[&] {
    CHECK_FALSE(strait::pin_this_thread(cpu));
    CHECK(rx.blocking_recv() == message{7});
    woken = rx.explain();
  }};
  eventually([&] { return place_of(tx.explain(), role::receiver).state == presence::thread_parked; });
  tx.blocking_send(7);
  receiving.join();
  CHECK(woken.bell == bell_kind::futex);
  check_line(woken, "bell", "futex");
  const explanation told = tx.explain();
  CHECK(place_of(told, role::receiver).cpu == cpu);
  check_line(told, "other end", "last slept on CPU " + std::to_string(cpu));
  check_line(told, "distance", place_of(told, role::sender).cpu == cpu ? "one CPU" : "node");
}

namespace {

/// What the receiver says of itself after a message has woken it in a hub.
template <class Send>
explanation after_waking(strait::receiver<message> rx, Send send) {
  std::promise<explanation> told;
  strait::runtime rt{{.cpus = std::vector<unsigned>{strait::topology::machine().cpus().front().id}}};
  rt.spawn([](strait::receiver<message> in, std::promise<explanation>& out) -> strait::task<> {
    CHECK(co_await in.recv() == message{7});
    out.set_value(in.explain());
  }(std::move(rx), told));
  send();
  auto result = told.get_future().get();
  rt.join();
  return result;
}

}  // namespace

TEST_CASE("explain: a hub is woken by its eventfd") {
  auto [tx, rx] = strait::make_channel<message>({.capacity = 64, .wait = strait::wait_policy::park});
  const explanation told = after_waking(std::move(rx), [&tx = tx] {
    eventually([&] { return place_of(tx.explain(), role::receiver).state == presence::hub_parked; });
    tx.blocking_send(7);
  });
  CHECK(told.bell == bell_kind::eventfd);
  check_line(told, "bell", "eventfd");
}

TEST_CASE("explain: a hub that waits for a peer yet to come is woken by a relay") {
  const channel_name name{"relay"};
  auto rx = strait::open_receiver<message>(name.text(), {.capacity = 64, .wait = strait::wait_policy::park});
  const explanation told = after_waking(std::move(rx), [&] {
    eventually([&] {
      return strait::inspect(name.text()).ends[static_cast<std::size_t>(role::receiver)].state ==
             presence::thread_parked;
    });
    auto tx = strait::open_sender<message>(name.text(), {.capacity = 64});
    tx.blocking_send(7);
  });
  // Woken by the arrival, it may have slept once more, and then the peer had its eventfd.
  CHECK((told.bell == bell_kind::relay || told.bell == bell_kind::eventfd));
  CHECK(told.channel == name.text());
}

TEST_CASE("child: sends when it is told to" * doctest::skip()) {
  if (!test::is_child()) return;
  auto tx = strait::open_sender<message>(test::parent_says(), {.capacity = 64});
  test::tell_parent("in");
  test::parent_says();
}

TEST_CASE("explain: between processes it names the other one, and inspect tells the same") {
  const channel_name name{"process"};
  const unsigned node = strait::memory_nodes().front();
  auto rx = strait::open_receiver<message>(name.text(), {.capacity = 64, .node = node});
  CHECK(place_of(rx.explain(), role::sender).pid == 0);
  CHECK(place_of(rx.explain(), role::sender).state == presence::vacant);
  test::other_process child{"child: sends when it is told to"};
  child.say(name.text());
  REQUIRE(child.hears() == "in");
  const explanation told = rx.explain();
  CHECK(place_of(told, role::sender).pid == static_cast<std::uint32_t>(child.pid()));
  check_line(told, "other end", "sender in process " + std::to_string(child.pid()) + ", awake");
  CHECK(told.node_asked == node);
  CHECK(strait::inspect(name.text()).node_asked == node);
  child.say("enough");
  CHECK(child.finish() == 0);
  CHECK(place_of(rx.explain(), role::sender).state == presence::closed);
  CHECK_THROWS_AS((void)rx.blocking_recv_until(std::chrono::steady_clock::now()).value(), std::bad_optional_access);
}

TEST_CASE("explain: a closed handle has nothing to explain") {
  auto [tx, rx] = strait::make_channel<message>({.capacity = 64});
  tx.close();
  test::check_refused(strait::errc::closed, {"was closed", "an open one"}, [&tx = tx] { (void)tx.explain(); });
}
