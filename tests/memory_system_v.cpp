/// `sysv:` channels: the segment under its key, its companion, and what becomes of the one without the other.
#include <doctest/doctest.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "less_rights.hpp"
#include "other_process.hpp"
#include "segment_files.hpp"

import strait;

using strait::channel_condition;
using strait::errc;
using strait::open_mode;
using test::channel_name;
using test::check_refused;
using test::state_of;

namespace {

using number = std::uint64_t;

constexpr std::array all_modes{open_mode::open_or_create, open_mode::create, open_mode::open};

channel_name system_v_name(std::string_view what) {
  return channel_name{what, test::system_v_memory::scheme};
}

int segment_of(const channel_name& name) {
  return test::system_v_segment(test::key_of(name.bare()));
}

/// What `ls` says of it; nothing when it is not listed.
std::optional<channel_condition> listed(const channel_name& name) {
  for (const auto& one : strait::list_channels()) {
    if (one.name.text() == name.text()) return one.condition;
  }
  return std::nullopt;
}

/// What stands in the companion while the channel is there.
std::vector<char> companion_of(const channel_name& name) {
  return state_of(name.path()).bytes;
}

/// The length of the segment, as the companion tells it: its second word.
std::uint64_t segment_bytes_in(const std::vector<char>& companion) {
  std::uint64_t bytes = 0;
  REQUIRE(companion.size() >= 2 * sizeof bytes);
  std::memcpy(&bytes, companion.data() + sizeof bytes, sizeof bytes);
  return bytes;
}

void check_works(const channel_name& name) {
  {
    auto rx = strait::open_receiver<number>(name.text());
    auto tx = strait::open_sender<number>(name.text());
    REQUIRE(tx.try_send(number{7}));
    CHECK(rx.try_recv() == number{7});
  }
  CHECK_FALSE(name.exists());
}

/// A segment that a program which knows nothing of us made.
class foreign_segment {
 public:
  foreign_segment(::key_t key, std::size_t bytes) : id_{::shmget(key, bytes, IPC_CREAT | IPC_EXCL | 0600)} {
    REQUIRE(id_ >= 0);
  }
  foreign_segment(const foreign_segment&) = delete;
  foreign_segment& operator=(const foreign_segment&) = delete;
  ~foreign_segment() { ::shmctl(id_, IPC_RMID, nullptr); }
  [[nodiscard]] int id() const noexcept { return id_; }

 private:
  int id_;
};

}  // namespace

TEST_CASE("sysv: a name is taken apart, and its companion lies in /dev/shm") {
  const auto name = strait::parse_memory_name("sysv:orders");
  CHECK(name.scheme == strait::memory_scheme::system_v);
  CHECK(name.name == "orders");
  CHECK(name.text() == "sysv:orders");
  CHECK(name.path() == "/dev/shm/.strait-sysv-orders");
  CHECK_FALSE(name.outlives_its_ends());
  CHECK(strait::parse_memory_name("sysv:" + std::string(242, 'n')).name.size() == 242);
  check_refused(errc::bad_name, {"1 to 242 characters", "243 characters"},
                [] { (void)strait::parse_memory_name("sysv:" + std::string(243, 'n')); });
  check_refused(errc::bad_name, {"a '/'"}, [] { (void)strait::parse_memory_name("sysv:a/b"); });
  const channel_name longest = channel_name{std::string(200, 'n'), test::system_v_memory::scheme};
  check_works(longest);
}

TEST_CASE("sysv: the segment is under the hash of the name, and goes with the last end") {
  const channel_name name = system_v_name("key");
  auto tx = strait::open_sender<number>(name.text(), {.capacity = 64, .mode = 0640});
  const int segment = segment_of(name);
  REQUIRE(segment >= 0);
  ::shmid_ds seen{};
  REQUIRE(::shmctl(segment, IPC_STAT, &seen) == 0);
  CHECK((seen.shm_perm.mode & 0777U) == 0640U);
  CHECK(seen.shm_nattch == 1);
  CHECK(seen.shm_segsz == segment_bytes_in(companion_of(name)));
  {
    auto rx = strait::open_receiver<number>(name.text());
    CHECK(rx.capacity() == 64);
    REQUIRE(tx.try_send(number{1}));
    CHECK(rx.try_recv() == number{1});
    REQUIRE(::shmctl(segment, IPC_STAT, &seen) == 0);
    CHECK(seen.shm_nattch == 2);
  }
  tx.close();
  CHECK(::shmctl(segment, IPC_STAT, &seen) == -1);
  CHECK_FALSE(name.exists());
}

TEST_CASE("sysv: a channel of the same name in another memory is another channel") {
  const channel_name name = system_v_name("twice");
  auto here = strait::open_sender<number>(name.text());
  auto there = strait::open_sender<number>("posix:" + name.bare());
  here.close();
  CHECK_FALSE(name.exists());
  CHECK(std::filesystem::exists("/dev/shm/" + name.bare()));
}

TEST_CASE("sysv: a foreign segment under the key is refused by name, and never touched") {
  const channel_name name = system_v_name("foreign");
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{264}, std::size_t{100'000}}) {
    CAPTURE(bytes);
    const foreign_segment theirs{test::key_of(name.bare()), bytes};
    for (const auto mode : {open_mode::open_or_create, open_mode::create}) {
      check_refused(errc::foreign_segment,
                    {name.text(), "its own System V segment under key 0x", std::to_string(theirs.id())},
                    [&] { (void)strait::open_sender<number>(name.text(), {.open = mode}); });
      CHECK_FALSE(std::filesystem::exists(name.path()));
    }
    check_refused(std::error_code{ENOENT, std::system_category()}, {name.text()},
                  [&] { (void)strait::open_sender<number>(name.text(), {.open = open_mode::open}); });
    ::shmid_ds seen{};
    REQUIRE(::shmctl(theirs.id(), IPC_STAT, &seen) == 0);
    CHECK(seen.shm_nattch == 0);
    CHECK(seen.shm_perm.mode == 0600);
    CHECK_FALSE(listed(name));
  }
}

TEST_CASE("sysv: two names with one key: the second is refused, and told of the first") {
  std::map<::key_t, std::string> seen;
  std::string first;
  std::string second;
  for (int i = 0; first.empty(); ++i) {
    std::string name = "strait-test-" + std::to_string(::getpid()) + "-twin-" + std::to_string(i);
    const auto [at, fresh] = seen.try_emplace(test::key_of(name), name);
    if (!fresh) {
      first = at->second;
      second = name;
    }
  }
  auto tx = strait::open_sender<number>("sysv:" + first);
  check_refused(errc::foreign_segment, {"sysv:" + second, "of sysv:" + first},
                [&] { (void)strait::open_sender<number>("sysv:" + second); });
  auto rx = strait::open_receiver<number>("sysv:" + first);
  REQUIRE(tx.try_send(number{1}));
  CHECK(rx.try_recv() == number{1});
}

TEST_CASE("sysv: what a creator leaves that dies half-way is cleared by the next comer, and by rm") {
  const channel_name name = system_v_name("half");
  std::vector<char> companion;
  {
    auto tx = strait::open_sender<number>(name.text());
    companion = companion_of(name);
  }
  REQUIRE_FALSE(name.exists());
  for (const bool with_segment : {false, true}) {
    for (const bool by_rm : {false, true}) {
      CAPTURE(with_segment);
      CAPTURE(by_rm);
      test::write_file(name.path(), companion);
      if (with_segment) {
        REQUIRE(::shmget(test::key_of(name.bare()), segment_bytes_in(companion), IPC_CREAT | IPC_EXCL | 0600) >= 0);
      }
      CHECK(listed(name) == channel_condition::unfinished);
      CHECK(strait::inspect(name.text()).condition == channel_condition::unfinished);
      check_refused(std::error_code{ENOENT, std::system_category()}, {name.text()},
                    [&] { (void)strait::open_sender<number>(name.text(), {.open = open_mode::open}); });
      CHECK(name.exists());
      if (by_rm) {
        strait::remove_channel(name.text(), strait::removal::leftover);
        CHECK_FALSE(name.exists());
      } else {
        check_works(name);
      }
    }
  }
  // Of another length it is none that this companion's creator left.
  test::write_file(name.path(), companion);
  const foreign_segment theirs{test::key_of(name.bare()), segment_bytes_in(companion) + 8};
  check_refused(errc::foreign_segment, {"without a strait label"},
                [&] { (void)strait::open_sender<number>(name.text()); });
}

TEST_CASE("sysv: somebody who is at work on it is waited for, and is not a leftover") {
  const channel_name name = system_v_name("at-work");
  std::vector<char> companion;
  {
    auto tx = strait::open_sender<number>(name.text());
    companion = companion_of(name);
  }
  test::write_file(name.path(), companion);
  strait::file_locks maker{name.path().c_str(), O_RDWR | O_CLOEXEC, 0};
  REQUIRE(maker.try_lock(strait::gate_byte));
  CHECK_FALSE(listed(name));
  // There is no channel yet.
  check_refused(std::error_code{ENOENT, std::system_category()}, {name.text()},
                [&] { strait::remove_channel(name.text()); });
  std::thread comer{[&] { check_works(name); }};
  // He is in the queue of the gate: a blocked lock stands in /proc/locks behind an arrow.
  test::eventually([&] {
    std::ifstream locks{"/proc/locks"};
    const std::string inode = ':' + std::to_string(state_of(name.path()).inode) + ' ';
    for (std::string line; std::getline(locks, line);) {
      if (line.find("->") != std::string::npos && line.find(inode) != std::string::npos) return true;
    }
    return false;
  });
  CHECK(name.exists());
  maker = {};
  comer.join();
  CHECK_FALSE(name.exists());
}

TEST_CASE("sysv: removed from under its ends (ipcrm), they go on, and nobody else is led to another segment") {
  const channel_name name = system_v_name("ipcrm");
  {
    auto tx = strait::open_sender<number>(name.text());
    REQUIRE(::shmctl(segment_of(name), IPC_RMID, nullptr) == 0);
    for (const auto mode : all_modes) {
      check_refused(errc::end_in_use, {name.text(), "somebody lives in", "ipcrm"},
                    [&] { (void)strait::open_receiver<number>(name.text(), {.open = mode}); });
    }
    check_refused(errc::end_in_use, {name.text()}, [&] { strait::remove_channel(name.text()); });
  }
  CHECK_FALSE(name.exists());
  {
    // Messages that would wait for a receiver are lost with the segment; the companion that stays is cleared away.
    auto tx = strait::open_sender<number>(name.text());
    REQUIRE(::shmctl(segment_of(name), IPC_RMID, nullptr) == 0);
    CHECK(tx.try_send(number{1}));
  }
  CHECK(listed(name) == channel_condition::unfinished);
  check_works(name);
}

TEST_CASE("sysv: a segment whose companion was removed") {
  const channel_name name = system_v_name("orphan");
  std::optional<strait::sender<number>> tx{strait::open_sender<number>(name.text())};
  REQUIRE(tx->try_send(number{1}));
  const std::string aside = name.path() + ".aside";
  std::filesystem::rename(name.path(), aside);
  // Its ends live, and cannot be asked.
  check_refused(errc::end_in_use, {name.text(), "attached 1 times", "removed"},
                [&] { (void)strait::open_receiver<number>(name.text()); });
  CHECK(listed(name) == channel_condition::unfinished);
  check_refused(errc::end_in_use, {name.text()}, [&] { strait::remove_channel(name.text()); });
  CHECK_FALSE(std::filesystem::exists(name.path()));
  tx.reset();  // leaves what it cannot find
  std::filesystem::remove(aside);
  REQUIRE(segment_of(name) >= 0);
  CHECK(listed(name) == channel_condition::unfinished);
  SUBCASE("the next comer clears it") {
    check_works(name);
  }
  SUBCASE("rm clears it") {
    strait::remove_channel(name.text(), strait::removal::leftover);
    CHECK_FALSE(name.exists());
  }
}

TEST_CASE("sysv: a companion that is none, or of another IPC namespace") {
  const channel_name name = system_v_name("companion");
  std::vector<char> companion;
  {
    auto tx = strait::open_sender<number>(name.text());
    companion = companion_of(name);
  }
  for (std::size_t bytes = 0; bytes < companion.size(); bytes += 4) {
    CAPTURE(bytes);
    test::write_file(name.path(), {companion.begin(), companion.begin() + static_cast<std::ptrdiff_t>(bytes)});
    const auto before = state_of(name.path());
    check_refused(errc::foreign_segment, {name.text(), "the companion of a System V segment"},
                  [&] { (void)strait::open_sender<number>(name.text()); });
    CHECK(state_of(name.path()) == before);
    CHECK_FALSE(listed(name));
  }
  companion.back() = static_cast<char>(~companion.back());
  test::write_file(name.path(), companion);
  check_refused(errc::foreign_segment, {name.text(), "IPC namespace"},
                [&] { (void)strait::open_sender<number>(name.text()); });
}

TEST_CASE("child: in an IPC namespace with limits" * doctest::skip()) {
  if (!test::is_child()) return;
  REQUIRE(::unshare(CLONE_NEWIPC) == 0);
  const auto set = [](const std::string& limit, const std::string& value) {
    std::ofstream file{"/proc/sys/kernel/" + limit};
    file << value;
    REQUIRE(file.flush());
  };
  const channel_name name = system_v_name("limits");
  const auto refused = [&](std::initializer_list<std::string_view> words) {
    check_refused(errc::no_space, words, [&] { (void)strait::open_sender<number>(name.text()); });
    CHECK_FALSE(name.exists());
  };
  set("shmmax", "4096");
  refused({name.text(), "kernel.shmmax = 4096"});
  set("shmmax", "1000000000");
  set("shmall", "2");
  refused({name.text(), "kernel.shmall = 2 pages", "found 0 in use"});
  set("shmall", "100000");
  set("shmmni", "1");
  const channel_name first = system_v_name("first");
  auto tx = strait::open_sender<number>(first.text());
  refused({name.text(), "kernel.shmmni", "found all 1 in use"});
  auto rx = strait::open_receiver<number>(first.text());
  REQUIRE(tx.try_send(number{1}));
  CHECK(rx.try_recv() == number{1});
}

TEST_CASE("sysv: the kernel's limits (shmmni, shmmax, shmall) are errors that name them, and leave nothing") {
  if (::geteuid() != 0) {
    MESSAGE("skipped: expected to be root, who may have an IPC namespace; found user ", ::geteuid());
    return;
  }
  test::other_process child{"child: in an IPC namespace with limits"};
  CHECK(child.finish() == 0);
}

TEST_CASE("child: is nobody to a System V channel" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string narrow = test::parent_says();
  const std::string wide = test::parent_says();
  test::become_nobody();
  for (const auto mode : all_modes) {
    check_refused(errc::no_permission, {narrow, "user 65534", "user 0", "mode 0600"},
                  [&] { (void)strait::open_receiver<number>(narrow, {.open = mode}); });
  }
  auto rx = strait::open_receiver<number>(wide);
  CHECK(rx.try_recv() == number{1});
}

TEST_CASE("sysv: another user is refused, or let in where the mode says so") {
  if (::geteuid() != 0) {
    MESSAGE("skipped: expected to be root, who can become nobody; found user ", ::geteuid());
    return;
  }
  const channel_name narrow = system_v_name("narrow");
  const channel_name wide = system_v_name("wide");
  auto one = strait::open_sender<number>(narrow.text());
  auto other = strait::open_sender<number>(wide.text(), {.mode = 0666});
  REQUIRE(other.try_send(number{1}));
  test::other_process nobody{"child: is nobody to a System V channel"};
  nobody.say(narrow.text());
  nobody.say(wide.text());
  CHECK(nobody.finish() == 0);
}
