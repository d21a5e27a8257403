#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

import strait.ring;

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define STRAIT_SANITIZED 1
#endif
#endif

namespace {

/// How long each stress runs.
#if defined(STRAIT_SANITIZED)
constexpr std::chrono::milliseconds stress_time{150};
#else
constexpr std::chrono::milliseconds stress_time{300};
#endif

/// A lane with both its ends, as a channel would hold it.
template <class T>
struct lane {
  using slot = strait::native_slot<T>;

  explicit lane(std::uint64_t capacity, std::uint64_t start = 0) : slots(capacity) {
    control.tail.store(start, std::memory_order_relaxed);
    control.head.store(start, std::memory_order_relaxed);
    attach_producer();
    attach_consumer();
  }
  void attach_producer() { producer = strait::lane_producer<>{control, slots.size()}; }
  void attach_consumer() { consumer = strait::lane_consumer<>{control, slots.size()}; }

  template <class U>
  bool try_push(U&& value) {
    if (producer.known_room() == 0 && producer.look() == 0) return false;
    producer.template push<T>(slots.data(), std::forward<U>(value));
    return true;
  }
  bool something() { return consumer.known() > 0 || consumer.look() > 0; }
  T take() { return consumer.template take<T>(slots.data()); }

  strait::lane_control<> control;
  std::vector<slot> slots;
  strait::lane_producer<> producer;
  strait::lane_consumer<> consumer;
};

struct big {
  std::uint64_t number;
  std::array<std::uint64_t, 7> filling;
};
static_assert(!strait::travels_in_line<big>);
static_assert(!strait::travels_in_line<std::unique_ptr<int>>, "a copy would own twice");
static_assert(strait::travels_in_line<std::uint64_t>);
static_assert(strait::travels_in_line<std::array<std::uint64_t, 3>>);
static_assert(!strait::travels_in_line<std::array<std::uint64_t, 4>>);
static_assert(sizeof(strait::native_slot<big>) == sizeof(big));

/// Every byte follows from the number, so that a torn or foreign message shows.
template <class T>
struct content;
template <>
struct content<std::uint64_t> {
  static std::uint64_t make(std::uint64_t n) { return n * 0x9E3779B97F4A7C15U; }
  static bool is(std::uint64_t got, std::uint64_t n) { return got == make(n); }
};
struct odd {  // 12 bytes: one word and a half
  std::uint32_t a, b, c;
};
template <>
struct content<odd> {
  static odd make(std::uint64_t n) {
    const auto low = static_cast<std::uint32_t>(n);
    return {low, ~low, low * 2654435761U};
  }
  static bool is(const odd& got, std::uint64_t n) {
    const odd want = make(n);
    return got.a == want.a && got.b == want.b && got.c == want.c;
  }
};
using line_full = std::array<std::uint64_t, 3>;
template <>
struct content<line_full> {
  static line_full make(std::uint64_t n) { return {n, ~n, n * 0x9E3779B97F4A7C15U}; }
  static bool is(const line_full& got, std::uint64_t n) { return got == make(n); }
};
template <>
struct content<big> {
  static big make(std::uint64_t n) {
    big made{n, {}};
    for (std::size_t i = 0; i < made.filling.size(); ++i) made.filling[i] = n * (i + 3);
    return made;
  }
  static bool is(const big& got, std::uint64_t n) {
    const big want = make(n);
    return got.number == n && got.filling == want.filling;
  }
};
template <>
struct content<std::unique_ptr<std::uint64_t>> {
  static std::unique_ptr<std::uint64_t> make(std::uint64_t n) { return std::make_unique<std::uint64_t>(n); }
  static bool is(const std::unique_ptr<std::uint64_t>& got, std::uint64_t n) { return got != nullptr && *got == n; }
};

}  // namespace

TEST_CASE("messages that are taken in their slots: as far as is known, to the eighth, and never one that came alone") {
  lane<std::uint64_t> one{64, 1'000'003};
  const std::uint64_t start = one.consumer.head();
  CHECK(one.consumer.plain_until() == start);  // nothing is known
  CHECK_FALSE(one.something());
  CHECK(one.try_push(std::uint64_t{0}));
  CHECK(one.something());
  CHECK(one.consumer.plain_until() == start);  // it may lie beside `tail`
  CHECK(one.take() == 0);
  for (std::uint64_t i = 1; i <= 5; ++i) CHECK(one.try_push(i));
  CHECK(one.something());
  CHECK(one.consumer.plain_until() == start + 6);
  for (std::uint64_t i = 6; i <= 20; ++i) CHECK(one.try_push(i));
  CHECK(one.consumer.look() == 20);
  CHECK(one.consumer.plain_until() == start + 7);  // the eighth since `head` was published releases
  std::uint64_t expected = 1;
  while (one.consumer.head() < one.consumer.plain_until()) {
    one.consumer.advance();
    CHECK(one.consumer.last<std::uint64_t>(one.slots.data()).copy() == expected++);
    CHECK_FALSE(one.consumer.release_due());
  }
  CHECK(expected == 7);
  CHECK(one.take() == expected++);
  CHECK(one.consumer.release_due());
  one.consumer.publish_head();
  CHECK(one.consumer.plain_until() == start + 15);
}

TEST_CASE("an empty lane has nothing and all its room") {
  lane<std::uint64_t> line{8};
  CHECK(line.consumer.known() == 0);
  CHECK(line.consumer.look() == 0);
  CHECK(line.producer.known_room() == 8);
  CHECK(line.producer.look() == 8);
  CHECK_FALSE(line.consumer.release_pending());
  CHECK_FALSE(line.producer.corrupt());
  CHECK_FALSE(line.consumer.corrupt());
}

TEST_CASE("a full lane has no room until the consumer releases") {
  lane<std::uint64_t> line{4};
  for (std::uint64_t n = 0; n < 4; ++n) CHECK(line.try_push(n));
  CHECK_FALSE(line.try_push(std::uint64_t{4}));
  CHECK(line.consumer.look() == 4);
  CHECK(line.take() == 0);
  CHECK_FALSE(line.try_push(std::uint64_t{4}));  // taken, not released
  CHECK(line.consumer.release_pending());
  line.consumer.publish_head();
  CHECK_FALSE(line.consumer.release_pending());
  CHECK(line.try_push(std::uint64_t{4}));
  CHECK_FALSE(line.try_push(std::uint64_t{5}));
  for (std::uint64_t n = 1; n < 5; ++n) {
    REQUIRE(line.something());
    CHECK(line.take() == n);
  }
  CHECK_FALSE(line.something());
}

TEST_CASE_TEMPLATE("wrap, at every capacity, one by one and two by two", T, std::uint64_t, odd, line_full, big,
                   std::unique_ptr<std::uint64_t>) {
  for (const std::uint64_t capacity : {1U, 2U, 4U, 64U}) {
    for (const std::uint64_t burst : {1U, 2U, 3U}) {
      if (burst > capacity) continue;
      CAPTURE(capacity);
      CAPTURE(burst);
      lane<T> line{capacity};
      std::uint64_t sent = 0;
      std::uint64_t received = 0;
      bool right = true;
      while (received < 3 * capacity + 5) {
        for (std::uint64_t i = 0; i < burst; ++i) right = line.try_push(content<T>::make(sent++)) && right;
        for (std::uint64_t i = 0; i < burst; ++i) {
          right = line.something() && right;
          right = content<T>::is(line.take(), received++) && right;
        }
        line.consumer.publish_head();
      }
      CHECK(right);
      CHECK_FALSE(line.something());
    }
  }
}

TEST_CASE("release is due after an eighth of the ring, and after each message in a small one") {
  lane<std::uint64_t> line{64};
  for (std::uint64_t n = 0; n < 64; ++n) REQUIRE(line.try_push(n));
  REQUIRE(line.something());
  for (int i = 0; i < 7; ++i) {
    (void)line.take();
    CHECK_FALSE(line.consumer.release_due());
  }
  (void)line.take();
  CHECK(line.consumer.release_due());
  line.consumer.publish_head();
  CHECK_FALSE(line.consumer.release_due());
  CHECK(line.producer.look() == 8);

  for (const std::uint64_t capacity : {1U, 2U, 4U, 8U}) {
    lane<std::uint64_t> small{capacity};
    REQUIRE(small.try_push(std::uint64_t{1}));
    REQUIRE(small.something());
    (void)small.take();
    CHECK(small.consumer.release_due());
  }
}

TEST_CASE("a batch becomes visible as a whole, with publish, and is taken as a span") {
  lane<big> line{8};
  for (std::uint64_t round = 0; round < 5; ++round) {  // the batches wrap
    for (std::uint64_t i = 0; i < 5; ++i) {
      line.producer.slot<big>(line.slots.data(), i).put(content<big>::make(5 * round + i));
      CHECK(line.consumer.look() == 0);
    }
    REQUIRE(line.producer.look() >= 5);
    line.producer.publish(5);
    REQUIRE(line.consumer.look() == 5);
    for (std::uint64_t i = 0; i < 5; ++i) {
      CHECK(content<big>::is(line.consumer.slot<big>(line.slots.data(), i).take(), 5 * round + i));
    }
    CHECK(line.consumer.known() == 5);
    line.consumer.skip(5);
    CHECK(line.consumer.known() == 0);
    line.consumer.publish_head();
  }
  CHECK(line.producer.tail() == 25);
  CHECK(line.consumer.head() == 25);
}

TEST_CASE("the last message of a batch is not mistaken for a lone one") {
  lane<std::uint64_t> line{8};
  REQUIRE(line.try_push(std::uint64_t{1}));  // its copy lies in both senses beside tail
  REQUIRE(line.try_push(std::uint64_t{2}));
  line.producer.slot<std::uint64_t>(line.slots.data(), 0).put(std::uint64_t{3});
  line.producer.slot<std::uint64_t>(line.slots.data(), 1).put(std::uint64_t{4});
  line.producer.publish(2);
  for (std::uint64_t n = 1; n < 5; ++n) {
    REQUIRE(line.consumer.look() == 5 - n);  // a look before each: the last one finds exactly one message
    CHECK(line.take() == n);
  }
}

TEST_CASE("a lone message comes from the line that announces it, an overtaken one from its slot") {
  lane<std::uint64_t> line{8};
  REQUIRE(line.consumer.look() == 0);
  REQUIRE(line.try_push(std::uint64_t{1}));
  REQUIRE(line.consumer.look() == 1);
  line.slots[0].put(std::uint64_t{99});  // nobody reads it
  CHECK(line.take() == 1);

  REQUIRE(line.try_push(std::uint64_t{2}));
  REQUIRE(line.consumer.look() == 1);
  REQUIRE(line.try_push(std::uint64_t{3}));
  REQUIRE(line.try_push(std::uint64_t{4}));  // overwrites the copy of message 2
  CHECK(line.take() == 2);
  CHECK(line.consumer.look() == 2);
  CHECK(line.take() == 3);
  CHECK(line.take() == 4);
}

TEST_CASE("skip forgets a lone message") {
  lane<std::uint64_t> line{8};
  REQUIRE(line.consumer.look() == 0);
  REQUIRE(line.try_push(std::uint64_t{1}));
  REQUIRE(line.consumer.look() == 1);
  CHECK(line.consumer.slot<std::uint64_t>(line.slots.data(), 0).take() == 1);
  line.consumer.skip(1);
  REQUIRE(line.try_push(std::uint64_t{2}));
  REQUIRE(line.something());
  CHECK(line.take() == 2);
}

TEST_CASE_TEMPLATE("cursors pass 2^64", T, std::uint64_t, line_full, big) {
  for (const std::uint64_t capacity : {1U, 2U, 8U}) {
    CAPTURE(capacity);
    lane<T> line{capacity, std::numeric_limits<std::uint64_t>::max() - 5};
    std::uint64_t sent = 0;
    std::uint64_t received = 0;
    while (sent < 20) {
      while (line.try_push(content<T>::make(sent))) ++sent;
      CHECK(line.producer.known_room() == 0);
      CHECK(line.consumer.look() == capacity);
      while (line.something()) CHECK(content<T>::is(line.take(), received++));
      line.consumer.publish_head();
      CHECK_FALSE(line.producer.corrupt());
      CHECK_FALSE(line.consumer.corrupt());
    }
    CHECK(received == sent);
    CHECK(line.producer.tail() < 100);  // it did pass
  }
}

TEST_CASE("a replacement producer goes on where the last one stopped") {
  lane<line_full> line{4};
  for (std::uint64_t n = 0; n < 3; ++n) REQUIRE(line.try_push(content<line_full>::make(n)));
  line.slots[3].put(content<line_full>::make(77));  // it died before it published this
  line.control.copies[1][0].store(77, std::memory_order_relaxed);
  line.attach_producer();
  CHECK(line.producer.tail() == 3);
  CHECK(line.producer.known_room() == 1);
  CHECK(line.try_push(content<line_full>::make(3)));
  CHECK_FALSE(line.try_push(content<line_full>::make(4)));
  for (std::uint64_t n = 0; n < 4; ++n) {
    REQUIRE(line.something());
    CHECK(content<line_full>::is(line.take(), n));
  }
}

TEST_CASE("a replacement consumer gets what was taken but not released once more") {
  lane<std::uint64_t> line{16};
  for (std::uint64_t n = 0; n < 6; ++n) REQUIRE(line.try_push(n));
  REQUIRE(line.something());
  for (std::uint64_t n = 0; n < 3; ++n) CHECK(line.take() == n);
  line.consumer.publish_head();
  CHECK(line.take() == 3);
  line.attach_consumer();
  CHECK(line.consumer.head() == 3);
  CHECK(line.consumer.known() == 0);
  CHECK(line.consumer.look() == 3);
  for (std::uint64_t n = 3; n < 6; ++n) CHECK(line.take() == n);
}

TEST_CASE("a replacement consumer that finds one message does not take it for a lone one") {
  lane<std::uint64_t> line{8};
  REQUIRE(line.try_push(std::uint64_t{10}));
  REQUIRE(line.try_push(std::uint64_t{11}));
  line.producer.slot<std::uint64_t>(line.slots.data(), 0).put(std::uint64_t{12});
  line.producer.slot<std::uint64_t>(line.slots.data(), 1).put(std::uint64_t{13});
  line.producer.publish(2);
  REQUIRE(line.something());
  for (std::uint64_t n = 10; n < 13; ++n) CHECK(line.take() == n);
  line.consumer.publish_head();
  line.attach_consumer();
  REQUIRE(line.consumer.look() == 1);
  CHECK(line.take() == 13);  // the copy beside tail still is that of message 11
}

TEST_CASE("an impossible tail poisons the consumer, and nothing is read") {
  for (const std::uint64_t wrong : {std::uint64_t{4 + 1}, std::uint64_t{1} << 63U, ~std::uint64_t{0}}) {
    CAPTURE(wrong);
    lane<std::uint64_t> line{4};
    line.control.tail.store(wrong, std::memory_order_relaxed);
    CHECK(line.consumer.look() == 0);
    CHECK(line.consumer.corrupt());
    CHECK(line.consumer.known() == 0);
    line.attach_consumer();
    CHECK(line.consumer.look() == 0);
    CHECK(line.consumer.corrupt());
  }
  // Behind the head.
  lane<std::uint64_t> line{4};
  REQUIRE(line.try_push(std::uint64_t{1}));
  REQUIRE(line.something());
  (void)line.take();
  line.control.tail.store(0, std::memory_order_relaxed);
  CHECK(line.consumer.look() == 0);
  CHECK(line.consumer.corrupt());
}

TEST_CASE("what was known before the tail went wrong is still there, and stays inside the slots") {
  lane<std::uint64_t> line{4};
  REQUIRE(line.try_push(std::uint64_t{1}));
  REQUIRE(line.try_push(std::uint64_t{2}));
  REQUIRE(line.consumer.look() == 2);
  line.control.tail.store(1000, std::memory_order_relaxed);
  CHECK(line.take() == 1);
  CHECK(line.take() == 2);
  CHECK(line.consumer.look() == 0);
  CHECK(line.consumer.corrupt());
}

TEST_CASE("a tail that goes wrong under a lone message does not change the message") {
  lane<std::uint64_t> line{4};
  REQUIRE(line.consumer.look() == 0);
  REQUIRE(line.try_push(std::uint64_t{1}));
  REQUIRE(line.consumer.look() == 1);
  line.control.tail.store(~std::uint64_t{0}, std::memory_order_relaxed);
  line.control.copies[0][0].store(99, std::memory_order_relaxed);
  CHECK(line.take() == 1);
}

TEST_CASE("an impossible head poisons the producer, and it has no room") {
  for (const std::uint64_t wrong : {std::uint64_t{3}, std::uint64_t{1} << 63U, ~std::uint64_t{0} - 2}) {
    CAPTURE(wrong);
    lane<std::uint64_t> line{4};
    REQUIRE(line.try_push(std::uint64_t{1}));
    REQUIRE(line.try_push(std::uint64_t{2}));
    line.control.head.store(wrong, std::memory_order_relaxed);
    CHECK(line.producer.look() == 0);
    CHECK(line.producer.corrupt());
    CHECK(line.producer.known_room() == 0);
    line.attach_producer();
    CHECK(line.producer.corrupt());
    CHECK(line.producer.known_room() == 0);
  }
}

TEST_CASE("move-only messages are moved in, moved out, and destroyed once") {
  auto counter = std::make_shared<int>(0);
  struct token {
    std::shared_ptr<int> counted;
    explicit token(std::shared_ptr<int> c) : counted{std::move(c)} { ++*counted; }
    token(token&& other) noexcept = default;
    token& operator=(token&&) = delete;
    ~token() {
      if (counted) --*counted;
    }
  };
  static_assert(!std::is_copy_constructible_v<token>);
  lane<token> line{2};
  for (int i = 0; i < 5; ++i) {
    REQUIRE(line.try_push(token{counter}));
    CHECK(*counter == 1);
    REQUIRE(line.something());
    {
      const token got = line.take();
      CHECK(*counter == 1);
      CHECK(counter.use_count() == 2);
    }
    CHECK(*counter == 0);
    line.consumer.publish_head();
  }
  CHECK(counter.use_count() == 1);
}

TEST_CASE("a message whose constructor throws is not sent") {
  struct picky {
    std::array<std::uint64_t, 5> value{};
    explicit picky(int n) {
      if (n < 0) throw std::invalid_argument{"negative"};
      value[4] = static_cast<std::uint64_t>(n);
    }
  };
  lane<picky> line{2};
  CHECK_THROWS_AS(line.try_push(-1), std::invalid_argument);
  CHECK_FALSE(line.something());
  CHECK(line.producer.known_room() == 2);
  CHECK(line.try_push(7));
  REQUIRE(line.something());
  CHECK(line.take().value[4] == 7);
}

namespace {

enum class style { one_by_one, batches, mixed };

struct verdict {
  std::uint64_t messages = 0;
  std::uint64_t wrong = 0;
  bool corrupt = false;
};

/// Two threads for a bounded time. Each message's content follows from its number.
template <class T>
verdict stress(std::uint64_t capacity, style how, unsigned seed) {
  lane<T> line{capacity, ~std::uint64_t{0} - 1000};  // passes 2^64 on the way
  constexpr std::uint64_t not_yet = ~std::uint64_t{0};
  std::atomic<std::uint64_t> total{not_yet};
  verdict result;
  // More threads than CPUs are possible here: an idle side gives its CPU away instead of spinning its time slice down.
  const auto idle = [](unsigned& rounds) {
    if (++rounds % 64 == 0) {
      std::this_thread::yield();
    } else {
      strait::cpu_relax();
    }
  };

  std::thread sender{[&] {
    std::minstd_rand random{seed};
    const auto end = std::chrono::steady_clock::now() + stress_time;
    std::uint64_t sent = 0;
    unsigned idle_rounds = 0;
    while (sent % 256 != 0 || std::chrono::steady_clock::now() < end) {
      std::uint64_t n = 1;
      if (how != style::one_by_one) n = 1 + random() % (capacity < 8 ? capacity : 8);
      if (sent % 256 + n > 256) n = 256 - sent % 256;
      if (line.producer.known_room() < n && line.producer.look() < n) {
        idle(idle_rounds);
        continue;
      }
      if (n == 1 || (how == style::mixed && random() % 2 == 0)) {
        for (std::uint64_t i = 0; i < n; ++i)
          line.producer.template push<T>(line.slots.data(), content<T>::make(sent++));
      } else {
        for (std::uint64_t i = 0; i < n; ++i) {
          line.producer.template slot<T>(line.slots.data(), i).put(content<T>::make(sent++));
        }
        line.producer.publish(n);
      }
    }
    total.store(sent, std::memory_order_release);
  }};

  std::minstd_rand random{seed + 1};
  unsigned idle_rounds = 0;
  for (;;) {
    if (!line.something()) {
      if (line.consumer.release_pending()) line.consumer.publish_head();
      if (line.consumer.corrupt() || result.messages == total.load(std::memory_order_acquire)) break;
      idle(idle_rounds);
      continue;
    }
    if (how != style::one_by_one && random() % 2 == 0) {
      std::uint64_t n = line.consumer.known();
      n = 1 + random() % n;
      for (std::uint64_t i = 0; i < n; ++i) {
        if (!content<T>::is(line.consumer.template slot<T>(line.slots.data(), i).take(), result.messages++)) {
          ++result.wrong;
        }
      }
      line.consumer.skip(n);
    } else if (!content<T>::is(line.take(), result.messages++)) {
      ++result.wrong;
    }
    if (line.consumer.release_due()) line.consumer.publish_head();
  }
  sender.join();
  result.corrupt = line.consumer.corrupt() || line.producer.corrupt();
  return result;
}

}  // namespace

TEST_CASE_TEMPLATE("two threads: everything arrives once, in order and whole", T, std::uint64_t, odd, line_full, big,
                   std::unique_ptr<std::uint64_t>) {
  unsigned seed = 1;
  for (const auto how : {style::one_by_one, style::batches, style::mixed}) {
    // The smallest rings, where every store is read at once, and one where batches fit.
    const std::uint64_t capacity = how == style::one_by_one ? 2 : how == style::batches ? 64 : 8;
    CAPTURE(capacity);
    const verdict got = stress<T>(capacity, how, seed++);
    CHECK(got.messages >= 256);
    CHECK(got.wrong == 0);
    CHECK_FALSE(got.corrupt);
  }
}

TEST_CASE("two threads: a ring of one") {
  const verdict got = stress<line_full>(1, style::one_by_one, 9);
  CHECK(got.messages >= 256);
  CHECK(got.wrong == 0);
  CHECK_FALSE(got.corrupt);
}
