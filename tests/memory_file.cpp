/// `file:` channels: the stream that goes on where it stopped, after exits, kills and reboots; and the file as its
/// owner sees it, who finds it again whatever happens.
#include <doctest/doctest.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "less_rights.hpp"
#include "other_process.hpp"
#include "segment_files.hpp"

import strait;

using strait::channel_options;
using strait::errc;
using strait::open_mode;
using strait::segment_header;
using test::channel_name;
using test::check_refused;
using test::state_of;

namespace {

using number = std::uint64_t;

constexpr std::array all_modes{open_mode::open_or_create, open_mode::create, open_mode::open};

channel_name file_name(std::string_view what) {
  return channel_name{what, test::file_memory::scheme};
}

/// A directory that is taken away with all that is in it.
class directory {
 public:
  explicit directory(const std::filesystem::path& where = std::filesystem::temp_directory_path()) {
    std::string path = where / "strait-test-XXXXXX";
    if (::mkdtemp(path.data()) == nullptr) throw std::system_error{errno, std::system_category(), path};
    path_ = path;
  }
  directory(const directory&) = delete;
  directory& operator=(const directory&) = delete;
  ~directory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] std::string channel() const { return "file:" + path_ + "/orders.ring"; }
  [[nodiscard]] std::string ring() const { return path_ + "/orders.ring"; }
  [[nodiscard]] std::vector<std::string> listing() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator{path_}) names.push_back(entry.path().filename());
    return names;
  }

 private:
  std::string path_;
};

template <class Field>
Field read_word(const std::string& path, std::size_t offset) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  Field value{};
  const ::ssize_t got = ::pread(file, &value, sizeof value, static_cast<::off_t>(offset));
  ::close(file);
  REQUIRE(got == static_cast<::ssize_t>(sizeof value));
  return value;
}
template <class Field>
void write_word(const std::string& path, std::size_t offset, Field value) {
  const int file = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  const ::ssize_t put = ::pwrite(file, &value, sizeof value, static_cast<::off_t>(offset));
  ::close(file);
  REQUIRE(put == static_cast<::ssize_t>(sizeof value));
}

constexpr std::size_t entry_of(strait::role who) {
  return offsetof(segment_header, ends) + static_cast<std::size_t>(who) * sizeof(strait::end_entry);
}
constexpr std::array both_roles{strait::role::sender, strait::role::receiver};

/// As if the machine had been started anew since the ends entered.
void reboot(const std::string& path) {
  for (const auto who : both_roles) {
    for (const std::size_t half : {offsetof(strait::end_entry, boot_high), offsetof(strait::end_entry, boot_low)}) {
      const std::size_t at = entry_of(who) + half;
      write_word(path, at, ~read_word<std::uint64_t>(path, at));
    }
  }
}

void send(strait::sender<number>& tx, number first, number count) {
  for (number i = first; i < first + count; ++i) REQUIRE(tx.try_send(i));
}
void take(strait::receiver<number>& rx, number first, number count) {
  for (number i = first; i < first + count; ++i) REQUIRE(rx.try_recv() == i);
}

}  // namespace

TEST_CASE("file: a name is a path, and a relative one means the same file wherever we go") {
  const auto absolute = strait::parse_memory_name("file:/var/lib/app/orders.ring");
  CHECK(absolute.scheme == strait::memory_scheme::file);
  CHECK(absolute.path() == "/var/lib/app/orders.ring");
  CHECK(absolute.text() == "file:/var/lib/app/orders.ring");
  CHECK(absolute.outlives_its_ends());
  CHECK_FALSE(strait::parse_memory_name("posix:orders").outlives_its_ends());
  const std::string here = std::filesystem::current_path();
  CHECK(strait::parse_memory_name("file:orders").path() == here + "/orders");
  CHECK(strait::parse_memory_name("file:a:b/../c").path() == here + "/a:b/../c");
  for (const std::string path : {"", "/", "/var/", ".", "..", "a/..", "a/."}) {
    CAPTURE(path);
    check_refused(errc::bad_name, {"file:" + path, "expected the path of a file"},
                  [&] { (void)strait::parse_memory_name("file:" + path); });
  }
  check_refused(errc::bad_name, {"a NUL"}, [&] { (void)strait::parse_memory_name(std::string{"file:a\0b", 8}); });
  check_refused(errc::bad_name, {"4096 bytes"},
                [] { (void)strait::parse_memory_name("file:/" + std::string(4095, 'n')); });
  check_refused(std::error_code{ENAMETOOLONG, std::system_category()}, {"opening /tmp/nnn"},
                [] { (void)strait::open_sender<number>("file:/tmp/" + std::string(256, 'n')); });
}

TEST_CASE("file: closing never removes it, and each that comes goes on exactly where the last one stopped") {
  const channel_name name = file_name("goes-on");
  number sent = 0;
  number taken = 0;
  // More than once around a ring whose head is released by eighths; alone, together, and in both orders of leaving.
  for (number session = 0; session < 60; ++session) {
    CAPTURE(session);
    std::optional<strait::sender<number>> tx;
    std::optional<strait::receiver<number>> rx;
    if (session % 3 != 1) tx = strait::open_sender<number>(name.text(), {.capacity = 64});
    if (session % 3 != 0) rx = strait::open_receiver<number>(name.text(), {.capacity = 64});
    if (tx) {
      const number more = std::min<number>(session % 23, 64 - (sent - taken));
      send(*tx, sent, more);
      sent += more;
    }
    if (rx) {
      CHECK(rx->depth() == sent - taken);
      const number more = std::min<number>(session * 7 % 19, sent - taken);
      take(*rx, taken, more);
      taken += more;
    }
    if (session % 2 == 0) tx.reset();
    rx.reset();
    tx.reset();
    CHECK(name.exists());
  }
  CHECK(taken > 64);
  auto rx = strait::open_receiver<number>(name.text());
  CHECK(rx.capacity() == 64);
  take(rx, taken, sent - taken);
}

TEST_CASE("file: the end of a stream, and a sender that comes back after it") {
  const channel_name name = file_name("end");
  {
    auto tx = strait::open_sender<number>(name.text());
    send(tx, 0, 5);
  }
  {
    auto rx = strait::open_receiver<number>(name.text());
    take(rx, 0, 2);
  }
  auto rx = strait::open_receiver<number>(name.text());
  take(rx, 2, 3);
  CHECK_FALSE(rx.blocking_recv());
  auto tx = strait::open_sender<number>(name.text());
  send(tx, 5, 1);
  take(rx, 5, 1);
}

TEST_CASE("child: sends into a file" * doctest::skip()) {
  if (!test::is_child()) return;
  auto tx = strait::open_sender<number>(test::parent_says(), {.capacity = 256});
  send(tx, 0, 100);
}

TEST_CASE("file: messages outlive the process that sent them") {
  const channel_name name = file_name("exit");
  test::other_process sender{"child: sends into a file"};
  sender.say(name.text());
  CHECK(sender.finish() == 0);
  auto rx = strait::open_receiver<number>(name.text(), {.open = open_mode::open});
  take(rx, 0, 100);
  CHECK_FALSE(rx.blocking_recv());
}

TEST_CASE("child: sends without end" * doctest::skip()) {
  if (!test::is_child()) return;
  auto tx = strait::open_sender<number>(test::parent_says(), {.capacity = 64});
  for (number i = 0;; ++i) {
    // Of two that are killed the second may be told of the first, and goes on all the same.
    for (std::error_code error{errc::peer_died}; error == errc::peer_died;) tx.blocking_send(i, error);
    if (i == 1'000) test::tell_parent("going");
  }
}
TEST_CASE("child: receives without end" * doctest::skip()) {
  if (!test::is_child()) return;
  auto rx = strait::open_receiver<number>(test::parent_says(), {.capacity = 64});
  for (number next = 0;; ++next) {
    std::optional<number> got;
    for (std::error_code error{errc::peer_died}; error == errc::peer_died;) got = rx.blocking_recv(error);
    REQUIRE(got == next);
    if (next % 1'024 == 0) test::tell_parent(std::to_string(next));
  }
}

TEST_CASE("file: both ends are killed, with or without a reboot, and the next ones go on") {
  for (const bool rebooted : {false, true}) {
    for (int round = 0; round < 4; ++round) {
      CAPTURE(rebooted);
      CAPTURE(round);
      const channel_name name = file_name("killed");
      number seen = 0;
      {
        test::other_process sender{"child: sends without end"};
        test::other_process receiver{"child: receives without end"};
        sender.say(name.text());
        receiver.say(name.text());
        REQUIRE(sender.hears() == "going");
        for (int i = 0; i <= round; ++i) seen = std::stoull(receiver.hears());
        if (round % 2 == 0) {
          sender.kill();
          receiver.kill();
        } else {
          receiver.kill();  // the sender may be parked, and wait for room, when its turn comes
          sender.kill();
        }
      }
      const auto entry = entry_of(strait::role::sender);
      const auto lives_on = read_word<std::uint32_t>(name.path(), entry + offsetof(strait::end_entry, presence));
      CHECK(lives_on != static_cast<std::uint32_t>(strait::presence::closed));
      if (rebooted) reboot(name.path());

      auto rx = strait::open_receiver<number>(name.text(), {.open = open_mode::open});
      if (rebooted) {
        // Nothing that the dead sender said of its process is left.
        for (const std::size_t word :
             {offsetof(strait::end_entry, process_high), offsetof(strait::end_entry, doorbell)}) {
          CHECK(read_word<std::uint64_t>(name.path(), entry + word) == 0);
        }
        CHECK(read_word<std::uint32_t>(name.path(), entry + offsetof(strait::end_entry, pid)) == 0);
      }
      // What the dead receiver had taken and not released comes again: less than an eighth of the ring. Nothing is
      // lost.
      std::optional<number> first;
      number next = 0;
      std::error_code error;
      while (const auto got = rx.blocking_recv(error)) {
        if (!first) {
          first = got;
          next = *got;
          CHECK(*got + 64 / 8 >= seen);
        }
        REQUIRE(*got == next);
        ++next;
      }
      CHECK(error == errc::peer_died);
      CHECK(next - first.value_or(0) <= 64);
      // Told once; then the stream goes on with whoever comes.
      auto tx = strait::open_sender<number>(name.text());
      send(tx, next, 60);
      take(rx, next, 60);
      tx.close();
      CHECK_FALSE(rx.blocking_recv(error));
      CHECK_FALSE(error);
    }
  }
}

TEST_CASE("file: after a reboot every end is dead, whatever its word says") {
  using strait::presence;
  for (const presence word : {presence::awake, presence::thread_parked, presence::hub_parked}) {
    CAPTURE(static_cast<std::uint32_t>(word));
    const channel_name name = file_name("reboot");
    {
      auto tx = strait::open_sender<number>(name.text(), {.capacity = 16});
      auto rx = strait::open_receiver<number>(name.text());
      send(tx, 0, 10);
      take(rx, 0, 4);
    }
    for (const auto who : both_roles) {
      write_word(name.path(), entry_of(who) + offsetof(strait::end_entry, presence), static_cast<std::uint32_t>(word));
    }
    reboot(name.path());
    auto tx = strait::open_sender<number>(name.text());
    std::error_code error;
    // The dead receiver is told of once, and then the sender goes on to fill the ring for the next.
    for (number i = 10; i < 20; ++i) {
      while (!tx.try_send(number{i}, error)) REQUIRE(error == errc::peer_died);
    }
    auto rx = strait::open_receiver<number>(name.text());
    number next = 4;
    while (next < 20) {
      const auto got = rx.try_recv(error);
      if (error) {
        REQUIRE(error == errc::peer_died);
        CHECK(next == 10);
        continue;
      }
      REQUIRE(got == next);
      ++next;
    }
  }
}

TEST_CASE("file: an end that lives under another boot lives on another machine") {
  const channel_name name = file_name("elsewhere");
  auto tx = strait::open_sender<number>(name.text());
  reboot(name.path());
  for (const auto mode : {open_mode::open_or_create, open_mode::open}) {
    check_refused(errc::end_in_use, {name.text(), "this machine", "living sender", "another boot"},
                  [&] { (void)strait::open_receiver<number>(name.text(), {.open = mode}); });
  }
  reboot(name.path());
  CHECK(strait::open_receiver<number>(name.text()).capacity() == tx.capacity());
}

TEST_CASE("file: what does not fit is refused in every mode and stays, for it is the user's") {
  const channel_name name = file_name("stays");
  {
    auto tx = strait::open_sender<number>(name.text(), {.capacity = 64});
  }
  const auto good = state_of(name.path()).bytes;
  const auto refused = [&](const std::error_code& expected, std::initializer_list<std::string_view> words,
                           auto&& attempt) {
    const auto before = state_of(name.path());
    for (const auto mode : all_modes) {
      CAPTURE(static_cast<int>(mode));
      check_refused(expected, words, [&] { attempt(mode); });
      CHECK(state_of(name.path()) == before);
    }
  };
  const auto enter = [&](open_mode mode) { (void)strait::open_receiver<number>(name.text(), {.open = mode}); };

  refused(errc::type_mismatch, {name.text(), "of 4 bytes", "of 8 bytes"},
          [&](open_mode mode) { (void)strait::open_receiver<std::uint32_t>(name.text(), {.open = mode}); });
  refused(errc::layout_mismatch, {name.text(), "a capacity of 128", "found 64"},
          [&](open_mode mode) { (void)strait::open_sender<number>(name.text(), {.capacity = 128, .open = mode}); });
  auto image = good;
  image.resize(image.size() - 8);
  test::write_file(name.path(), image);
  refused(errc::truncated_segment, {name.text(), std::to_string(good.size())}, enter);
  image.resize(100);
  test::write_file(name.path(), image);
  refused(errc::truncated_segment, {name.text(), "found 100"}, enter);
  test::write_file(name.path(), {});
  refused(errc::foreign_segment, {name.text()}, enter);
  test::write_file(name.path(), {'#', '!', '/', 'b', 'i', 'n', '/', 's', 'h', '\n'});
  refused(errc::foreign_segment, {name.text()}, enter);
  image = good;
  image[offsetof(segment_header, poisoned)] = 1;
  test::write_file(name.path(), image);
  refused(errc::corrupt, {name.text(), "poisoned"}, enter);
  image = good;
  image[offsetof(segment_header, layout_version)] = 1;
  test::write_file(name.path(), image);
  refused(errc::version_mismatch, {name.text(), "found 1"}, enter);

  // It fits, but is there; for whoever enters it is as good as before.
  test::write_file(name.path(), good);
  const auto before = state_of(name.path());
  check_refused(std::error_code{EEXIST, std::system_category()}, {name.text(), "found one"},
                [&] { enter(open_mode::create); });
  CHECK(state_of(name.path()) == before);
  enter(open_mode::open);
}

TEST_CASE("file: a directory that is not there, and one that is a file") {
  const directory here;
  for (const std::string& path : {here.path() + "/none/orders.ring", here.path() + "/plain/orders.ring"}) {
    test::write_file(here.path() + "/plain", {'x'});
    CAPTURE(path);
    CHECK_THROWS_WITH_AS((void)strait::open_sender<number>("file:" + path), doctest::Contains(path.c_str()),
                         std::system_error);
    CHECK(here.listing().size() == 1);
  }
}

TEST_CASE("child: finds files that it may not write" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string file = test::parent_says();
  const std::string in_a_closed_directory = test::parent_says();
  test::become_nobody();
  for (const auto mode : all_modes) {
    check_refused(errc::no_permission, {file, "user 65534", "user 0", "mode 0444"},
                  [&] { (void)strait::open_sender<number>(file, {.open = mode}); });
  }
  check_refused(std::error_code{EACCES, std::system_category()}, {in_a_closed_directory, "creating a file in"},
                [&] { (void)strait::open_sender<number>(in_a_closed_directory); });
}

TEST_CASE("file: one that may only be read is an error that says so") {
  if (::geteuid() != 0) {
    MESSAGE("skipped: expected to be root, who can become nobody; found user ", ::geteuid());
    return;
  }
  const directory here;
  {
    auto tx = strait::open_sender<number>(here.channel());
  }
  std::filesystem::permissions(here.ring(), std::filesystem::perms{0444});
  std::filesystem::permissions(here.path(), std::filesystem::perms{0555});
  const auto before = state_of(here.ring());
  test::other_process nobody{"child: finds files that it may not write"};
  nobody.say(here.channel());
  nobody.say(here.channel() + ".new");
  CHECK(nobody.finish() == 0);
  CHECK(state_of(here.ring()) == before);
}

TEST_CASE("child: on a file system of its own" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string path = test::parent_says();
  if (::unshare(CLONE_NEWNS) != 0 || ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
      ::mount("none", path.c_str(), "tmpfs", 0, "size=1m") != 0) {
    test::tell_parent("not allowed");
    return;
  }
  test::tell_parent("mounted");
  const std::string channel = "file:" + path + "/orders.ring";
  // Full: an error when it is made, and nothing is left of it.
  check_refused(errc::no_space, {channel, "free bytes in " + path, "found 1048576"},
                [&] { (void)strait::open_sender<number>(channel, {.capacity = 1U << 20U}); });
  CHECK(std::filesystem::is_empty(path));
  {
    auto tx = strait::open_sender<number>(channel, {.capacity = 64});
    send(tx, 0, 7);
  }
  {
    std::ofstream filler{path + "/filler"};
    const std::string page(4096, 'f');
    while (filler.write(page.data(), static_cast<std::streamsize>(page.size())).flush()) {
    }
  }
  // What is there needs no more room.
  auto rx = strait::open_receiver<number>(channel);
  take(rx, 0, 7);
  rx.close();
  check_refused(errc::no_space, {channel + "-2", "found 0"},
                [&] { (void)strait::open_sender<number>(channel + "-2"); });

  // Read-only: neither to be made nor to be entered.
  REQUIRE(::mount(nullptr, path.c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr) == 0);
  for (const std::string& name : {channel, channel + "-2"}) {
    check_refused(std::error_code{EROFS, std::system_category()}, {name},
                  [&] { (void)strait::open_sender<number>(name); });
  }
}

TEST_CASE("file: a full file system and a read-only one are errors, and nothing is left") {
  const directory here;
  test::other_process child{"child: on a file system of its own"};
  child.say(here.path());
  const std::string allowed = child.hears();
  CHECK(child.finish() == 0);
  if (allowed != "mounted") {
    MESSAGE("skipped: expected the right to mount a tmpfs in a namespace of our own (root), found none");
  }
}

#ifdef SYS_link  // 64-bit x86, whose C library makes these system calls for link and unlink

namespace {

/// No file system knows nameless files any more, and one system call more has its own end.
void forget_nameless_files(long call, std::uint32_t end) {
  constexpr std::uint32_t nameless = O_TMPFILE & ~O_DIRECTORY;
  std::array filter{
      ::sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(::seccomp_data, nr)),
      ::sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(call), 0, 1),
      ::sock_filter BPF_STMT(BPF_RET | BPF_K, end),
      ::sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat, 0, 3),
      ::sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(::seccomp_data, args[2])),
      ::sock_filter BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, nameless, 0, 1),
      ::sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EOPNOTSUPP),
      ::sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const ::sock_fprog program{filter.size(), filter.data()};
  REQUIRE(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
  REQUIRE(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

}  // namespace

TEST_CASE("child: knows no nameless files" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string channel = test::parent_says();
  const std::string what = test::parent_says();
  (void)strait::this_process();  // its socket's files are no matter of this test
  if (what == "links") forget_nameless_files(-1, SECCOMP_RET_ALLOW);
  if (what == "renames") forget_nameless_files(SYS_link, SECCOMP_RET_ERRNO | EPERM);
  if (what == "dies before the name") forget_nameless_files(SYS_link, SECCOMP_RET_KILL_PROCESS);
  if (what == "dies after the name") forget_nameless_files(SYS_unlink, SECCOMP_RET_KILL_PROCESS);
  auto tx = strait::open_sender<number>(channel, {.capacity = 16});
  send(tx, 0, 3);
}

TEST_CASE("file: where the file system knows no nameless files a channel is made under a makeshift name") {
  const directory here;
  const auto make = [&](const std::string& how) {
    test::other_process child{"child: knows no nameless files"};
    child.say(here.channel());
    child.say(how);
    return child.finish();
  };
  const auto check_made = [&] {
    CHECK(here.listing() == std::vector<std::string>{"orders.ring"});
    auto rx = strait::open_receiver<number>(here.channel(), {.open = open_mode::open});
    take(rx, 0, 3);
  };
  SUBCASE("which is linked") {
    CHECK(make("links") == 0);
    check_made();
  }
  SUBCASE("which is renamed, where files have one name only") {
    CHECK(make("renames") == 0);
    check_made();
  }
  SUBCASE("which the next creator clears away when its maker dies") {
    CHECK(make("dies before the name") != 0);
    const auto left = here.listing();
    REQUIRE(left.size() == 1);
    CHECK(left[0].starts_with(".strait-new-"));
    CHECK(make("links") == 0);
    check_made();
  }
  SUBCASE("which the next comer clears away when its maker dies with both names there") {
    CHECK(make("dies after the name") != 0);
    CHECK(here.listing().size() == 2);
    {
      auto tx = strait::open_sender<number>(here.channel());
      send(tx, 0, 3);
    }
    check_made();
  }
}

#endif

namespace {

/// A directory on a disk; none where both of those that every test has are memory.
std::optional<std::filesystem::path> on_a_disk() {
  for (const auto& where : {std::filesystem::temp_directory_path(), std::filesystem::current_path()}) {
    struct ::statfs system{};
    constexpr long in_memory = 0x0102'1994;  // tmpfs
    if (::statfs(where.c_str(), &system) == 0 && system.f_type != in_memory) return where;
  }
  return std::nullopt;
}

/// How much of what this process has mapped of the file was written to and is not on its disk yet.
std::size_t not_on_disk(const std::string& path) {
  std::ifstream file{"/proc/self/smaps"};
  std::size_t kilobytes = 0;
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    if (line.find('-') < line.find(':')) inside = line.ends_with(path);  // "7f00-7f20 rw-s ...": begins a mapping
    const std::string_view key = std::string_view{line}.substr(0, line.find(':'));
    if (inside && (key == "Shared_Dirty" || key == "Private_Dirty"))
      kilobytes += std::stoul(line.substr(key.size() + 1));
  }
  return kilobytes * 1024;
}

constexpr std::size_t head_in_file = offsetof(segment_header, lane) + offsetof(strait::lane_control<>, head);

}  // namespace

TEST_CASE("file: sync has the disk hold what was sent and what was taken") {
  const auto disk = on_a_disk();
  if (!disk) {
    MESSAGE("skipped: expected a disk under the temporary or the working directory, found memory");
    return;
  }
  const directory here{*disk};
  auto tx = strait::open_sender<number>(here.channel(), {.capacity = 4096});
  auto rx = strait::open_receiver<number>(here.channel());
  send(tx, 0, 3000);
  REQUIRE(not_on_disk(here.ring()) >= 3000 * sizeof(number));
  tx.sync();
  CHECK(not_on_disk(here.ring()) == 0);
  // Fewer than are released at a time, and now they are.
  take(rx, 0, 10);
  REQUIRE(read_word<std::uint64_t>(here.ring(), head_in_file) == 0);
  rx.sync();
  CHECK(read_word<std::uint64_t>(here.ring(), head_in_file) == 10);
  CHECK(not_on_disk(here.ring()) == 0);
  // The stream goes on.
  send(tx, 3000, 1000);
  take(rx, 10, 3990);
}

TEST_CASE("file: when power fails after sync nothing is lost and nothing comes twice") {
  const directory here;
  const std::string before = here.path() + "/before.ring";
  const std::string after = here.path() + "/after.ring";
  {
    auto tx = strait::open_sender<number>(here.channel(), {.capacity = 64});
    auto rx = strait::open_receiver<number>(here.channel());
    send(tx, 0, 5);
    take(rx, 0, 2);
    std::filesystem::copy_file(here.ring(), before);
    rx.sync();
    std::filesystem::copy_file(here.ring(), after);  // what the disk holds now
  }
  for (const auto& [path, first] : {std::pair{before, number{0}}, std::pair{after, number{2}}}) {
    reboot(path);
    auto rx = strait::open_receiver<number>("file:" + path);
    take(rx, first, 5 - first);
    std::error_code error;
    CHECK_FALSE(rx.try_recv(error));
    CHECK(error == errc::peer_died);
  }
}

TEST_CASE("child: its disk is broken" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string on_disk = test::parent_says();
  const std::string in_memory = test::parent_says();
  auto tx = strait::open_sender<number>(on_disk, {.capacity = 64});
  auto rx = strait::open_receiver<number>(on_disk);
  auto other_tx = strait::open_sender<number>(in_memory, {.capacity = 64});
  test::refuse_call(SYS_msync, EIO);
  const std::error_code broken{EIO, std::system_category()};
  check_refused(broken, {on_disk, "disk"}, [&] { tx.sync(); });
  check_refused(broken, {on_disk, "disk"}, [&] { rx.sync(); });
  send(tx, 0, 5);
  take(rx, 0, 5);
  other_tx.sync();  // there is no disk to ask
}
TEST_CASE("file: a disk that fails is an error of sync and of nothing else; and who may not ask is told so") {
  const channel_name on_disk = file_name("broken");
  const channel_name in_memory{"no-disk", test::posix_memory::scheme};
  test::other_process child{"child: its disk is broken"};
  child.say(on_disk.text());
  child.say(in_memory.text());
  CHECK(child.finish() == 0);

  auto tx = strait::open_sender<number>(on_disk.text());
  const ::pid_t forked = ::fork();
  if (forked == 0) {
    std::error_code error;
    try {
      tx.sync();
    } catch (const std::system_error& caught) {
      error = caught.code();
    }
    ::_exit(error == errc::inherited ? 0 : 1);
  }
  int status = -1;
  CHECK(::waitpid(forked, &status, 0) == forked);
  CHECK(status == 0);
  tx.close();
  check_refused(errc::closed, {"closed"}, [&] { tx.sync(); });
}
