#include <doctest/doctest.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "attempt.hpp"
#include "less_rights.hpp"
#include "other_process.hpp"
#include "segment_files.hpp"

import strait;

using strait::channel_options;
using strait::errc;
using strait::open_mode;
using strait::segment_header;
using test::attempt;
using test::channel_name;
using test::check_refused;
using test::state_of;

namespace {

struct order {
  std::uint64_t id;
  std::uint64_t price;
};
/// As large as an order, and as well aligned.
struct trade {
  std::uint64_t id;
  std::uint64_t quantity;
};
/// The same name as `order`, and another schema.
struct next_order {
  std::uint64_t id;
  std::uint64_t price;
};
struct nameless {
  std::uint64_t words[2];
};
struct nameless_and_large {
  std::uint64_t words[3];
};
struct nameless_and_aligned {
  alignas(16) std::uint64_t words[2];
};
struct a_line {
  alignas(256) char bytes[256];
};
struct a_page {
  alignas(4096) char bytes[4096];
};

}  // namespace

template <>
struct strait::message_traits<order> {
  static constexpr std::string_view name = "order";
  static constexpr std::uint32_t version = 1;
};
template <>
struct strait::message_traits<trade> {
  static constexpr std::string_view name = "trade";
  static constexpr std::uint32_t version = 1;
};
template <>
struct strait::message_traits<next_order> {
  static constexpr std::string_view name = "order";
  static constexpr std::uint32_t version = 2;
};

namespace {

constexpr std::array all_modes{open_mode::open_or_create, open_mode::create, open_mode::open};

/// What a crash of the sender leaves of a channel that nobody else was in: the bytes of a segment, with an end in it
/// that looks alive.
template <class T>
std::vector<char> leftover(std::size_t capacity, std::span<const T> messages = {}) {
  const channel_name name{"image", test::posix_memory::scheme};
  auto tx = strait::open_sender<T>(name.text(), {.capacity = capacity});
  for (const T& message : messages) REQUIRE(tx.try_send(message));
  return state_of(name).bytes;
}

template <class Field>
void put(std::vector<char>& image, std::size_t offset, Field value) {
  REQUIRE(offset + sizeof value <= image.size());
  std::memcpy(image.data() + offset, &value, sizeof value);
}
template <class Field>
Field get(const std::vector<char>& image, std::size_t offset) {
  Field value{};
  std::memcpy(&value, image.data() + offset, sizeof value);
  return value;
}

/// Both roles, in all the modes given, are refused in that way; the segment stays as it is, and its name, too.
template <class T>
void check_both_refused(const channel_name& name, const std::error_code& expected,
                        std::initializer_list<std::string_view> words, std::span<const open_mode> modes,
                        channel_options options = {}) {
  const auto before = state_of(name);
  for (const open_mode mode : modes) {
    CAPTURE(static_cast<int>(mode));
    options.open = mode;
    check_refused(expected, words, [&] { (void)strait::open_sender<T>(name.text(), options); });
    check_refused(expected, words, [&] { (void)strait::open_receiver<T>(name.text(), options); });
  }
  CHECK(state_of(name) == before);
}

template <class T>
void check_crossing(strait::sender<T>& tx, strait::receiver<T>& rx, const T& message) {
  REQUIRE(tx.try_send(message));
  const auto got = rx.try_recv();
  REQUIRE(got);
  CHECK(std::memcmp(&*got, &message, sizeof message) == 0);
}

}  // namespace

TEST_CASE("endpoint: a capacity is rounded up to a power of two, and really there") {
  const auto check = [](auto tx, auto rx, std::size_t capacity) {
    CHECK(tx.capacity() == capacity);
    CHECK(rx.capacity() == capacity);
    for (std::size_t i = 0; i < capacity; ++i) REQUIRE(tx.try_send(i));
    CHECK_FALSE(tx.try_send(capacity));
    CHECK(tx.depth() == capacity);
    CHECK(rx.depth() == capacity);
    for (std::size_t i = 0; i < capacity; ++i) REQUIRE(rx.try_recv() == i);
    CHECK_FALSE(rx.try_recv());
  };
  for (const auto [asked, made] :
       {std::pair{1, 1}, {2, 2}, {3, 4}, {4, 4}, {5, 8}, {1000, 1024}, {1024, 1024}, {1025, 2048}}) {
    CAPTURE(asked);
    const channel_options options{.capacity = static_cast<std::size_t>(asked)};
    auto [tx, rx] = strait::make_channel<std::uint64_t>(options);
    check(std::move(tx), std::move(rx), static_cast<std::size_t>(made));
    const channel_name name{"rounded"};
    auto named_tx = strait::open_sender<std::uint64_t>(name.text(), options);
    auto named_rx = strait::open_receiver<std::uint64_t>(name.text(), options);
    check(std::move(named_tx), std::move(named_rx), static_cast<std::size_t>(made));
    CHECK_FALSE(name.exists());
  }
  // Unsaid: the default, or what the channel that is there was made with.
  const channel_name name{"unsaid"};
  const auto tx = strait::open_sender<std::uint64_t>(name.text());
  CHECK(tx.capacity() == 1024);
  const auto rx = strait::open_receiver<std::uint64_t>(name.text());
  CHECK(rx.capacity() == 1024);
}

TEST_CASE("endpoint: a capacity of zero, or beyond the memory, is refused and nothing is made") {
  constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
  for (const std::size_t capacity : {std::size_t{0}, most, most / 2 + 1, most / 2 + 2, std::size_t{1} << 56U}) {
    CAPTURE(capacity);
    const std::string found = "found " + std::to_string(capacity);
    const channel_options options{.capacity = capacity};
    check_refused(errc::bad_capacity, {"private channel", "expected a capacity of 1 to", "of 16 bytes", found},
                  [&] { (void)strait::make_channel<order>(options); });
    const channel_name name{"capacity"};
    check_refused(errc::bad_capacity, {name.text(), "expected a capacity of 1 to", "of 16 bytes", found},
                  [&] { (void)strait::open_sender<order>(name.text(), options); });
    check_refused(errc::bad_capacity, {name.text(), found},
                  [&] { (void)strait::open_receiver<order>(name.text(), options); });
    CHECK_FALSE(name.exists());
  }
}

TEST_CASE("endpoint: every message lies where its type may lie") {
  const auto check = [](auto tx, auto rx) {
    using message = typename decltype(tx)::value_type;
    for (int i = 0; i < 3; ++i) REQUIRE(tx.try_send(message{}));
    const auto shown = attempt(rx.peek());
    for (const message& at : shown.value()) {
      CHECK(reinterpret_cast<std::uintptr_t>(&at) % alignof(message) == 0);
    }
  };
  const channel_name name{"aligned"};
  const auto check_both = [&]<class T>(T) {
    auto [tx, rx] = strait::make_channel<T>({.capacity = 4});
    check(std::move(tx), std::move(rx));
    auto named_tx = strait::open_sender<T>(name.text(), {.capacity = 4});
    auto named_rx = strait::open_receiver<T>(name.text());
    check(std::move(named_tx), std::move(named_rx));
  };
  check_both(nameless_and_aligned{});
  check_both(a_line{});
  check_both(a_page{});
}

TEST_CASE("endpoint: a name that is none is refused at the handle, too") {
  check_refused(errc::unknown_scheme, {"\"shm:\""}, [] { (void)strait::open_sender<int>("shm:orders"); });
  check_refused(errc::bad_name, {"an empty name"}, [] { (void)strait::open_receiver<int>("posix:"); });
  check_refused(errc::bad_name, {"a '/'"}, [] { (void)strait::open_receiver<int>("posix:a/b"); });
  check_refused(errc::bad_name, {"300 characters"}, [] { (void)strait::open_sender<int>(std::string(300, 'x')); });
}

TEST_CASE("endpoint: a living channel of another type is refused, and both types are named") {
  const channel_name name{"type"};
  SUBCASE("name") {
    auto tx = strait::open_sender<order>(name.text(), {.capacity = 8});
    const auto before = state_of(name);
    for (const open_mode mode : all_modes) {
      check_refused(errc::type_mismatch,
                    {name.text(), "expected type \"trade\" version 1", "found type \"order\" version 1"},
                    [&] { (void)strait::open_receiver<trade>(name.text(), {.open = mode}); });
      check_refused(errc::type_mismatch, {"\"trade\"", "\"order\""},
                    [&] { (void)strait::open_sender<trade>(name.text(), {.open = mode}); });
    }
    CHECK(state_of(name) == before);
    // Who was in, still is, and the right type comes in.
    auto rx = strait::open_receiver<order>(name.text());
    check_crossing(tx, rx, order{1, 2});
  }
  SUBCASE("version") {
    const auto tx = strait::open_sender<order>(name.text(), {.capacity = 8});
    check_both_refused<next_order>(name, errc::type_mismatch, {"\"order\" version 2", "\"order\" version 1"},
                                   all_modes);
  }
  SUBCASE("size") {
    const auto rx = strait::open_receiver<nameless>(name.text(), {.capacity = 8});
    check_both_refused<nameless_and_large>(
        name, errc::type_mismatch,
        {"expected type unnamed version 0 of 24 bytes", "found type unnamed version 0 of 16"}, all_modes);
  }
  SUBCASE("alignment") {
    const auto rx = strait::open_receiver<nameless>(name.text(), {.capacity = 8});
    check_both_refused<nameless_and_aligned>(name, errc::type_mismatch, {"aligned to 16, found", "aligned to 8"},
                                             all_modes);
  }
  SUBCASE("signedness") {
    const auto rx = strait::open_receiver<std::uint64_t>(name.text(), {.capacity = 8});
    check_both_refused<std::int64_t>(name, errc::type_mismatch, {"\"i64\"", "\"u64\""}, all_modes);
    check_both_refused<double>(name, errc::type_mismatch, {"\"f64\"", "\"u64\""}, all_modes);
  }
}

TEST_CASE("endpoint: a living channel of another capacity is refused; one that rounds to the same is not") {
  const channel_name name{"capacity"};
  auto tx = strait::open_sender<order>(name.text(), {.capacity = 64});
  const auto before = state_of(name);
  for (const std::size_t other : {std::size_t{1}, std::size_t{32}, std::size_t{65}, std::size_t{128}}) {
    const std::string expected = "expected a capacity of " + std::to_string(other == 65 ? 128 : other);
    check_refused(errc::layout_mismatch, {name.text(), expected, "found 64"},
                  [&] { (void)strait::open_receiver<order>(name.text(), {.capacity = other}); });
  }
  CHECK(state_of(name) == before);
  auto rx = strait::open_receiver<order>(name.text(), {.capacity = 33});
  CHECK(rx.capacity() == 64);
  check_crossing(tx, rx, order{3, 4});
}

TEST_CASE("endpoint: a channel keeps the order that it was made with") {
  const channel_name name{"order"};
  {
    auto tx = strait::open_sender<order>(name.text(), {.order = strait::ordering::fence});
    auto rx = strait::open_receiver<order>(name.text());  // takes what is there
    check_crossing(tx, rx, order{1, 1});
  }
  const auto made = leftover<order>(8);
  if (get<strait::store_load>(made, offsetof(segment_header, barrier)) == strait::store_load::by_fence) {
    MESSAGE("skipped: expected a kernel that grants membarrier, found none");
    return;
  }
  const auto tx = strait::open_sender<order>(name.text());
  const auto before = state_of(name);
  check_refused(errc::layout_mismatch, {name.text(), "order = fence", "order = automatic"},
                [&] { (void)strait::open_receiver<order>(name.text(), {.order = strait::ordering::fence}); });
  CHECK(state_of(name) == before);
}

TEST_CASE("endpoint: a header that is not ours is refused whoever lives in it") {
  const channel_name name{"header"};
  const auto good = leftover<order>(8);
  const auto refused = [&](std::size_t offset, auto value, errc expected,
                           std::initializer_list<std::string_view> words) {
    CAPTURE(offset);
    auto image = good;
    put(image, offset, value);
    test::plant(name, image);
    check_both_refused<order>(name, expected, words, all_modes);
  };
  refused(offsetof(segment_header, magic), std::uint64_t{0x1234}, errc::foreign_segment, {"expected a strait segment"});
  refused(offsetof(segment_header, layout_version), std::uint32_t{3}, errc::version_mismatch,
          {"expected layout version 2", "found 3"});
  refused(offsetof(segment_header, layout_version), std::uint32_t{0}, errc::version_mismatch, {"found 0"});
  const auto sane = {std::string_view{"agree with each other"}};
  refused(offsetof(segment_header, header_bytes), std::uint32_t{640}, errc::layout_mismatch, sane);
  refused(offsetof(segment_header, segment_bytes), std::uint64_t{0}, errc::layout_mismatch, {"segment size 0"});
  refused(offsetof(segment_header, segment_bytes), ~std::uint64_t{0}, errc::layout_mismatch, sane);
  refused(offsetof(segment_header, capacity), std::uint64_t{0}, errc::layout_mismatch, {"capacity 0"});
  refused(offsetof(segment_header, capacity), std::uint64_t{7}, errc::layout_mismatch, {"capacity 7"});
  refused(offsetof(segment_header, capacity), std::uint64_t{16}, errc::layout_mismatch, {"capacity 16"});
  refused(offsetof(segment_header, capacity), std::uint64_t{1} << 60U, errc::layout_mismatch, sane);  // times 16 wraps
  refused(offsetof(segment_header, capacity), std::uint64_t{1} << 63U, errc::layout_mismatch, sane);
  refused(offsetof(segment_header, message_bytes), std::uint32_t{0}, errc::layout_mismatch, {"message size 0"});
  refused(offsetof(segment_header, message_bytes), ~std::uint32_t{0}, errc::layout_mismatch, sane);
  refused(offsetof(segment_header, message_alignment), std::uint32_t{0}, errc::layout_mismatch, sane);
  refused(offsetof(segment_header, message_alignment), std::uint32_t{3}, errc::layout_mismatch, sane);
  refused(offsetof(segment_header, message_alignment), std::uint32_t{1} << 31U, errc::layout_mismatch, sane);
  refused(offsetof(segment_header, slots_offset), std::uint32_t{0}, errc::layout_mismatch, sane);
  refused(offsetof(segment_header, slots_offset), std::uint32_t{4096}, errc::layout_mismatch, sane);
  refused(offsetof(segment_header, barrier), std::uint32_t{0}, errc::layout_mismatch, sane);
  refused(offsetof(segment_header, barrier), std::uint32_t{4}, errc::layout_mismatch, sane);

  // Where the fields do agree with each other, and with the size of the file, but cannot be.
  const auto slots_offset = get<std::uint32_t>(good, offsetof(segment_header, slots_offset));
  const auto agreeing = [&](std::uint64_t capacity, std::uint32_t bytes) {
    CAPTURE(capacity);
    CAPTURE(bytes);
    auto image = good;
    put(image, offsetof(segment_header, capacity), capacity);
    put(image, offsetof(segment_header, message_bytes), bytes);
    put(image, offsetof(segment_header, segment_bytes), slots_offset + capacity * bytes);  // may wrap
    test::plant(name, image);
    check_both_refused<order>(name, errc::layout_mismatch, sane, all_modes);
  };
  agreeing(7, sizeof(order));
  agreeing(0, sizeof(order));
  agreeing(8, 0);
  agreeing(std::uint64_t{1} << 60U, sizeof(order));
  agreeing(std::uint64_t{1} << 63U, sizeof(order));
}

TEST_CASE("endpoint: a foreign file under the name is refused and stays as it is, by every byte and its time") {
  for (const std::string_view content :
       {std::string_view{}, std::string_view{"x"}, std::string_view{"not a segment, but my notes"}}) {
    const channel_name name{"foreign", test::posix_memory::scheme};
    test::write_file(name.path(), {content.begin(), content.end()});
    check_both_refused<order>(name, errc::foreign_segment, {name.text(), "expected a strait segment", "found a file"},
                              all_modes);
  }
  const channel_name name{"foreign-page", test::posix_memory::scheme};
  test::write_file(name.path(), std::vector<char>(8192, 'S'));
  check_both_refused<order>(name, errc::foreign_segment, {name.text()}, all_modes);
}

TEST_CASE("endpoint: a truncated segment") {
  const channel_name name{"truncated", test::posix_memory::scheme};  // System V segments cannot be cut
  const auto whole = leftover<order>(8);
  const auto cut = [&](std::size_t bytes) {
    CAPTURE(bytes);
    auto image = whole;
    image.resize(bytes);
    test::plant(name, image);
  };
  // Too short to be known as ours.
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{7}}) {
    cut(bytes);
    check_both_refused<order>(name, errc::foreign_segment, {"expected a strait segment"}, all_modes);
  }
  // Too short to tell what it is.
  for (const std::size_t bytes : {std::size_t{8}, std::size_t{100}, sizeof(segment_header) - 1}) {
    cut(bytes);
    check_both_refused<order>(
        name, errc::truncated_segment,
        {"a header of " + std::to_string(sizeof(segment_header)), "found " + std::to_string(bytes)}, all_modes);
  }
  // Short of slots, and nobody in it: refused where it was to be opened, and no obstacle to a new one.
  for (const std::size_t bytes : {sizeof(segment_header), whole.size() - 1}) {
    cut(bytes);
    check_both_refused<order>(name, errc::truncated_segment,
                              {"a segment of " + std::to_string(whole.size()), "found " + std::to_string(bytes)},
                              std::array{open_mode::open});
    auto tx = strait::open_sender<order>(name.text());
    auto rx = strait::open_receiver<order>(name.text());
    CHECK(tx.capacity() == 1024);
    check_crossing(tx, rx, order{5, 6});
  }
  CHECK_FALSE(name.exists());
}

TEST_CASE("endpoint: a truncated segment with somebody in it is refused in every mode") {
  const channel_name name{"truncated-alive", test::posix_memory::scheme};
  const auto tx = strait::open_sender<order>(name.text(), {.capacity = 1024});
  const auto size = state_of(name).bytes.size();
  REQUIRE(::truncate(name.path().c_str(), 4096) == 0);
  check_both_refused<order>(name, errc::truncated_segment, {"a segment of " + std::to_string(size), "found 4096"},
                            all_modes);
}

TEST_CASE("endpoint: a header that claims more than the file system holds is no_space, not a signal") {
  const channel_name name{"vast", test::posix_memory::scheme};
  auto image = leftover<order>(8);
  constexpr std::uint64_t capacity = std::uint64_t{1} << 40U;
  const auto slots_offset = get<std::uint32_t>(image, offsetof(segment_header, slots_offset));
  put(image, offsetof(segment_header, capacity), capacity);
  put(image, offsetof(segment_header, segment_bytes), slots_offset + capacity * sizeof(order));
  test::plant(name, image);
  check_both_refused<order>(name, errc::truncated_segment, {"found " + std::to_string(image.size())},
                            std::array{open_mode::open});
  // The same with the size that it claims, of which next to nothing is there.
  REQUIRE(::truncate(name.path().c_str(), static_cast<::off_t>(slots_offset + capacity * sizeof(order))) == 0);
  check_refused(errc::no_space, {name.text(), "/dev/shm"},
                [&] { (void)strait::open_sender<order>(name.text(), {.open = open_mode::open}); });
  CHECK(name.exists());
}

TEST_CASE("child: holds an end" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string name = test::parent_says();
  const std::string role = test::parent_says();
  strait::sender<order> tx;
  strait::receiver<order> rx;
  if (role == "sender") {
    tx = strait::open_sender<order>(name, {.capacity = 8});
    for (std::uint64_t i = 0; i < 3; ++i) REQUIRE(tx.try_send(order{i, 0}));
  } else {
    rx = strait::open_receiver<order>(name, {.capacity = 8});
  }
  test::tell_parent("in");
  (void)test::parent_says();  // or the parent kills us
}

namespace {

test::other_process holder(const channel_name& name, std::string_view role) {
  test::other_process child{"child: holds an end"};
  child.say(name.text());
  child.say(role);
  REQUIRE(child.hears() == "in");
  return child;
}

}  // namespace

TEST_CASE("endpoint: a role has one living end, and who comes second is told its process") {
  const channel_name name{"in-use"};
  const std::string mine = "found one in process " + std::to_string(::getpid());
  SUBCASE("in this process") {
    auto tx = strait::open_sender<order>(name.text(), {.capacity = 8});
    auto rx = strait::open_receiver<order>(name.text());
    const auto before = state_of(name);
    for (const open_mode mode : {open_mode::open_or_create, open_mode::open}) {
      check_refused(errc::end_in_use, {name.text(), "expected no living sender", mine},
                    [&] { (void)strait::open_sender<order>(name.text(), {.open = mode}); });
      check_refused(errc::end_in_use, {name.text(), "expected no living receiver", mine},
                    [&] { (void)strait::open_receiver<order>(name.text(), {.open = mode}); });
    }
    CHECK(state_of(name) == before);
    check_crossing(tx, rx, order{1, 1});
    // Who was refused left no mark: the role is free as soon as its end is.
    tx.close();
    tx = strait::open_sender<order>(name.text());
    check_crossing(tx, rx, order{2, 2});
  }
  for (const std::string role : {"sender", "receiver"}) {
    SUBCASE(("the " + role + " in another process").c_str()) {
      auto child = holder(name, role);
      const std::string his = "found one in process " + std::to_string(child.pid());
      const auto second = [&] {
        if (role == "sender") {
          (void)strait::open_sender<order>(name.text());
        } else {
          (void)strait::open_receiver<order>(name.text());
        }
      };
      const auto before = state_of(name);
      check_refused(errc::end_in_use, {name.text(), "expected no living " + role, his}, second);
      CHECK(state_of(name) == before);
      // Stopped is not dead: nothing is taken from it.
      REQUIRE(::kill(child.pid(), SIGSTOP) == 0);
      check_refused(errc::end_in_use, {his}, second);
      REQUIRE(::kill(child.pid(), SIGCONT) == 0);
      child.say("go");
      CHECK(child.finish() == 0);
      if (role == "sender") {
        // It left messages for a receiver to come.
        CHECK(name.exists());
        auto rx = strait::open_receiver<order>(name.text());
        CHECK(rx.try_recv()->id == 0);
      }
    }
  }
  CHECK_FALSE(name.exists());
}

TEST_CASE("endpoint: the three ways to open") {
  const channel_name name{"modes"};
  const std::error_code absent{ENOENT, std::system_category()};
  const std::error_code present{EEXIST, std::system_category()};
  check_refused(absent, {name.text(), "expected an existing channel"},
                [&] { (void)strait::open_sender<order>(name.text(), {.open = open_mode::open}); });
  check_refused(absent, {name.text(), "expected an existing channel"},
                [&] { (void)strait::open_receiver<order>(name.text(), {.open = open_mode::open}); });
  CHECK_FALSE(name.exists());
  {
    auto tx = strait::open_sender<order>(name.text(), {.capacity = 8, .open = open_mode::create});
    check_both_refused<order>(name, present, {name.text(), "expected no channel", "found one"},
                              std::array{open_mode::create});
    auto rx = strait::open_receiver<order>(name.text(), {.open = open_mode::open});
    check_crossing(tx, rx, order{1, 2});
  }
  CHECK_FALSE(name.exists());
}

TEST_CASE("endpoint: what a crash left is entered where it fits") {
  const channel_name name{"stale"};
  {
    auto child = holder(name, "sender");
    child.kill();
  }
  REQUIRE(name.exists());
  open_mode mode{};
  SUBCASE("open") {
    mode = open_mode::open;
  }
  SUBCASE("open or create") {
    mode = open_mode::open_or_create;
  }
  auto rx = strait::open_receiver<order>(name.text(), {.open = mode});
  CHECK(rx.capacity() == 8);
  // Everything that the dead sender committed, then word of its death, once.
  for (std::uint64_t i = 0; i < 3; ++i) CHECK(rx.try_recv()->id == i);
  std::error_code error;
  CHECK_FALSE(rx.try_recv(error));
  CHECK(error == errc::peer_died);
  CHECK_FALSE(rx.try_recv(error));
  CHECK_FALSE(error);
  auto tx = strait::open_sender<order>(name.text());
  check_crossing(tx, rx, order{9, 9});
  tx.close();
  rx.close();
  CHECK_FALSE(name.exists());
}

TEST_CASE("endpoint: what a crash left is no obstacle to a new channel") {
  const channel_name name{"stale-replace"};
  {
    auto child = holder(name, "sender");
    child.kill();
  }
  const auto left = state_of(name);
  SUBCASE("of the same type, to be created") {
    auto rx = strait::open_receiver<order>(name.text(), {.open = open_mode::create});
    CHECK(rx.capacity() == 1024);
    CHECK(rx.depth() == 0);
    CHECK(state_of(name).inode != left.inode);
  }
  SUBCASE("of another type") {
    auto tx = strait::open_sender<trade>(name.text());
    auto rx = strait::open_receiver<trade>(name.text());
    check_crossing(tx, rx, trade{1, 2});
  }
  SUBCASE("of another capacity") {
    auto tx = strait::open_sender<order>(name.text(), {.capacity = 32});
    CHECK(tx.capacity() == 32);
  }
  CHECK_FALSE(name.exists());
}

TEST_CASE("endpoint: to open is not to replace: what does not fit is refused and stays") {
  const channel_name name{"stale-open"};
  {
    auto child = holder(name, "sender");
    child.kill();
  }
  const std::array open_only{open_mode::open};
  check_both_refused<trade>(name, errc::type_mismatch, {"\"trade\"", "\"order\""}, open_only);
  check_both_refused<order>(name, errc::layout_mismatch, {"a capacity of 32", "found 8"}, open_only, {.capacity = 32});
  // So the messages are still there for who opens it rightly.
  auto rx = strait::open_receiver<order>(name.text(), {.capacity = 8, .open = open_mode::open});
  for (std::uint64_t i = 0; i < 3; ++i) CHECK(rx.try_recv()->id == i);
}

TEST_CASE("endpoint: a poisoned or rubbish leftover is refused to who opens it, and replaced by who creates") {
  const channel_name name{"rubbish-leftover"};
  const std::array<order, 2> messages{order{1, 1}, order{2, 2}};
  const auto good = leftover<order>(8, messages);
  constexpr auto sender_end = offsetof(segment_header, ends);
  constexpr auto receiver_end = sender_end + sizeof(strait::end_entry);
  constexpr auto tail = offsetof(segment_header, lane);
  constexpr auto head = tail + offsetof(strait::lane_control<>, head);
  auto image = good;
  SUBCASE("poisoned") {
    put(image, offsetof(segment_header, poisoned), std::uint32_t{1});
  }
  SUBCASE("a tail beyond the capacity") {
    put(image, tail, std::uint64_t{9});
  }
  SUBCASE("a head before the lane") {
    put(image, head, std::uint64_t{3});
  }
  SUBCASE("a sender that is nothing") {
    put(image, sender_end, std::uint32_t{77});
  }
  SUBCASE("a receiver that is nothing") {
    put(image, receiver_end, ~std::uint32_t{0});
  }
  test::plant(name, image);
  check_both_refused<order>(name, errc::corrupt, {name.text(), "expected a sound channel"},
                            std::array{open_mode::open});
  auto tx = strait::open_sender<order>(name.text());
  auto rx = strait::open_receiver<order>(name.text());
  CHECK(rx.depth() == 0);
  check_crossing(tx, rx, order{3, 4});
}

TEST_CASE("endpoint: messages that wait for their receiver are no leftover, whoever asks for something else") {
  const channel_name name{"deposited"};
  {
    auto tx = strait::open_sender<order>(name.text(), {.capacity = 8});
    for (std::uint64_t i = 0; i < 3; ++i) REQUIRE(tx.try_send(order{i, i}));
  }
  REQUIRE(name.exists());
  check_both_refused<trade>(name, errc::type_mismatch, {"\"trade\"", "\"order\""}, all_modes);
  check_both_refused<order>(name, errc::layout_mismatch, {"a capacity of 32", "found 8"}, all_modes, {.capacity = 32});
  check_both_refused<order>(name, std::error_code{EEXIST, std::system_category()}, {"expected no channel"},
                            std::array{open_mode::create});
  SUBCASE("the receiver comes") {
    auto rx = strait::open_receiver<order>(name.text());
    for (std::uint64_t i = 0; i < 3; ++i) CHECK(rx.try_recv()->id == i);
  }
  SUBCASE("nobody can take them from a segment that is poisoned") {
    auto image = state_of(name).bytes;
    put(image, offsetof(segment_header, poisoned), std::uint32_t{1});
    test::plant(name, image);
    auto rx = strait::open_receiver<order>(name.text());
    CHECK(rx.depth() == 0);
  }
  SUBCASE("nor from one that is cut off") {
    auto image = state_of(name).bytes;
    image.resize(image.size() - 8);  // the label of a System V segment is aligned
    test::plant(name, image);
    auto rx = strait::open_receiver<order>(name.text());
    CHECK(rx.depth() == 0);
  }
  CHECK_FALSE(name.exists());
}

TEST_CASE("endpoint: a poisoned channel with somebody in it is refused") {
  const channel_name name{"poisoned"};
  auto tx = strait::open_sender<order>(name.text(), {.capacity = 8});
  test::overwrite(name, offsetof(segment_header, poisoned), std::uint32_t{1});
  check_both_refused<order>(name, errc::corrupt, {name.text(), "poisoned"}, all_modes);
  std::error_code error;
  while (tx.try_send(order{}, error)) {
  }
  CHECK(error == errc::corrupt);
  CHECK(tx.is_closed());
}

TEST_CASE("endpoint: the mode is what was asked for, whatever the umask, and 0600 unsaid") {
  const ::mode_t before = ::umask(0077);
  const auto mode_of = [](const channel_name& name) { return state_of(name).mode & 07777U; };
  const channel_name name{"mode"};
  {
    const auto tx = strait::open_sender<order>(name.text(), {.mode = 0666});
    CHECK(mode_of(name) == 0666);
    // Only who creates says.
    const auto rx = strait::open_receiver<order>(name.text(), {.mode = 0600});
    CHECK(mode_of(name) == 0666);
  }
  ::umask(0);
  {
    const auto tx = strait::open_sender<order>(name.text());
    CHECK(mode_of(name) == 0600);
  }
  ::umask(before);
}

TEST_CASE("endpoint: the last end out takes the name away, whichever it is") {
  const channel_name name{"last-out"};
  SUBCASE("the sender") {
    auto tx = strait::open_sender<order>(name.text());
    auto rx = strait::open_receiver<order>(name.text());
    REQUIRE(tx.try_send(order{}));  // nobody is left to take it
    rx.close();
    CHECK(name.exists());
    tx.close();
  }
  SUBCASE("the receiver") {
    auto tx = strait::open_sender<order>(name.text());
    auto rx = strait::open_receiver<order>(name.text());
    REQUIRE(tx.try_send(order{}));
    tx.close();
    CHECK(name.exists());
    rx.close();
  }
  SUBCASE("a sender that sent nothing") {
    (void)strait::open_sender<order>(name.text());
  }
  SUBCASE("a receiver that nobody came to") {
    (void)strait::open_receiver<order>(name.text());
  }
  CHECK_FALSE(name.exists());
}

TEST_CASE("endpoint: what was sent before any receiver came is kept for it, also past the sender's end") {
  const channel_name name{"early"};
  {
    auto tx = strait::open_sender<order>(name.text(), {.capacity = 8});
    for (std::uint64_t i = 0; i < 5; ++i) REQUIRE(tx.try_send(order{i, i}));
  }
  REQUIRE(name.exists());
  {
    // A second sender goes on where the first ended.
    auto tx = strait::open_sender<order>(name.text());
    for (std::uint64_t i = 5; i < 8; ++i) REQUIRE(tx.try_send(order{i, i}));
    CHECK_FALSE(tx.try_send(order{}));
  }
  REQUIRE(name.exists());
  auto rx = strait::open_receiver<order>(name.text(), {.open = open_mode::open});
  for (std::uint64_t i = 0; i < 8; ++i) {
    const auto got = rx.blocking_recv();
    REQUIRE(got);
    CHECK(got->id == i);
  }
  CHECK_FALSE(rx.blocking_recv());  // the end, not a death
  CHECK(rx.is_closed());
  rx.close();
  CHECK_FALSE(name.exists());
}

TEST_CASE("endpoint: threads race to enter: one segment, one end a role, and the others are told") {
  constexpr std::size_t rivals = 8;
  for (int round = 0; round < 20; ++round) {
    const channel_name name{"race"};
    std::vector<strait::sender<order>> senders(rivals);
    std::vector<strait::receiver<order>> receivers(rivals);
    std::atomic<int> refused{0};
    std::atomic<int> strange{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < rivals; ++i) {
      threads.emplace_back([&, i] {
        while (!go) std::this_thread::yield();
        try {
          if (i % 2 == 0) {
            senders[i] = strait::open_sender<order>(name.text(), {.capacity = 8});
          } else {
            receivers[i] = strait::open_receiver<order>(name.text(), {.capacity = 8});
          }
        } catch (const std::system_error& error) {
          ++(error.code() == errc::end_in_use ? refused : strange);
        }
      });
    }
    go = true;
    for (auto& thread : threads) thread.join();
    CHECK(refused == rivals - 2);
    CHECK(strange == 0);
    const auto in = [](const auto& handle) { return handle.capacity() != 0; };
    REQUIRE(std::count_if(senders.begin(), senders.end(), in) == 1);
    REQUIRE(std::count_if(receivers.begin(), receivers.end(), in) == 1);
    // One segment: what goes in at one end comes out at the other.
    check_crossing(*std::find_if(senders.begin(), senders.end(), in),
                   *std::find_if(receivers.begin(), receivers.end(), in), order{7, 7});
    senders.clear();
    receivers.clear();
    CHECK_FALSE(name.exists());
  }
}

TEST_CASE("endpoint: of many that create, one does") {
  const channel_name name{"race-create"};
  constexpr int rivals = 8;
  std::vector<strait::sender<order>> senders(rivals);
  std::atomic<int> present{0};
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < rivals; ++i) {
    threads.emplace_back([&, i] {
      try {
        senders[i] = strait::open_sender<order>(name.text(), {.open = open_mode::create});
      } catch (const std::system_error& error) {
        if (error.code() == std::errc::file_exists) ++present;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(present == rivals - 1);
  senders.clear();
  CHECK_FALSE(name.exists());
}

TEST_CASE("endpoint: threads that come and go meet in one channel or are told, and the last leaves nothing") {
  const channel_name name{"churn"};
  std::atomic<int> refused{0};
  std::atomic<int> strange{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int entered = 0; entered < 50;) {
        try {
          if (i % 2 == 0) {
            const auto tx = strait::open_sender<order>(name.text(), {.capacity = 8});
          } else {
            const auto rx = strait::open_receiver<order>(name.text(), {.capacity = 8});
          }
          ++entered;
        } catch (const std::system_error& error) {
          if (error.code() != errc::end_in_use) {
            ++strange;
            return;
          }
          // The other of this role is in, and may have lost its CPU there.
          ++refused;
          std::this_thread::yield();
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CAPTURE(refused.load());
  CHECK(strange == 0);
  CHECK_FALSE(name.exists());
}

TEST_CASE("child: a rival" * doctest::skip()) {
  if (!test::is_child()) return;
  for (;;) {
    const std::string name = test::parent_says();
    if (name.empty() || name == "end") return;
    std::array<strait::sender<order>, 2> senders;
    std::array<strait::receiver<order>, 2> receivers;
    std::atomic<int> strange{0};
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        try {
          if (i % 2 == 0) {
            senders[i / 2] = strait::open_sender<order>(name, {.capacity = 8});
          } else {
            receivers[i / 2] = strait::open_receiver<order>(name, {.capacity = 8});
          }
        } catch (const std::system_error& error) {
          if (error.code() != errc::end_in_use) ++strange;
        }
      });
    }
    for (auto& thread : threads) thread.join();
    CHECK(strange == 0);
    std::string in;
    for (auto& tx : senders) {
      if (tx.capacity() != 0) {
        in += 's';
        REQUIRE(tx.try_send(order{42, 43}));
      }
    }
    for (auto& rx : receivers) {
      if (rx.capacity() != 0) in += 'r';
    }
    test::tell_parent(in.empty() ? "-" : in);
    // Whoever leaves before all have come would let another in.
    REQUIRE(test::parent_says() == "sent");
    for (auto& rx : receivers) {
      if (rx.capacity() == 0) continue;
      const auto got = rx.try_recv();
      REQUIRE(got);
      CHECK(got->id == 42);
    }
    test::tell_parent("taken");
    REQUIRE(test::parent_says() == "leave");
    senders = {};
    receivers = {};
    test::tell_parent("left");
  }
}

TEST_CASE("endpoint: processes race to enter: one segment, one end a role") {
  std::vector<test::other_process> rivals;
  for (int i = 0; i < 3; ++i) rivals.emplace_back("child: a rival");
  for (int round = 0; round < 10; ++round) {
    const channel_name name{"race-processes"};
    for (const auto& rival : rivals) rival.say(name.text());
    std::string in;
    for (const auto& rival : rivals) in += rival.hears();
    CHECK(std::count(in.begin(), in.end(), 's') == 1);
    CHECK(std::count(in.begin(), in.end(), 'r') == 1);
    for (const auto* word : {"sent", "leave"}) {
      for (const auto& rival : rivals) rival.say(word);
      for (const auto& rival : rivals) REQUIRE(rival.hears() == (word == std::string_view{"sent"} ? "taken" : "left"));
    }
    CHECK_FALSE(name.exists());
  }
  for (auto& rival : rivals) {
    rival.say("end");
    CHECK(rival.finish() == 0);
  }
}

TEST_CASE("child: a full tmpfs under a channel" * doctest::skip()) {
  if (!test::is_child()) return;
  if (::unshare(CLONE_NEWNS) != 0 || ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
      ::mount("none", "/dev/shm", "tmpfs", 0, "size=1m") != 0) {
    test::tell_parent("may not");
    return;
  }
  test::tell_parent("may");
  const channel_name name{"full", test::posix_memory::scheme};
  check_refused(errc::no_space, {name.text(), "expected", "free bytes in /dev/shm", "found 1048576"},
                [&] { (void)strait::open_sender<order>(name.text(), {.capacity = 65536}); });
  check_refused(errc::no_space, {name.text(), "found 1048576"},
                [&] { (void)strait::open_receiver<order>(name.text(), {.capacity = 1 << 20}); });
  CHECK(std::filesystem::is_empty("/dev/shm"));
  // Half of that fits, and every slot of it can be written.
  auto tx = strait::open_sender<order>(name.text(), {.capacity = 32768});
  auto rx = strait::open_receiver<order>(name.text());
  for (std::uint64_t i = 0; i < 32768; ++i) REQUIRE(tx.try_send(order{i, i}));
  for (std::uint64_t i = 0; i < 32768; ++i) REQUIRE(rx.try_recv()->id == i);
  const channel_name second{"full-2", test::posix_memory::scheme};
  check_refused(errc::no_space, {second.text()},
                [&] { (void)strait::open_sender<order>(second.text(), {.capacity = 32768}); });
  CHECK_FALSE(second.exists());
  tx.close();
  rx.close();
  CHECK(std::filesystem::is_empty("/dev/shm"));
}

TEST_CASE("endpoint: a full /dev/shm is no_space when the channel is made, and nothing is left") {
  test::other_process child{"child: a full tmpfs under a channel"};
  if (child.hears() != "may") {
    MESSAGE("skipped: expected the right to mount a tmpfs over /dev/shm in a namespace of our own (root), found none");
    return;
  }
  CHECK(child.finish() == 0);
}

TEST_CASE("child: nobody at the door" * doctest::skip()) {
  if (!test::is_child()) return;
  const std::string narrow = test::parent_says();
  const std::string wide = test::parent_says();
  test::become_nobody();
  for (const open_mode mode : all_modes) {
    check_refused(errc::no_permission, {narrow, "user 65534", "user 0", "mode 0600"},
                  [&] { (void)strait::open_receiver<order>(narrow, {.open = mode}); });
  }
  // Another type under a name that we may not take away is told, not tried for ever.
  check_refused(errc::type_mismatch, {wide, "\"trade\""}, [&] { (void)strait::open_receiver<trade>(wide); });
  // A channel for everybody is one for nobody, too.
  auto rx = strait::open_receiver<order>(wide);
  CHECK(rx.blocking_recv()->id == 11);
  CHECK_FALSE(rx.blocking_recv());
}

TEST_CASE("endpoint: without permission it is an error that names both users; mode 0666 lets everybody in") {
  if (::geteuid() != 0) {
    MESSAGE("skipped: expected to be root, who can become nobody; found user ", ::geteuid());
    return;
  }
  const channel_name narrow{"narrow"};
  const channel_name wide{"wide"};
  const auto closed = strait::open_sender<order>(narrow.text());
  auto open = strait::open_sender<order>(wide.text(), {.mode = 0666});
  REQUIRE(open.try_send(order{11, 0}));
  const auto before = state_of(narrow);
  test::other_process nobody{"child: nobody at the door"};
  nobody.say(narrow.text());
  nobody.say(wide.text());
  test::eventually([&] { return open.depth() == 0; });
  open.close();
  CHECK(nobody.finish() == 0);
  CHECK(state_of(narrow) == before);
}
