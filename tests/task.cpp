#include <doctest/doctest.h>

#include <algorithm>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "coroutines.hpp"

import strait.task;

namespace {

strait::task<int> answer() {
  co_return 42;
}
strait::task<std::string> text(std::string of) {
  co_return of + of;
}
strait::task<std::unique_ptr<int>> boxed(int value) {
  co_return std::make_unique<int>(value);
}
strait::task<int> fails() {
  throw std::runtime_error{"from the task"};
  co_return 0;
}
strait::task<> does_nothing() {
  co_return;
}
strait::task<> fails_without_value() {
  throw std::logic_error{"nothing to return"};
  co_return;
}

/// Runs a task to its end in a coroutine that knows no hub; the task must not have to wait.
owned_coroutine drive(strait::task<> what) {
  co_await std::move(what);
}
void run(strait::task<> what) {
  const owned_coroutine driver = drive(std::move(what));
  driver.resume();
  CHECK(driver.done());
}

}  // namespace

TEST_CASE("what a task returns goes to whoever awaits it") {
  int checks = 0;
  run([](int& done) -> strait::task<> {
    const int number = co_await answer();
    const std::string word = co_await text("ab");
    CHECK(number == 42);
    CHECK(word == "abab");
    ++done;
  }(checks));
  CHECK(checks == 1);
}

TEST_CASE("a result that can only be moved") {
  run([]() -> strait::task<> {
    std::unique_ptr<int> box = co_await boxed(7);
    REQUIRE(box != nullptr);
    CHECK(*box == 7);
  }());
}

TEST_CASE("a result without a default constructor, converted from another type") {
  struct only_from_int {
    explicit only_from_int(int v) : value{v} {}
    int value;
  };
  run([]() -> strait::task<> {
    const auto made = co_await []() -> strait::task<only_from_int> { co_return 5; }();
    CHECK(made.value == 5);
  }());
}

TEST_CASE("an exception is thrown where the task is awaited, and nowhere else") {
  run([]() -> strait::task<> {
    std::string caught;
    try {
      (void)co_await fails();
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    CHECK(caught == "from the task");
    caught.clear();
    try {
      co_await fails_without_value();
    } catch (const std::logic_error& error) {
      caught = error.what();
    }
    CHECK(caught == "nothing to return");
    const int after = co_await answer();
    CHECK(after == 42);
  }());
}

TEST_CASE("an exception crosses every level and destroys what lives there") {
  struct level {
    static strait::task<int> down(int n, int& living) {
      const counted here{living};
      if (n == 0) throw std::runtime_error{"bottom"};
      co_return co_await down(n - 1, living) + 1;
    }
  };
  int living = 0;
  run([](int& count) -> strait::task<> {
    std::string caught;
    try {
      (void)co_await level::down(100, count);
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    CHECK(caught == "bottom");
    CHECK(count == 0);
  }(living));
}

TEST_CASE("a task does nothing before it is awaited") {
  bool begun = false;
  const auto begin = [](bool& flag) -> strait::task<> {
    flag = true;
    co_return;
  };
  {
    const strait::task<> never = begin(begun);
  }
  CHECK_FALSE(begun);
  run(begin(begun));
  CHECK(begun);
}

TEST_CASE("a task that never began destroys its arguments") {
  const auto held = std::make_shared<int>(1);
  {
    const strait::task<> never = [](std::shared_ptr<int> argument) -> strait::task<> {
      ++*argument;
      co_return;
    }(held);
    CHECK(held.use_count() == 2);
  }
  CHECK(held.use_count() == 1);
  CHECK(*held == 1);
}

TEST_CASE("destroying a suspended task destroys every level of it, innermost first") {
  gate stop;
  std::vector<int> order;
  struct mark {
    std::vector<int>* into;
    int level;
    ~mark() { into->push_back(level); }
  };
  struct nest {
    static strait::task<> down(int level, gate& at, std::vector<int>& into) {
      const mark here{&into, level};
      if (level == 3) {
        co_await at;
      } else {
        co_await down(level + 1, at, into);
      }
      FAIL("nobody resumes it");
    }
  };
  {
    const owned_coroutine driver = drive(nest::down(0, stop, order));
    driver.resume();
    CHECK_FALSE(driver.done());
    CHECK(stop.waiting);
    CHECK(order.empty());
  }
  CHECK(order == std::vector<int>{3, 2, 1, 0});
}

TEST_CASE("a task that is moved into another is destroyed with it, once") {
  int living = 0;
  const auto hold = [](int& count, gate& at) -> strait::task<> {
    const counted here{count};
    co_await at;
  };
  gate first;
  gate second;
  {
    const owned_coroutine one = drive(hold(living, first));
    const owned_coroutine two = drive(hold(living, second));
    one.resume();
    two.resume();
    CHECK(living == 2);
  }
  CHECK(living == 0);
  strait::task<> a = hold(living, first);
  strait::task<> b = std::move(a);
  a = std::move(b);
  CHECK(living == 0);
}

namespace {

/// The extent of the machine stack, as far as it was told of.
struct stack_extent {
  std::uintptr_t lowest = UINTPTR_MAX;
  std::uintptr_t highest = 0;
  [[gnu::noinline]] void note() {
    const auto here = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
    lowest = std::min(lowest, here);
    highest = std::max(highest, here);
  }
  [[nodiscard]] std::size_t bytes() const { return highest - lowest; }
};

constexpr int depth = 1'000'000;
/// A few frames of the unoptimised builds; a stack that grew would hold a million of them.
constexpr std::size_t few_frames = 64 * 1024;

strait::task<std::uint64_t> nested(int n, stack_extent& stack) {
  stack.note();
  if (n == 0) co_return 0;
  const std::uint64_t below = co_await nested(n - 1, stack);
  stack.note();
  co_return below + 1;
}

strait::task<std::uint64_t> one(stack_extent& stack) {
  stack.note();
  co_return 1;
}

}  // namespace

TEST_CASE("a million awaits within each other do not grow the stack") {
  stack_extent stack;
  run([](stack_extent& extent) -> strait::task<> {
    const std::uint64_t levels = co_await nested(depth, extent);
    CHECK(levels == depth);
  }(stack));
  CHECK(stack.bytes() < few_frames);
}

TEST_CASE("a million awaits after each other do not grow the stack") {
  stack_extent stack;
  run([](stack_extent& extent) -> strait::task<> {
    std::uint64_t sum = 0;
    for (int i = 0; i < depth; ++i) sum += co_await one(extent);
    CHECK(sum == depth);
  }(stack));
  CHECK(stack.bytes() < few_frames);
}

TEST_CASE("frames may be freed by another thread, and outlive the heap they came from") {
  int living = 0;
  gate stop;
  std::optional<owned_coroutine> suspended;
  const auto hold = [](int& count, gate& at) -> strait::task<> {
    const counted here{count};
    co_await at;
  };
  std::thread{[&] {
    const strait::frame_heap heap;
    suspended.emplace(drive(hold(living, stop)));
    suspended->resume();
  }}.join();
  CHECK(living == 1);
  suspended.reset();
  CHECK(living == 0);
}

#if defined(STRAIT_MIMALLOC)  // else nothing is kept, so that a sanitizer sees every frame
TEST_CASE("a frame that was given back is the next one's of about its size, wherever it came from") {
  void* foreign = nullptr;
  std::thread{[&] { foreign = strait::allocate_frame(200); }}.join();
  {
    const strait::frame_heap heap;
    void* const own = strait::allocate_frame(200);
    strait::free_frame(own, 200);
    strait::free_frame(foreign, 200);
    void* const larger = strait::allocate_frame(300);
    CHECK(larger != own);
    CHECK(larger != foreign);
    CHECK(strait::allocate_frame(195) == foreign);
    CHECK(strait::allocate_frame(250) == own);
    std::vector<void*> many{own, foreign, strait::allocate_frame(200)};
    CHECK(many.back() != own);
    // More than are kept, and one that is too large to be.
    while (many.size() < 2 * strait::frame_heap::most_kept) many.push_back(strait::allocate_frame(200));
    for (void* const frame : many) strait::free_frame(frame, 200);
    strait::free_frame(larger, 300);
    void* const huge = strait::allocate_frame(100'000);
    std::memset(huge, 1, 100'000);
    strait::free_frame(huge, 100'000);
  }
  void* const outside = strait::allocate_frame(200);
  std::memset(outside, 1, 200);
  strait::free_frame(outside, 200);
}
#endif

// ---- tasks beside each other ----------------------------------------------------------------------------------------

namespace {

strait::task<int> after(gate& at, int value) {
  co_await at;
  co_return value;
}
strait::task<> note_after(gate& at, int name, std::vector<int>& ended) {
  co_await at;
  ended.push_back(name);
}
strait::task<> fail_after(gate& at) {
  co_await at;
  throw std::runtime_error{"after the gate"};
}
strait::task<> live_at(gate& at, int& living) {
  const counted here{living};
  co_await at;
}

}  // namespace

TEST_CASE("when_all begins all of its tasks and yields what each returned") {
  gate first;
  gate second;
  bool done = false;
  const owned_coroutine driver = drive([](gate& one, gate& two, bool& end) -> strait::task<> {
    const auto [a, nothing, b, c] = co_await strait::when_all(after(one, 1), does_nothing(), boxed(3), after(two, 4));
    static_assert(std::is_same_v<decltype(nothing), const std::monostate>);
    CHECK(a == 1);
    REQUIRE(b != nullptr);
    CHECK(*b == 3);
    CHECK(c == 4);
    end = true;
  }(first, second, done));
  driver.resume();
  REQUIRE(first.waiting);
  REQUIRE(second.waiting);
  second.waiting.resume();
  CHECK_FALSE(done);
  first.waiting.resume();
  CHECK(done);
  CHECK(driver.done());
}

TEST_CASE("when_all of tasks that need not wait, and of none, does not suspend") {
  run([]() -> strait::task<> {
    const auto [a, b] = co_await strait::when_all(answer(), text("x"));
    CHECK(a == 42);
    CHECK(b == "xx");
    const std::tuple<> none = co_await strait::when_all();
    (void)none;
  }());
}

TEST_CASE("the first error of when_all destroys the others and is thrown at once") {
  for (const bool at_once : {false, true}) {
    CAPTURE(at_once);
    gate stop;
    gate never;
    int living = 0;
    std::string caught;
    const owned_coroutine driver =
        drive([](bool now, gate& at, gate& other, int& count, std::string& what) -> strait::task<> {
          try {
            if (now) {
              co_await strait::when_all(live_at(other, count), fails_without_value(), live_at(other, count));
            } else {
              co_await strait::when_all(live_at(other, count), fail_after(at));
            }
          } catch (const std::exception& error) {
            CHECK(count == 0);
            what = error.what();
          }
        }(at_once, stop, never, living, caught));
    driver.resume();
    if (!at_once) {
      CHECK(living == 1);
      stop.waiting.resume();
    }
    CHECK(caught == (at_once ? "nothing to return" : "after the gate"));
    CHECK(living == 0);
    CHECK(driver.done());
  }
}

TEST_CASE("destroying a task that waits in when_all destroys all of them") {
  gate stop;
  int living = 0;
  {
    const owned_coroutine driver = drive([](gate& at, int& count) -> strait::task<> {
      co_await strait::when_all(live_at(at, count), live_at(at, count));
    }(stop, living));
    driver.resume();
    CHECK(living == 2);
  }
  CHECK(living == 0);
}

TEST_CASE("a group runs its tasks beside its owner, and join waits for all, also for those that they start") {
  gate first;
  gate second;
  gate third;
  std::vector<int> ended;
  bool joined = false;
  const owned_coroutine driver =
      drive([](gate& one, gate& two, gate& three, std::vector<int>& list, bool& end) -> strait::task<> {
        strait::task_group group;
        group.spawn(note_after(one, 1, list));
        group.spawn([](strait::task_group& in, gate& at, gate& then, std::vector<int>& names) -> strait::task<> {
          co_await at;
          in.spawn(note_after(then, 3, names));
        }(group, two, three, list));
        group.spawn(does_nothing());
        CHECK(group.size() == 2);
        co_await group.join();
        CHECK(group.size() == 0);
        co_await group.join();  // nothing to wait for
        end = true;
      }(first, second, third, ended, joined));
  driver.resume();
  first.waiting.resume();
  second.waiting.resume();
  CHECK_FALSE(joined);
  REQUIRE(third.waiting);
  third.waiting.resume();
  CHECK(joined);
  CHECK(ended == std::vector<int>{1, 3});
}

TEST_CASE("the first error of a group destroys the others, is thrown by join, and leaves the group usable") {
  gate first;
  gate second;
  gate never;
  int living = 0;
  std::string caught;
  const owned_coroutine driver =
      drive([](gate& one, gate& two, gate& other, int& count, std::string& what) -> strait::task<> {
        strait::task_group group;
        group.spawn(live_at(other, count));
        group.spawn(fail_after(one));
        group.spawn(live_at(other, count));
        try {
          co_await group.join();
        } catch (const std::runtime_error& error) {
          what = error.what();
        }
        CHECK(count == 0);
        CHECK(group.size() == 0);
        // One that fails before join is awaited.
        group.spawn(live_at(other, count));
        group.spawn(fail_after(one));
        co_await two;
        CHECK(count == 1);
        group.spawn(live_at(other, count));  // too late
        CHECK(count == 1);
        what.clear();
        try {
          co_await group.join();
        } catch (const std::runtime_error& error) {
          what = error.what();
        }
        CHECK(count == 0);
      }(first, second, never, living, caught));
  driver.resume();
  CHECK(living == 2);
  first.waiting.resume();
  CHECK(caught == "after the gate");
  first.waiting.resume();
  second.waiting.resume();
  CHECK(caught == "after the gate");
  CHECK(driver.done());
}

TEST_CASE("what leaves a task before it suspends is thrown by spawn, and is no error of the group") {
  run([]() -> strait::task<> {
    strait::task_group group;
    std::string caught;
    try {
      group.spawn(fails_without_value());
    } catch (const std::logic_error& error) {
      caught = error.what();
    }
    CHECK(caught == "nothing to return");
    co_await group.join();
  }());
}

TEST_CASE("cancelling or destroying a group destroys its tasks") {
  gate stop;
  gate waits;
  int living = 0;
  {
    const owned_coroutine driver = drive([](gate& at, gate& own, int& count) -> strait::task<> {
      strait::task_group group;
      group.spawn(live_at(at, count));
      group.spawn(live_at(at, count));
      CHECK(count == 2);
      group.cancel();
      CHECK(count == 0);
      co_await group.join();
      group.spawn(live_at(at, count));
      group.spawn(live_at(at, count));
      co_await own;
    }(stop, waits, living));
    driver.resume();
    CHECK(living == 2);
  }
  CHECK(living == 0);
}

TEST_CASE("join that is destroyed while it waits leaves the tasks alone") {
  gate stop;
  std::vector<int> ended;
  strait::task_group group;
  group.spawn(note_after(stop, 1, ended));
  {
    const owned_coroutine driver = drive([](strait::task_group& of) -> strait::task<> { co_await of.join(); }(group));
    driver.resume();
    CHECK_FALSE(driver.done());
  }
  stop.waiting.resume();
  CHECK(ended == std::vector<int>{1});
  CHECK(group.size() == 0);
}
