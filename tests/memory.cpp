#include <doctest/doctest.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "less_rights.hpp"
#include "other_process.hpp"
#include "segment_files.hpp"

import strait.error;
import strait.memory;

using namespace std::string_view_literals;
using strait::errc;
using strait::open_mode;
using strait::verdict;
using test::channel_name;
using test::check_refused;
using test::state_of;

namespace {

constexpr std::size_t segment_bytes = 8192;
constexpr std::string_view mark = "a segment of this test";

/// A segment that begins with `mark`, as the room above would ask for one. Byte 1 is the lock of who lives in it.
struct test_segment {
  strait::memory_name name;
  open_mode mode = open_mode::open_or_create;
  std::size_t bytes = segment_bytes;
  unsigned permissions = 0600;
  strait::page_wishes pages = {};
  std::optional<unsigned> group = std::nullopt;
  std::chrono::steady_clock::time_point deadline{};
  /// What is to be done with one that is there.
  verdict judgement = verdict::enter;

  [[nodiscard]] strait::segment open() const {
    strait::segment_plan plan;
    plan.bytes = bytes;
    plan.mode = permissions;
    plan.pages = pages;
    plan.group = group;
    plan.fill = [](std::byte* memory) { std::memcpy(memory, mark.data(), mark.size()); };
    const auto checked = [](std::span<const std::byte> header) {
      if (header.size() < mark.size() || std::memcmp(header.data(), mark.data(), mark.size()) != 0) {
        strait::fail(errc::foreign_segment, "expected the mark, found none");
      }
      return segment_bytes;
    };
    return strait::open_segment(
        name, mode, deadline, plan, mark.size(),
        [&](std::span<const std::byte> header, std::uint64_t, const strait::file_locks&) {
          checked(header);
          return judgement;
        },
        checked);
  }
};

std::string text_of(const strait::segment& segment) {
  return std::string{reinterpret_cast<const char*>(segment.map.data()), mark.size()};
}

bool may_mount() {
  // In a process of its own: a namespace that was left cannot be entered again without more rights.
  test::other_process child{"child: may mount"};
  return child.finish() == 0;
}

}  // namespace

TEST_CASE("memory: a name is taken apart, and without a scheme it is a POSIX one") {
  const auto with = strait::parse_memory_name("posix:orders");
  CHECK(with.scheme == strait::memory_scheme::posix);
  CHECK(with.name == "orders");
  CHECK(with.text() == "posix:orders");
  const auto without = strait::parse_memory_name("orders");
  CHECK(without.scheme == strait::memory_scheme::posix);
  CHECK(without.name == "orders");
  CHECK(without.text() == "posix:orders");
  // Only the first colon ends a scheme, and dots are letters like others.
  CHECK(strait::parse_memory_name("posix:a:b").name == "a:b");
  CHECK(strait::parse_memory_name("...").name == "...");
  CHECK(strait::parse_memory_name(".orders.1").name == ".orders.1");
  CHECK(strait::parse_memory_name(std::string(255, 'n')).name.size() == 255);
  CHECK(strait::parse_memory_name("posix:" + std::string(255, 'n')).name.size() == 255);
}

TEST_CASE("memory: an unknown scheme is refused by name") {
  check_refused(errc::unknown_scheme, {"\"posix:\"", "\"file:\"", "\"shm:\"", "shm:orders"},
                [] { (void)strait::parse_memory_name("shm:orders"); });
  check_refused(errc::unknown_scheme, {"\"Posix:\""}, [] { (void)strait::parse_memory_name("Posix:orders"); });
  check_refused(errc::unknown_scheme, {"\":\""}, [] { (void)strait::parse_memory_name(":orders"); });
  check_refused(errc::unknown_scheme, {"\"a:\""}, [] { (void)strait::parse_memory_name("a:posix:b"); });
}

TEST_CASE("memory: an unusable name is refused, and the text tells which and why") {
  const auto refused = [](std::string_view name, std::string_view found) {
    CAPTURE(std::string{name});
    check_refused(errc::bad_name, {"1 to 255 characters", found}, [&] { (void)strait::parse_memory_name(name); });
  };
  for (const std::string scheme : {"", "posix:"}) {
    refused(scheme, "an empty name");
    refused(scheme + "/orders", "a '/'");
    refused(scheme + "app/orders", "a '/'");
    refused(scheme + "../orders", "a '/'");
    refused(scheme + ".", "a directory");
    refused(scheme + "..", "a directory");
    refused(scheme + std::string(256, 'n'), "256 characters");
    refused(scheme + std::string{"or\0ders", 7}, "a NUL");
    refused(scheme + std::string{"\0", 1}, "a NUL");
  }
}

TEST_CASE("memory: an error text shows bytes that a terminal would not") {
  check_refused(errc::bad_name, {"or\\x00ders", "a NUL"}, [] { (void)strait::parse_memory_name("posix:or\0ders"sv); });
  check_refused(errc::unknown_scheme, {"a\\x1b[31m:b"}, [] { (void)strait::parse_memory_name("a\x1b[31m:b"); });
}

TEST_CASE("memory: anonymous pages are there, zero, and gone with their owner") {
  auto pages = strait::mapping::anonymous(10'000, {});
  CHECK(pages.size() == 10'000);
  CHECK(std::all_of(pages.data(), pages.data() + 10'000, [](std::byte b) { return b == std::byte{0}; }));
  pages.data()[9'999] = std::byte{7};
  pages.populate();
  CHECK(pages.data()[9'999] == std::byte{7});
  std::byte* const at = pages.data();
  strait::mapping moved{std::move(pages)};
  CHECK(moved.data() == at);
  CHECK(pages.data() == nullptr);
  CHECK(pages.size() == 0);
  pages = std::move(moved);
  CHECK(pages.data() == at);
}

TEST_CASE("child: no MADV_POPULATE_WRITE" * doctest::skip()) {
  if (!test::is_child()) return;
  constexpr std::uint32_t populate_write = 23;
  std::array filter{
      ::sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(::seccomp_data, nr)),
      ::sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 0, 3),
      ::sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(::seccomp_data, args[2])),
      ::sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, populate_write, 0, 1),
      ::sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EINVAL),
      ::sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const ::sock_fprog program{filter.size(), filter.data()};
  REQUIRE(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
  REQUIRE(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
  constexpr std::size_t pages = 256;
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  REQUIRE(::madvise(nullptr, 0, populate_write) == -1);

  const auto faults_of = [&](const strait::mapping& memory) {
    const auto faults = [] {
      ::rusage usage{};
      ::getrusage(RUSAGE_SELF, &usage);
      return usage.ru_minflt;
    };
    const long before = faults();
    for (std::size_t i = 0; i < pages; ++i) const_cast<volatile std::byte*>(memory.data())[i * page] = std::byte{1};
    return faults() - before;
  };
  CHECK(faults_of(strait::mapping::anonymous(pages * page, {})) < 16);
  const channel_name name{"touched"};
  const auto parsed = strait::parse_memory_name(name.text());
  CHECK(faults_of(test_segment{.name = parsed, .bytes = pages * page}.open().map) < 16);
}

TEST_CASE("memory: pages are touched where the kernel is older than MADV_POPULATE_WRITE") {
  test::other_process child{"child: no MADV_POPULATE_WRITE"};
  CHECK(child.finish() == 0);
}

TEST_CASE("memory: more than the address space holds is no_space") {
  check_refused(errc::no_space, {"expected room for", std::to_string(std::size_t{1} << 60)},
                [] { (void)strait::mapping::anonymous(std::size_t{1} << 60, {}); });
}

TEST_CASE("memory: a node that is not there is an error that names it and those that are") {
  const auto& nodes = strait::memory_nodes();
  REQUIRE_FALSE(nodes.empty());
  CHECK(std::ranges::is_sorted(nodes));
  for (const unsigned node : {1000U, 1'000'000U}) {
    CAPTURE(node);
    const std::string found = "found node " + std::to_string(node);
    const std::string expected = '(' + std::to_string(nodes.front());
    check_refused(std::error_code{EINVAL, std::system_category()}, {"private memory", expected, found},
                  [&] { (void)strait::mapping::anonymous(4096, {.node = node}); });
    const channel_name name{"node"};
    check_refused(std::error_code{EINVAL, std::system_category()}, {name.text(), expected, found}, [&] {
      (void)test_segment{.name = strait::parse_memory_name(name.bare()), .pages = {.node = node}}.open();
    });
    CHECK_FALSE(name.exists());
    auto placed = strait::mapping::anonymous(4096, {.node = nodes.front()});
    CHECK(placed.size() == 4096);
    check_refused(std::error_code{EINVAL, std::system_category()}, {"private memory", expected, found},
                  [&] { placed.ask_for_node(node, "private memory"); });
  }
  const auto near = strait::nearest_memory_node();
  if (near) CHECK(std::ranges::find(nodes, *near) != nodes.end());
}

namespace {

std::size_t base_page() {
  return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

std::size_t placed_pages(const strait::page_report& report) {
  std::size_t pages = 0;
  for (const auto& share : report.nodes) {
    const auto& nodes = strait::memory_nodes();
    CHECK(std::ranges::find(nodes, share.node) != nodes.end());
    pages += share.pages;
  }
  return pages;
}

}  // namespace

TEST_CASE("memory: the report tells where the pages are, and of what kind") {
  constexpr std::size_t pages = 10;
  const auto touched = strait::mapping::anonymous(pages * base_page() - 1, {}).report();
  CHECK(touched.bytes == pages * base_page());
  CHECK(touched.nodes_refused.empty());
  CHECK(placed_pages(touched) == pages);
  CHECK(touched.untouched == 0);
  CHECK(touched.page_bytes == base_page());
  CHECK(touched.locked_bytes == 0);
  CHECK(touched.shortfall.empty());
  const auto untouched = strait::mapping::anonymous(pages * base_page(), {.prefault = false}).report();
  CHECK(placed_pages(untouched) == 0);
  CHECK(untouched.untouched == pages);

  const channel_name name{"report"};
  const auto parsed = strait::parse_memory_name(name.text());
  const auto made = test_segment{.name = parsed, .pages = {.prefault = false}}.open();
  // It is filled by its maker; the rest is there, but not touched by this process.
  CHECK(placed_pages(made.map.report()) == 1);
  CHECK(made.map.report().untouched == segment_bytes / base_page() - 1);
  struct ::stat file{};
  REQUIRE(::stat(name.path().c_str(), &file) == 0);
  CHECK(file.st_blocks * 512 >= static_cast<::off_t>(segment_bytes));
}

TEST_CASE("memory: pages are asked to move, and stay usable") {
  auto memory = strait::mapping::anonymous(4 * base_page(), {});
  memory.data()[base_page()] = std::byte{7};
  CHECK_FALSE(memory.move_to(strait::memory_nodes().back()));
  CHECK(memory.data()[base_page()] == std::byte{7});
  CHECK(memory.report().nodes == std::vector<strait::node_share>{{strait::memory_nodes().back(), 4}});
}

TEST_CASE("child: no move_pages" * doctest::skip()) {
  if (!test::is_child()) return;
  test::refuse_call(SYS_move_pages, EPERM);
  const auto report = strait::mapping::anonymous(4 * base_page(), {}).report();
  CHECK(report.nodes.empty());
  CHECK(report.nodes_refused == std::system_category().message(EPERM));
  CHECK(report.page_bytes == base_page());
}

TEST_CASE("memory: where the kernel does not tell the nodes, the report says so") {
  test::other_process child{"child: no move_pages"};
  CHECK(child.finish() == 0);
}

TEST_CASE("memory: transparent huge pages are had on request, or the report says why not") {
  constexpr std::size_t huge = std::size_t{2} << 20;
  const channel_name name{"transparent"};
  const auto parsed = strait::parse_memory_name(name.text());
  const auto check = [&](const strait::mapping& memory) {
    const auto report = memory.report();
    MESSAGE(report.transparent_bytes, " of ", report.bytes, " bytes; ", report.shortfall);
    if (report.shortfall.empty()) {
      CHECK(report.transparent_bytes == report.bytes);
      CHECK(report.bytes % huge == 0);
    } else {
      CHECK(report.transparent_bytes < report.bytes);
      CHECK(report.shortfall.find("transparent huge pages: expected " + std::to_string(report.bytes)) !=
            std::string::npos);
    }
  };
  auto memory = strait::mapping::anonymous(segment_bytes, {.kind = strait::page_kind::transparent});
  CHECK(memory.size() == segment_bytes);
  check(memory);
  auto made = test_segment{.name = parsed, .pages = {.kind = strait::page_kind::transparent}}.open();
  CHECK(made.map.size() == segment_bytes);
  check(made.map);
  made.locks.unlock(strait::gate_byte);
  // Who does not ask for them enters the same memory.
  CHECK(text_of(test_segment{.name = parsed}.open()) == mark);
  // Only the kernel decides where nobody touches them.
  const auto later =
      strait::mapping::anonymous(huge, {.kind = strait::page_kind::transparent, .prefault = false}).report();
  CHECK(later.shortfall.find("when they are touched") != std::string::npos);
}

TEST_CASE("memory: memory that is handed over has huge pages, too, and is no longer than they are") {
  const strait::memory_name name{.scheme = strait::memory_scheme::handed_over, .name = "/tmp/strait-test"};
  for (const auto kind : {strait::page_kind::transparent, strait::page_kind::huge}) {
    strait::segment_plan plan;
    plan.bytes = segment_bytes;
    plan.pages.kind = kind;
    plan.fill = [](std::byte* memory) { std::memcpy(memory, mark.data(), mark.size()); };
    strait::unshared_descriptor memory;
    const auto made = strait::make_sealed_segment(name, plan, memory);
    const auto report = made.map.report();
    const std::size_t page = std::max(report.page_bytes, std::size_t{2} << 20);
    MESSAGE(strait::to_string(kind), ": ", report.page_bytes, ", ", report.transparent_bytes, " of ", report.bytes,
            " bytes; ", report.shortfall);
    struct ::stat file{};
    REQUIRE(::fstat(memory.get(), &file) == 0);
    CHECK((file.st_size == segment_bytes || static_cast<std::size_t>(file.st_size) == page));
    CHECK((report.page_bytes > base_page() || report.transparent_bytes == report.bytes || !report.shortfall.empty()));
    const auto entered = strait::enter_sealed_segment(name, memory.get(), mark.size(),
                                                      [](std::span<const std::byte>) { return segment_bytes; }, {});
    CHECK(text_of(entered) == mark);
    CHECK(entered.map.size() == segment_bytes);
    // Longer than the header says by anything else.
    plan.bytes = report.bytes + 1;
    strait::unshared_descriptor longer;
    (void)strait::make_sealed_segment(name, plan, longer);
    check_refused(errc::layout_mismatch, {"expected a segment of " + std::to_string(segment_bytes)}, [&] {
      (void)strait::enter_sealed_segment(name, longer.get(), mark.size(),
                                         [](std::span<const std::byte>) { return segment_bytes; }, {});
    });
  }
}

TEST_CASE("memory: huge pages that were set aside are used, and without them there is a fallback that is told") {
  const auto report = strait::mapping::anonymous(segment_bytes, {.kind = strait::page_kind::huge}).report();
  MESSAGE(report.page_bytes, " bytes a page; ", report.shortfall);
  if (report.page_bytes > base_page()) {
    CHECK(report.shortfall.empty());
    CHECK(report.bytes % report.page_bytes == 0);
  } else {
    CHECK(report.shortfall.find("no hugetlb pages") != std::string::npos);
  }
  // A name in /dev/shm is no place for them.
  const channel_name name{"huge"};
  const auto made =
      test_segment{.name = strait::parse_memory_name(name.text()), .pages = {.kind = strait::page_kind::huge}}.open();
  CHECK(made.map.report().shortfall.find("expected a file of hugetlbfs") != std::string::npos);
}

TEST_CASE("memory: a System V segment has huge pages where they were set aside, and without them it says why") {
  const channel_name name{"huge", test::system_v_memory::scheme};
  const auto parsed = strait::parse_memory_name(name.text());
  const strait::page_wishes wishes{.kind = strait::page_kind::huge};
  auto made = test_segment{.name = parsed, .pages = wishes}.open();
  made.locks.unlock(strait::gate_byte);
  const auto entered = test_segment{.name = parsed, .pages = wishes}.open();
  CHECK(text_of(entered) == mark);
  const auto report = made.map.report();
  const auto other_report = entered.map.report();
  MESSAGE(report.page_bytes, " bytes a page; ", report.shortfall, "; entered: ", other_report.shortfall);
  CHECK(other_report.page_bytes == report.page_bytes);
  if (report.page_bytes > base_page()) {
    CHECK(report.shortfall.empty());
    CHECK(report.bytes % report.page_bytes == 0);
  } else {
    CHECK(report.shortfall.find("no hugetlb pages: expected 1 free ones") != std::string::npos);
    CHECK(other_report.shortfall.find("no hugetlb pages: expected a System V segment that was made of them") !=
          std::string::npos);
  }
}

TEST_CASE("child: little may be locked" * doctest::skip()) {
  if (!test::is_child()) return;
  const channel_name name{"locked"};
  const auto parsed = strait::parse_memory_name(name.text());
  const auto limit = static_cast<::rlim_t>(base_page());
  const ::rlimit few{.rlim_cur = limit, .rlim_max = limit};
  REQUIRE(::setrlimit(RLIMIT_MEMLOCK, &few) == 0);
  if (::geteuid() == 0) REQUIRE(::setresuid(65534, 65534, 65534) == 0);  // root may lock as much as it likes
  const std::string shown = "a limit of " + std::to_string(base_page()) + " bytes";
  const std::error_code no_memory{ENOMEM, std::system_category()};
  check_refused(no_memory, {"private memory", shown, "RLIMIT_MEMLOCK"},
                [] { (void)strait::mapping::anonymous(segment_bytes, {.lock = true}); });
  check_refused(no_memory, {name.text(), shown, "RLIMIT_MEMLOCK"},
                [&] { (void)test_segment{.name = parsed, .pages = {.lock = true}}.open(); });
  CHECK_FALSE(name.exists());
}

TEST_CASE("memory: locked pages are reported, and more than the limit is an error that names it") {
  const auto locked = strait::mapping::anonymous(segment_bytes, {.prefault = false, .lock = true}).report();
  CHECK(locked.locked_bytes == segment_bytes);
  CHECK(locked.untouched == 0);
  test::other_process child{"child: little may be locked"};
  CHECK(child.finish() == 0);
}

TEST_CASE("memory: a lock is held by one description, whoever owns the descriptor") {
  const channel_name name{"locks"};
  test::write_file(name.path(), {});
  const auto open = [&] { return strait::file_locks{name.path().c_str(), O_RDWR | O_CLOEXEC, 0}; };
  auto mine = open();
  auto other = open();
  REQUIRE(mine.try_lock(1));
  CHECK(mine.try_lock(1));  // again is nothing new
  CHECK_FALSE(other.try_lock(1));
  CHECK(other.held_by_other(1));
  CHECK_FALSE(mine.held_by_other(1));
  CHECK(other.try_lock(2));  // bytes are separate, also far behind the end of the file
  CHECK(other.try_lock(1ULL << 40));
  mine.unlock(1);
  CHECK(other.try_lock(1));
  CHECK(mine.held_by_other(1));
  {
    auto taken_over = std::move(other);
    CHECK(other.descriptor() == -1);
    CHECK(mine.held_by_other(1));
  }
  CHECK_FALSE(mine.held_by_other(1));
  CHECK_FALSE(mine.held_by_other(2));
}

TEST_CASE("memory: a file that cannot be opened leaves the reason, and no lock") {
  const channel_name name{"absent"};
  errno = 0;
  strait::file_locks none{name.path().c_str(), O_RDWR | O_CLOEXEC, 0};
  CHECK(errno == ENOENT);
  CHECK(none.descriptor() == -1);
  CHECK_FALSE(none.try_lock(1));
}

TEST_CASE("memory: a child of fork holds no lock and drops none") {
  const channel_name name{"fork"};
  test::write_file(name.path(), {});
  strait::file_locks mine{name.path().c_str(), O_RDWR | O_CLOEXEC, 0};
  REQUIRE(mine.try_lock(1));
  const std::uint32_t generation = strait::fork_generation();
  const ::pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const bool closed = ::fcntl(mine.descriptor(), F_GETFD) == -1 && errno == EBADF;
    const bool counted = strait::fork_generation() == generation + 1;
    const int number = mine.descriptor();
    // The number is somebody else's by now: the destructor must not close it.
    const bool reused = ::dup2(STDERR_FILENO, number) == number;
    mine = strait::file_locks{};
    const bool spared = ::fcntl(number, F_GETFD) != -1;
    ::_exit(closed && counted && reused && spared ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  const strait::file_locks other{name.path().c_str(), O_RDWR | O_CLOEXEC, 0};
  CHECK(other.held_by_other(1));
  CHECK(strait::fork_generation() == generation);
}

TEST_CASE_TEMPLATE("memory: a segment appears whole, and its gate is held", memory, STRAIT_NAMED_MEMORIES) {
  const channel_name name{"whole", memory::scheme};
  const auto parsed = strait::parse_memory_name(name.text());
  auto made = test_segment{.name = parsed}.open();
  CHECK(made.created);
  CHECK(made.map.size() == segment_bytes);
  CHECK(text_of(made) == mark);
  CHECK(state_of(name).bytes.size() >= segment_bytes);
  if (!name.is_system_v()) {
    struct ::stat file{};
    REQUIRE(::stat(name.path().c_str(), &file) == 0);
    CHECK(file.st_size == segment_bytes);
    CHECK(file.st_blocks * 512 >= static_cast<::off_t>(segment_bytes));  // really there, not a hole
  }
  CHECK((::fcntl(made.locks.descriptor(), F_GETFD) & FD_CLOEXEC) != 0);

  // The next comer waits at the gate, and sees the same memory.
  std::atomic<bool> in{false};
  std::thread next{[&] {
    auto found = test_segment{.name = parsed}.open();
    CHECK_FALSE(found.created);
    CHECK(text_of(found) == mark);
    found.map.data()[100] = std::byte{42};
    in = true;
  }};
  const strait::file_locks onlooker{name.path().c_str(), O_RDWR | O_CLOEXEC, 0};
  CHECK(onlooker.held_by_other(strait::gate_byte));
  CHECK_FALSE(in);
  made.locks.unlock(strait::gate_byte);
  next.join();
  CHECK(made.map.data()[100] == std::byte{42});
  strait::remove_name(parsed, made.locks);
  CHECK_FALSE(name.exists());
}

TEST_CASE_TEMPLATE("memory: create and open say what they expected of the name", memory, STRAIT_NAMED_MEMORIES) {
  const channel_name name{"modes", memory::scheme};
  const auto parsed = strait::parse_memory_name(name.text());
  check_refused(std::error_code{ENOENT, std::system_category()}, {name.text(), "an existing channel", name.path()},
                [&] { (void)test_segment{.name = parsed, .mode = open_mode::open}.open(); });
  CHECK_FALSE(name.exists());
  {
    auto made = test_segment{.name = parsed, .mode = open_mode::create}.open();
    CHECK(made.created);
  }
  const auto before = state_of(name);
  check_refused(std::error_code{EEXIST, std::system_category()}, {name.text(), "no channel", "found one"},
                [&] { (void)test_segment{.name = parsed, .mode = open_mode::create}.open(); });
  CHECK(state_of(name) == before);
  CHECK_FALSE(test_segment{.name = parsed, .mode = open_mode::open}.open().created);
  CHECK_FALSE(test_segment{.name = parsed}.open().created);
}

TEST_CASE_TEMPLATE("memory: what is to be replaced is replaced, by a file of its own", memory, STRAIT_NAMED_MEMORIES) {
  const channel_name name{"replace", memory::scheme};
  const auto parsed = strait::parse_memory_name(name.text());
  auto old = test_segment{.name = parsed}.open();
  old.map.data()[200] = std::byte{1};
  old.locks.unlock(strait::gate_byte);
  auto replaced = test_segment{.name = parsed, .judgement = verdict::replace}.open();
  CHECK(replaced.created);
  CHECK(replaced.map.data()[200] == std::byte{0});
  CHECK(old.map.data()[200] == std::byte{1});

  // A name is taken away only by who still owns it.
  old.locks.lock(strait::gate_byte);
  strait::remove_name(parsed, old.locks);
  CHECK(name.exists());
  strait::remove_name(parsed, replaced.locks);
  CHECK_FALSE(name.exists());
  strait::remove_name(parsed, replaced.locks);  // once more is harmless
}

TEST_CASE_TEMPLATE("memory: the mode is what was asked for, whatever the umask", memory, STRAIT_NAMED_MEMORIES) {
  const ::mode_t before = ::umask(0077);
  for (const unsigned mode : {0600U, 0640U, 0660U, 0666U, 0400U}) {
    CAPTURE(mode);
    const channel_name name{"mode", memory::scheme};
    auto made = test_segment{.name = strait::parse_memory_name(name.text()), .permissions = mode}.open();
    struct ::stat file{};
    REQUIRE(::stat(name.path().c_str(), &file) == 0);
    CHECK((file.st_mode & 07777U) == mode);
    CHECK((state_of(name).mode & 07777U) == mode);  // of a System V segment, beside its companion
  }
  ::umask(before);
}

/// How often a thread of ours has gone to sleep.
std::uint64_t sleeps_of(::pid_t thread) {
  std::ifstream file{"/proc/self/task/" + std::to_string(thread) + "/status"};
  constexpr std::string_view key = "voluntary_ctxt_switches:";
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(key)) return std::stoull(line.substr(key.size()));
  }
  return 0;
}

TEST_CASE_TEMPLATE("memory: what is to be opened is waited for, until the deadline", memory, STRAIT_NAMED_MEMORIES) {
  using clock = std::chrono::steady_clock;
  const channel_name name{"patience", memory::scheme};
  const auto parsed = strait::parse_memory_name(name.text());
  const auto deadline = clock::now() + std::chrono::milliseconds{20};
  check_refused(std::error_code{ENOENT, std::system_category()}, {name.text(), "an existing channel"},
                [&] { (void)test_segment{.name = parsed, .mode = open_mode::open, .deadline = deadline}.open(); });
  CHECK(clock::now() >= deadline);
  std::atomic<bool> in{false};
  std::atomic<::pid_t> waiting{0};
  std::thread waits{[&] {
    waiting = static_cast<::pid_t>(::syscall(SYS_gettid));
    const auto found =
        test_segment{.name = parsed, .mode = open_mode::open, .deadline = clock::time_point::max()}.open();
    CHECK_FALSE(found.created);
    CHECK(text_of(found) == mark);
    in = true;
  }};
  // It sleeps after each look in vain: by now it has looked several times.
  test::eventually([&] { return in || (waiting != 0 && sleeps_of(waiting) >= 5); });
  CHECK_FALSE(in);
  {
    const auto made = test_segment{.name = parsed, .mode = open_mode::create}.open();
    CHECK(made.created);
  }
  waits.join();
  CHECK(in);
}

TEST_CASE("child: gives to groups" * doctest::skip()) {
  if (!test::is_child()) return;
  constexpr unsigned ours = 54321;
  constexpr unsigned other = 54322;
  const ::gid_t member = ours;
  REQUIRE(::setgroups(1, &member) == 0);
  test::become_nobody();
  for (const std::string_view scheme : test::named_memories) {
    CAPTURE(std::string{scheme});
    const channel_name name{"group", scheme};
    const auto parsed = strait::parse_memory_name(name.text());
    const auto made = test_segment{.name = parsed, .permissions = 0660, .group = ours}.open();
    struct ::stat file{};
    REQUIRE(::stat(name.path().c_str(), &file) == 0);
    CHECK(file.st_gid == ours);
    CHECK((file.st_mode & 07777U) == 0660U);
    if (name.is_system_v()) {
      ::shmid_ds seen{};
      REQUIRE(::shmctl(test::system_v_segment(test::key_of(name.bare())), IPC_STAT, &seen) == 0);
      CHECK(seen.shm_perm.gid == ours);
      CHECK(seen.shm_perm.mode == 0660);
    }
    const channel_name refused{"group-refused", scheme};
    check_refused(
        errc::no_permission, {refused.text(), "user 65534", "group " + std::to_string(other), "no member"},
        [&] { (void)test_segment{.name = strait::parse_memory_name(refused.text()), .group = other}.open(); });
    CHECK_FALSE(refused.exists());
  }
}

TEST_CASE("memory: a segment is given to a group, if its creator is a member of it") {
  if (::geteuid() != 0) {
    MESSAGE("skipped: expected to be root, who can become nobody; found user ", ::geteuid());
    return;
  }
  test::other_process child{"child: gives to groups"};
  CHECK(child.finish() == 0);
}

TEST_CASE_TEMPLATE("memory: a foreign file under the name stays as it is", memory, STRAIT_NAMED_MEMORIES) {
  const std::vector<char> contents[] = {{}, {'x'}, std::vector<char>(100'000, 'y'), {'a', ' ', 's', 'e', 'g'}};
  for (const auto& content : contents) {
    CAPTURE(content.size());
    const channel_name name{"foreign", memory::scheme};
    test::write_file(name.path(), content);
    const auto before = state_of(name.path());
    for (const auto mode : {open_mode::open_or_create, open_mode::create, open_mode::open}) {
      check_refused(errc::foreign_segment, {"expected", "found"},
                    [&] { (void)test_segment{.name = strait::parse_memory_name(name.text()), .mode = mode}.open(); });
      CHECK(state_of(name.path()) == before);
    }
  }
}

TEST_CASE_TEMPLATE("memory: the lock of a foreign file is not waited for", memory, STRAIT_NAMED_MEMORIES) {
  const channel_name name{"foreign-locked", memory::scheme};
  test::write_file(name.path(), {'x'});
  strait::file_locks other{name.path().c_str(), O_RDWR | O_CLOEXEC, 0};
  REQUIRE(other.try_lock(strait::gate_byte));
  check_refused(errc::foreign_segment, {}, [&] {  // hangs if it does wait
    (void)test_segment{.name = strait::parse_memory_name(name.text())}.open();
  });
}

TEST_CASE_TEMPLATE("memory: what is no file at all is called by its kind and stays", memory, STRAIT_NAMED_MEMORIES) {
  const channel_name name{"kind", memory::scheme};
  const channel_name target{"target", memory::scheme};
  std::string kind;
  SUBCASE("a directory") {
    kind = "a directory";
    REQUIRE(::mkdir(name.path().c_str(), 0700) == 0);
  }
  SUBCASE("a symbolic link that leads nowhere") {
    kind = "a symbolic link";
    REQUIRE(::symlink(target.path().c_str(), name.path().c_str()) == 0);
  }
  SUBCASE("a symbolic link to a segment") {
    kind = "a symbolic link";
    (void)test_segment{.name = strait::parse_memory_name(target.text())}.open();
    REQUIRE(::symlink(target.path().c_str(), name.path().c_str()) == 0);
  }
  SUBCASE("a FIFO") {
    kind = "a FIFO";
    REQUIRE(::mkfifo(name.path().c_str(), 0600) == 0);
  }
  SUBCASE("a socket") {
    kind = "a socket";
    const int socket = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ::sockaddr_un address{};
    address.sun_family = AF_UNIX;
    REQUIRE(name.path().size() < sizeof address.sun_path);
    name.path().copy(address.sun_path, sizeof address.sun_path - 1);
    REQUIRE(::bind(socket, reinterpret_cast<const ::sockaddr*>(&address), sizeof address) == 0);
    ::close(socket);
  }
  const auto before = state_of(name.path());
  const bool had_target = target.exists();
  for (const auto mode : {open_mode::open_or_create, open_mode::create, open_mode::open}) {
    check_refused(errc::foreign_segment, {name.text(), name.path(), kind},
                  [&] { (void)test_segment{.name = strait::parse_memory_name(name.text()), .mode = mode}.open(); });
    CHECK(state_of(name.path()) == before);
    CHECK(target.exists() == had_target);
  }
}

TEST_CASE_TEMPLATE("memory: many creators at once make one segment", memory, STRAIT_NAMED_MEMORIES) {
  constexpr int creators = 8;
  for (int round = 0; round < 25; ++round) {
    const channel_name name{"race", memory::scheme};
    const auto parsed = strait::parse_memory_name(name.text());
    std::atomic<int> created{0};
    std::atomic<int> entered{0};
    std::vector<::ino_t> inodes(creators);
    std::vector<strait::segment> segments(creators);
    std::vector<std::thread> threads;
    std::atomic<bool> go{false};
    for (std::size_t i = 0; i < creators; ++i) {
      threads.emplace_back([&, i] {
        while (!go) std::this_thread::yield();
        segments[i] = test_segment{.name = parsed}.open();
        segments[i].locks.unlock(strait::gate_byte);
        ++(segments[i].created ? created : entered);
        struct ::stat file{};
        ::fstat(segments[i].locks.descriptor(), &file);
        inodes[i] = file.st_ino;
      });
    }
    go = true;
    for (auto& thread : threads) thread.join();
    CHECK(created == 1);
    CHECK(entered == creators - 1);
    CHECK(std::all_of(inodes.begin(), inodes.end(), [&](::ino_t inode) { return inode == inodes[0]; }));
  }
}

TEST_CASE("memory: who comes while the last one leaves gets a segment that has a name") {
  // Each takes the name away while it holds the gate; who waited for that gate must not stay in the nameless file.
  const channel_name name{"churn"};
  const auto parsed = strait::parse_memory_name(name.text());
  std::atomic<int> nameless{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 500; ++round) {
        const auto mine = test_segment{.name = parsed}.open();
        struct ::stat file{};
        struct ::stat named{};
        ::fstat(mine.locks.descriptor(), &file);
        // The gate is ours, so nobody else changes what the name names.
        if (::stat(name.path().c_str(), &named) != 0 || named.st_ino != file.st_ino) ++nameless;
        strait::remove_name(parsed, mine.locks);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(nameless == 0);
  CHECK_FALSE(name.exists());
}

TEST_CASE("child: may mount" * doctest::skip()) {
  if (!test::is_child()) return;
  CHECK(::unshare(CLONE_NEWNS) == 0);
  CHECK(::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0);
  CHECK(::mount("none", "/dev/shm", "tmpfs", 0, "size=1m") == 0);
}

TEST_CASE("child: a full tmpfs" * doctest::skip()) {
  if (!test::is_child()) return;
  REQUIRE(::unshare(CLONE_NEWNS) == 0);
  REQUIRE(::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0);
  REQUIRE(::mount("none", "/dev/shm", "tmpfs", 0, "size=1m") == 0);
  const auto free_bytes = [] {
    struct ::statvfs space{};
    REQUIRE(::statvfs("/dev/shm", &space) == 0);
    return static_cast<std::size_t>(space.f_bavail * space.f_frsize);
  };
  const std::size_t before = free_bytes();
  const channel_name name{"full"};
  const auto parsed = strait::parse_memory_name(name.text());

  // Larger than the whole file system, and larger than what is left of it.
  for (const std::size_t bytes : {std::size_t{2} << 20U, std::size_t{1} << 40U, before + 1}) {
    CAPTURE(bytes);
    check_refused(errc::no_space, {name.text(), std::to_string(bytes), "/dev/shm", "found " + std::to_string(before)},
                  [&] { (void)test_segment{.name = parsed, .bytes = bytes}.open(); });
    CHECK(free_bytes() == before);
    CHECK(std::filesystem::is_empty("/dev/shm"));
  }
  // Larger than any file.
  check_refused(errc::no_space, {name.text(), "expected room for"},
                [&] { (void)test_segment{.name = parsed, .bytes = std::size_t{1} << 63U}.open(); });
  CHECK(std::filesystem::is_empty("/dev/shm"));

  // What just fits, does; the next one does not, and the first is unharmed.
  const auto large = test_segment{.name = parsed, .bytes = before}.open();
  CHECK(large.created);
  CHECK(free_bytes() == 0);
  std::memset(large.map.data() + mark.size(), 1, before - mark.size());  // a SIGBUS if it were not allocated
  const channel_name second{"full-2"};
  check_refused(errc::no_space, {second.text(), "found 0"},
                [&] { (void)test_segment{.name = strait::parse_memory_name(second.text())}.open(); });
  CHECK_FALSE(second.exists());
  CHECK(text_of(large) == mark);
  CHECK(free_bytes() == 0);
}

TEST_CASE("child: a segment with holes" * doctest::skip()) {
  if (!test::is_child()) return;
  REQUIRE(::unshare(CLONE_NEWNS) == 0);
  REQUIRE(::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0);
  REQUIRE(::mount("none", "/dev/shm", "tmpfs", 0, "size=1m") == 0);
  const channel_name name{"holes"};
  // As `cp --sparse=always` or a truncation and its undoing leave it: the header is there, the rest is not.
  const int file = ::open(name.path().c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  REQUIRE(::pwrite(file, mark.data(), mark.size(), 0) == static_cast<::ssize_t>(mark.size()));
  REQUIRE(::ftruncate(file, segment_bytes) == 0);
  const channel_name filler{"filler"};
  const int rest = ::open(filler.path().c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  const std::vector<char> page(4096, 'f');
  while (::write(rest, page.data(), page.size()) > 0) {
  }
  const auto before = state_of(name.path());
  check_refused(errc::no_space, {name.text(), "/dev/shm", "found 0"}, [&] {  // without the check it ends by SIGBUS
    (void)test_segment{.name = strait::parse_memory_name(name.text())}.open();
  });
  CHECK(state_of(name.path()) == before);
  // With room for the holes it is as good as any.
  REQUIRE(::ftruncate(rest, 0) == 0);
  const auto entered = test_segment{.name = strait::parse_memory_name(name.text())}.open();
  CHECK_FALSE(entered.created);
  CHECK(text_of(entered) == mark);
  ::close(file);
  ::close(rest);
}

TEST_CASE("memory: a full file system is an error at creation, and nothing is left") {
  if (!may_mount()) {
    MESSAGE("skipped: expected the right to mount a tmpfs over /dev/shm in a namespace of our own (root), found none");
    return;
  }
  test::other_process full{"child: a full tmpfs"};
  CHECK(full.finish() == 0);
}

TEST_CASE("memory: a segment with holes that cannot be filled is refused") {
  if (!may_mount()) {
    MESSAGE("skipped: expected the right to mount a tmpfs over /dev/shm in a namespace of our own (root), found none");
    return;
  }
  test::other_process holes{"child: a segment with holes"};
  CHECK(holes.finish() == 0);
}

TEST_CASE("child: is nobody" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string narrow = test::parent_says();
  const std::string wide = test::parent_says();
  test::become_nobody();
  for (const auto mode : {open_mode::open_or_create, open_mode::create, open_mode::open}) {
    check_refused(errc::no_permission, {narrow, "user 65534", "found", "user 0", "mode 0600"},
                  [&] { (void)test_segment{.name = strait::parse_memory_name(narrow), .mode = mode}.open(); });
  }
  auto shared = test_segment{.name = strait::parse_memory_name(wide)}.open();
  CHECK_FALSE(shared.created);
  CHECK(text_of(shared) == mark);
  shared = {};
  struct ::stat directory{};
  REQUIRE(::stat("/dev/shm", &directory) == 0);
  if ((directory.st_mode & S_ISVTX) == 0) return;
  // It may be written, but its name is not ours to take away.
  check_refused(errc::no_permission, {wide, "user 0"}, [&] {
    (void)test_segment{.name = strait::parse_memory_name(wide), .judgement = verdict::replace}.open();
  });
}

TEST_CASE("memory: without permission it is an error that names both users, and nothing changes") {
  if (::geteuid() != 0) {
    MESSAGE("skipped: expected to be root, who can become nobody; found user ", ::geteuid());
    return;
  }
  const channel_name narrow{"narrow"};
  const channel_name wide{"wide"};
  (void)test_segment{.name = strait::parse_memory_name(narrow.text())}.open();
  (void)test_segment{.name = strait::parse_memory_name(wide.text()), .permissions = 0666}.open();
  const auto narrow_before = state_of(narrow.path());
  const auto wide_before = state_of(wide.path());
  test::other_process nobody{"child: is nobody"};
  nobody.say(narrow.text());
  nobody.say(wide.text());
  CHECK(nobody.finish() == 0);
  CHECK(state_of(narrow.path()) == narrow_before);
  // Nobody entered this one before he was refused, and touched its pages; what it holds is as it was.
  const auto wide_after = state_of(wide.path());
  CHECK(wide_after.inode == wide_before.inode);
  CHECK(wide_after.bytes == wide_before.bytes);
}
