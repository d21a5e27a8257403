/// What others see of a channel, and what they may take away: inspect, list_channels, remove_channel.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
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

using strait::channel_condition;
using strait::channel_state;
using strait::errc;
using strait::presence;
using strait::role;
using test::channel_name;
using test::check_refused;

struct Quote {
  std::uint64_t id;
  double price;
};

template <>
struct strait::message_traits<Quote> {
  static constexpr std::string_view name = "Quote";
  static constexpr std::uint32_t version = 3;
};

namespace {

constexpr std::size_t sender_index = 0;
constexpr std::size_t receiver_index = 1;

/// What the list says of the name; nothing when it does not hold it.
std::optional<channel_state> listed(const channel_name& name) {
  const auto all = strait::list_channels();
  const auto found = std::ranges::find_if(all, [&](const channel_state& one) { return one.name.name == name.bare(); });
  return found == all.end() ? std::nullopt : std::optional{*found};
}

strait::task<> receive_all(strait::receiver<Quote> rx) {
  while (co_await rx.recv()) {
  }
}

/// A leftover: both ends were in a process that was killed, after it sent `messages`.
void leave_behind(const channel_name& name, const std::string& messages) {
  test::other_process child{"child: holds both ends and sends"};
  child.say(name.text());
  REQUIRE(child.hears() == "open");
  child.say(messages);
  REQUIRE(child.hears() == "sent");
  child.kill();
}

}  // namespace

TEST_CASE("child: holds both ends and sends" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string name = test::parent_says();
  auto rx = strait::open_receiver<Quote>(name, {.capacity = 16});
  auto tx = strait::open_sender<Quote>(name, {.capacity = 16});
  test::tell_parent("open");
  const int count = std::stoi(test::parent_says());
  for (int i = 0; i < count; ++i) tx.blocking_send(Quote{});
  test::tell_parent("sent");
  test::parent_says();
}

TEST_CASE("a live channel is seen with its type, capacity, depth and ends") {
  const channel_name name{"live"};
  auto rx = strait::open_receiver<Quote>(name.text(), {.capacity = 16});
  auto tx = strait::open_sender<Quote>(name.text());
  for (int i = 0; i < 3; ++i) tx.blocking_send(Quote{});

  const channel_state seen = strait::inspect(name.text());
  CHECK(seen.name.text() == name.text());
  CHECK(seen.condition == channel_condition::live);
  CHECK(seen.trouble.empty());
  CHECK(seen.type == "Quote");
  CHECK(seen.type_version == 3);
  CHECK(seen.message_bytes == sizeof(Quote));
  CHECK(seen.message_alignment == alignof(Quote));
  CHECK(seen.capacity == 16);
  CHECK(seen.depth == 3);
  CHECK(seen.sent == 3);
  CHECK(seen.taken == 0);
  CHECK(seen.creator_pid == static_cast<std::uint32_t>(::getpid()));
  CHECK_FALSE(seen.corrupt);
  CHECK_FALSE(seen.deposited);
  for (const strait::end_state& end : seen.ends) {
    CHECK(end.alive);
    CHECK(end.state == presence::awake);
    CHECK(end.pid == static_cast<std::uint32_t>(::getpid()));
  }
  CHECK(seen.ends[sender_index].which == role::sender);
  CHECK(seen.ends[receiver_index].which == role::receiver);

  const auto in_list = listed(name);
  REQUIRE(in_list);
  CHECK(in_list->condition == channel_condition::live);
  CHECK(in_list->depth == 3);
}

TEST_CASE("one end alone is enough to live, and the other is vacant") {
  const channel_name name{"half"};
  auto rx = strait::open_receiver<Quote>(name.bare());
  const channel_state seen = strait::inspect(name.bare());
  CHECK(seen.condition == channel_condition::live);
  CHECK_FALSE(seen.ends[sender_index].alive);
  CHECK(seen.ends[sender_index].state == presence::vacant);
  CHECK(seen.ends[sender_index].pid == 0);
}

TEST_CASE("looking changes nothing") {
  const channel_name name{"untouched"};
  leave_behind(name, "2");
  const auto before = test::state_of(name);
  (void)strait::inspect(name.text());
  (void)strait::list_channels();
  CHECK(test::state_of(name) == before);
}

TEST_CASE("parks and wakes are counted where they happen") {
  const channel_name name{"counted"};
  auto rx = strait::open_receiver<Quote>(name.text(), {.wait = strait::wait_policy::park});
  auto tx = strait::open_sender<Quote>(name.text());
  std::thread receiving{[&] { CHECK(rx.blocking_recv().has_value()); }};
  test::eventually([&] {
    const channel_state seen = strait::inspect(name.text());
    return seen.ends[receiver_index].state == presence::thread_parked && seen.ends[receiver_index].parks == 1;
  });
  CHECK(strait::inspect(name.text()).ends[sender_index].wakes == 0);
  tx.blocking_send(Quote{});
  receiving.join();
  const channel_state seen = strait::inspect(name.text());
  CHECK(seen.ends[sender_index].wakes == 1);
  CHECK(seen.ends[sender_index].parks == 0);
  CHECK(seen.ends[receiver_index].wakes == 0);
  CHECK(seen.ends[receiver_index].state == presence::awake);
}

TEST_CASE("a hub's parks are counted, too") {
  const channel_name name{"hub"};
  auto rx = strait::open_receiver<Quote>(name.text(), {.wait = strait::wait_policy::park});
  auto tx = strait::open_sender<Quote>(name.text());
  strait::runtime rt;
  rt.spawn(receive_all(std::move(rx)));
  test::eventually([&] {
    const strait::end_state end = strait::inspect(name.text()).ends[receiver_index];
    return end.parks > 0 && (end.state == presence::hub_parked || end.state == presence::thread_parked);
  });
  tx.blocking_send(Quote{});
  tx.close();
  rt.join();
}

TEST_CASE("what a crash left is stale, and goes") {
  const channel_name name{"crashed"};
  leave_behind(name, "5");
  const channel_state seen = strait::inspect(name.text());
  CHECK(seen.condition == channel_condition::stale);
  CHECK(seen.depth == 5);
  CHECK_FALSE(seen.deposited);
  for (const strait::end_state& end : seen.ends) {
    CHECK_FALSE(end.alive);
    CHECK(end.state == presence::dead);
    CHECK(end.pid != 0);
  }
  const auto in_list = listed(name);
  REQUIRE(in_list);
  CHECK(in_list->condition == channel_condition::stale);

  strait::remove_channel(name.text(), strait::removal::leftover);
  CHECK_FALSE(name.exists());
  CHECK_FALSE(listed(name));
  check_refused(std::error_code{ENOENT, std::system_category()}, {name.text()},
                [&] { strait::remove_channel(name.text()); });
  check_refused(std::error_code{ENOENT, std::system_category()}, {name.text()},
                [&] { (void)strait::inspect(name.text()); });
}

TEST_CASE("a live channel is not removed, and the error names the processes") {
  const channel_name name{"in-use"};
  test::other_process child{"child: holds both ends and sends"};
  child.say(name.text());
  REQUIRE(child.hears() == "open");
  const std::string pid = std::to_string(child.pid());
  for (const auto which : {strait::removal::any, strait::removal::leftover}) {
    check_refused(errc::end_in_use, {name.text(), "its sender in process " + pid, "its receiver in process " + pid},
                  [&] { strait::remove_channel(name.text(), which); });
  }
  CHECK(name.exists());
  child.say("0");
  REQUIRE(child.hears() == "sent");
  child.say("go");
  CHECK(child.finish() == 0);
}

TEST_CASE("who is entering or leaving lives") {
  const channel_name name{"gate"};
  leave_behind(name, "0");
  {
    strait::file_locks at_the_gate{name.path().c_str(), O_RDWR | O_CLOEXEC, 0};
    REQUIRE(at_the_gate.try_lock(strait::gate_byte));
    CHECK(strait::inspect(name.text()).condition == channel_condition::live);
    check_refused(errc::end_in_use, {name.text(), "entering or leaving"}, [&] { strait::remove_channel(name.text()); });
  }
  CHECK(strait::inspect(name.text()).condition == channel_condition::stale);
}

TEST_CASE("messages for a receiver that has yet to come are no leftover") {
  const channel_name name{"deposit"};
  {
    auto tx = strait::open_sender<Quote>(name.text());
    tx.blocking_send(Quote{});
  }
  const channel_state seen = strait::inspect(name.text());
  CHECK(seen.condition == channel_condition::stale);
  CHECK(seen.deposited);
  check_refused(errc::layout_mismatch, {name.text(), "1 messages"},
                [&] { strait::remove_channel(name.text(), strait::removal::leftover); });
  CHECK(name.exists());
  strait::remove_channel(name.text());
  CHECK_FALSE(name.exists());
}

TEST_CASE("another layout version is named as such and never touched") {
  const channel_name name{"future"};
  leave_behind(name, "1");
  test::overwrite(name, offsetof(strait::segment_header, layout_version), std::uint32_t{77});
  const auto before = test::state_of(name);
  const channel_state seen = strait::inspect(name.text());
  CHECK(seen.condition == channel_condition::other_version);
  CHECK(seen.trouble.find("found 77") != std::string::npos);
  const auto in_list = listed(name);
  REQUIRE(in_list);
  CHECK(in_list->condition == channel_condition::other_version);
  check_refused(errc::version_mismatch, {"found 77"}, [&] { strait::remove_channel(name.text()); });
  CHECK(test::state_of(name) == before);
}

TEST_CASE("a file channel is listed while somebody lives in it, and known by its name afterwards") {
  const channel_name name{"file", test::file_memory::scheme};
  test::other_process child{"child: holds both ends and sends"};
  child.say(name.text());
  REQUIRE(child.hears() == "open");
  child.say("3");
  REQUIRE(child.hears() == "sent");
  const auto by_text = [&]() -> std::optional<channel_state> {
    for (const channel_state& one : strait::list_channels()) {
      if (one.name.text() == name.text()) return one;
    }
    return std::nullopt;
  };
  const auto seen = by_text();
  REQUIRE(seen);
  CHECK(seen->condition == channel_condition::live);
  CHECK(seen->depth == 3);
  CHECK(seen->ends[sender_index].pid == static_cast<std::uint32_t>(child.pid()));
  check_refused(errc::end_in_use, {name.text(), std::to_string(child.pid())},
                [&] { strait::remove_channel(name.text()); });
  child.kill();
  CHECK_FALSE(by_text());
  CHECK(strait::inspect(name.text()).condition == channel_condition::stale);
  CHECK(strait::inspect(name.text()).depth == 3);
  strait::remove_channel(name.text());
  CHECK_FALSE(name.exists());
}

TEST_CASE("a makeshift name is a leftover when its maker died, and nothing yet while he lives") {
  const std::string path = "/dev/shm/.strait-new-0123456789abcdef";
  const std::string name = "posix:.strait-new-0123456789abcdef";
  const auto condition = [&]() -> std::optional<channel_condition> {
    for (const channel_state& one : strait::list_channels()) {
      if (one.name.text() == name) return one.condition;
    }
    return std::nullopt;
  };
  test::write_file(path, {'h', 'a', 'l', 'f'});
  strait::file_locks maker{path.c_str(), O_RDWR | O_CLOEXEC, 0};
  REQUIRE(maker.try_lock(strait::gate_byte));
  CHECK_FALSE(condition());
  maker = {};
  CHECK(condition() == channel_condition::unfinished);
  strait::remove_channel(name, strait::removal::leftover);
  CHECK_FALSE(condition());
  struct ::stat file{};
  CHECK(::lstat(path.c_str(), &file) != 0);
}

TEST_CASE("what is not ours is neither listed nor removed") {
  const channel_name name{"foreign", test::posix_memory::scheme};
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{3}, std::size_t{8}, std::size_t{5000}}) {
    test::write_file(name.path(), std::vector<char>(bytes, 'x'));
    CHECK_FALSE(listed(name));
    check_refused(errc::foreign_segment, {name.text()}, [&] { (void)strait::inspect(name.text()); });
    check_refused(errc::foreign_segment, {name.text()}, [&] { strait::remove_channel(name.text()); });
    CHECK(name.exists());
  }
  ::unlink(name.path().c_str());
  REQUIRE(::mkfifo(name.path().c_str(), 0600) == 0);  // must not be waited for
  CHECK_FALSE(listed(name));
  check_refused(errc::foreign_segment, {"a FIFO"}, [&] { (void)strait::inspect(name.text()); });
  ::unlink(name.path().c_str());
  REQUIRE(::symlink("/etc/hostname", name.path().c_str()) == 0);
  CHECK_FALSE(listed(name));
  check_refused(errc::foreign_segment, {"a symbolic link"}, [&] { (void)strait::inspect(name.text()); });
}

TEST_CASE("a segment that was cut short is damaged, at every length") {
  const channel_name name{"cut", test::posix_memory::scheme};
  leave_behind(name, "1");
  const auto whole = strait::inspect(name.text()).segment_bytes;
  for (const std::uint64_t bytes :
       {whole - 1, std::uint64_t{sizeof(strait::segment_header)}, std::uint64_t{sizeof(strait::segment_header)} - 1,
        std::uint64_t{100}, std::uint64_t{9}, std::uint64_t{8}}) {
    REQUIRE(::truncate(name.path().c_str(), static_cast<::off_t>(bytes)) == 0);
    const auto seen = listed(name);
    REQUIRE(seen);
    CHECK(seen->condition == channel_condition::damaged);
    CHECK_FALSE(seen->trouble.empty());
    check_refused(errc::layout_mismatch, {}, [&] { strait::remove_channel(name.text(), strait::removal::leftover); });
  }
  strait::remove_channel(name.text());
  CHECK_FALSE(name.exists());
}

TEST_CASE("rubbish in any word of the header is shown and harms nobody") {
  const channel_name name{"rubbish"};
  leave_behind(name, "1");
  const auto whole = test::state_of(name).bytes;
  constexpr std::array<unsigned char, 3> fillings{0xff, 0x80, 0x01};
  for (std::size_t at = sizeof(std::uint64_t); at < sizeof(strait::segment_header); at += sizeof(std::uint64_t)) {
    for (const unsigned char filling : fillings) {
      std::array<unsigned char, sizeof(std::uint64_t)> word{};
      word.fill(filling);
      test::overwrite(name, at, word);
      const auto seen = listed(name);
      REQUIRE(seen);
      CHECK(seen->depth <= seen->capacity);
      CHECK(seen->type.size() < 64);
    }
    std::array<char, sizeof(std::uint64_t)> right{};
    std::memcpy(right.data(), whole.data() + at, right.size());
    test::overwrite(name, at, right);
  }
  test::overwrite(name, offsetof(strait::segment_header, ends), std::uint32_t{4711});
  const channel_state seen = strait::inspect(name.text());
  CHECK(seen.corrupt);
  CHECK_FALSE(seen.ends[sender_index].state);
  strait::remove_channel(name.text(), strait::removal::leftover);
  CHECK_FALSE(name.exists());
}

TEST_CASE("a file that may not be read is listed as such") {
  const channel_name name{"secret", test::posix_memory::scheme};
  leave_behind(name, "1");
  REQUIRE(::chmod(name.path().c_str(), 0) == 0);
  const auto look = [&] {
    const auto seen = listed(name);
    if (!seen || seen->condition != channel_condition::no_permission) return 1;
    try {
      (void)strait::inspect(name.text());
      return 2;
    } catch (const std::system_error& error) {
      if (error.code() != errc::no_permission) return 3;
    }
    try {
      strait::remove_channel(name.text());
      return 4;
    } catch (const std::system_error& error) {
      if (error.code() != errc::no_permission) return 5;
    }
    return 0;
  };
  if (::geteuid() != 0) {
    CHECK(look() == 0);
    return;
  }
  // Root may read everything: a child gives that up.
  const ::pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    if (::setresgid(65534, 65534, 65534) != 0 || ::setresuid(65534, 65534, 65534) != 0) ::_exit(100);
    ::_exit(look());
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("channels that come and go while they are listed") {
  const channel_name name{"coming-and-going"};
  std::atomic<bool> stop{false};
  std::thread busy{[&] {
    while (!stop.load()) {
      auto rx = strait::open_receiver<Quote>(name.text(), {.capacity = 4});
      auto tx = strait::open_sender<Quote>(name.text(), {.capacity = 4});
      tx.blocking_send(Quote{});
    }
  }};
  int found = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds{30};
  for (int i = 0; (i < 100 || found < 10) && std::chrono::steady_clock::now() < end; ++i) {
    const auto seen = listed(name);
    if (!seen) continue;
    ++found;
    CHECK(seen->capacity == 4);
    CHECK(seen->depth <= 4);
    CHECK_FALSE(seen->corrupt);
  }
  stop = true;
  busy.join();
  CHECK(found >= 10);
}
