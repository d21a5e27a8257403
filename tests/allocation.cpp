#include <strait/asio.hpp>

#include <dlfcn.h>
#include <doctest/doctest.h>
#include <stdlib.h>

#include <array>
#include <asio/co_spawn.hpp>
#include <asio/io_context.hpp>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>

#include "coroutines.hpp"

import strait;

// Every allocation of this program is counted: `operator new` here, and what strait asks of mimalloc by name, which the
// dynamic linker finds in the program before it finds it in the library.
namespace {
std::atomic<std::uint64_t> allocations{0};

void* counted_allocation(std::size_t bytes, std::size_t alignment) {
  ++allocations;
  void* memory = nullptr;
  if (::posix_memalign(&memory, alignment < sizeof(void*) ? sizeof(void*) : alignment, bytes == 0 ? 1 : bytes) != 0) {
    throw std::bad_alloc{};
  }
  return memory;
}

template <class Function>
Function* next_function(const char* name) {
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}
}  // namespace

void* operator new(std::size_t bytes) {
  return counted_allocation(bytes, alignof(std::max_align_t));
}
void* operator new[](std::size_t bytes) {
  return counted_allocation(bytes, alignof(std::max_align_t));
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return counted_allocation(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return counted_allocation(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept {
  ::free(memory);
}
void operator delete[](void* memory) noexcept {
  ::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  ::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  ::free(memory);
}
void operator delete(void* memory, std::align_val_t) noexcept {
  ::free(memory);
}
void operator delete[](void* memory, std::align_val_t) noexcept {
  ::free(memory);
}
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  ::free(memory);
}
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept {
  ::free(memory);
}

extern "C" void* mi_malloc(std::size_t bytes) {
  static auto* const next = next_function<void*(std::size_t)>("mi_malloc");
  ++allocations;
  return next(bytes);
}
extern "C" void* mi_heap_malloc(void* heap, std::size_t bytes) {
  static auto* const next = next_function<void*(void*, std::size_t)>("mi_heap_malloc");
  ++allocations;
  return next(heap, bytes);
}
// Where Asio takes its blocks from, when its cache has none.
extern "C" void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  return counted_allocation(bytes, alignment);
}

namespace {

using message = std::uint64_t;
constexpr message many = 100'000;

/// What is allocated while it lives.
class counter {
 public:
  [[nodiscard]] std::uint64_t count() const { return allocations - before_; }

 private:
  std::uint64_t before_ = allocations;
};

/// Not inlined: a frame whose whole life the compiler sees needs no allocation.
[[gnu::noinline]] strait::task<message> frame() {
  co_return 1;
}

}  // namespace

TEST_CASE("what is counted, and what is not") {
  counter here;
  const auto box = std::make_unique<int>(1);
  CHECK(here.count() == 1);
  counter frames;
  const strait::task<message> one = frame();
  CHECK(frames.count() == 1);
}

TEST_CASE("messages in a task allocate nothing, suspensions for the sake of others included") {
  asio::io_context context{1};
  std::uint64_t counted = 1;
  strait::spawn(context, [](std::uint64_t& out) -> strait::task<> {
    auto [tx, rx] = strait::make_channel<message>({.capacity = 64});
    std::array<message, 8> batch{};
    const auto round = [&](message count) -> strait::task<> {
      for (message i = 0; i < count; ++i) {
        co_await tx.send(i);
        (void)co_await rx.recv();
        (void)co_await tx.send_many(batch);
        (void)co_await rx.recv_many(batch);
      }
    };
    co_await round(2'000);  // Asio's cache fills
    strait::task<> measured = round(many);
    counter during;
    co_await measured;
    out = during.count();
  }(counted));
  context.run();
  CHECK(counted == 0);
}

TEST_CASE("messages in an asio::awaitable allocate nothing") {
  asio::io_context context{1};
  std::uint64_t counted = 1;
  asio::co_spawn(
      context,
      [](std::uint64_t& out) -> asio::awaitable<void> {
        auto [tx, rx] = strait::make_channel<message>({.capacity = 64});
        std::uint64_t before = 0;
        for (message i = 0; i < many + 2'000; ++i) {
          if (i == 2'000) before = allocations;  // Asio's cache is full
          co_await tx.send(i);
          (void)co_await rx.recv();
        }
        out = allocations - before;
      }(counted),
      [](std::exception_ptr error) {
        if (error) std::rethrow_exception(error);
      });
  context.run();
  CHECK(counted == 0);
}

TEST_CASE("two tasks that wait for each other allocate nothing, spinning or parked") {
  for (const auto wait : {strait::wait_policy::adaptive, strait::wait_policy::park}) {
    asio::io_context context{1};
    std::uint64_t counted = 1;
    auto [tx, rx] = strait::make_channel<message>({.capacity = 1, .wait = wait});
    strait::spawn(context, [](strait::sender<message> out) -> strait::task<> {
      for (message i = 0; i < 5'000; ++i) co_await out.send(i);
    }(std::move(tx)));
    strait::spawn(context, [](strait::receiver<message> in, std::uint64_t& out) -> strait::task<> {
      for (message i = 0; i < 1'000; ++i) (void)co_await in.recv();
      counter during;
      for (message i = 0; i < 3'000; ++i) (void)co_await in.recv();
      out = during.count();
      while (co_await in.recv()) {
      }
    }(std::move(rx), counted));
    context.run();
    CHECK(counted == 0);
  }
}

TEST_CASE("two threads whose hubs park for each message allocate nothing") {
  watched_channel<message> there{{.capacity = 1, .wait = strait::wait_policy::park}};
  watched_channel<message> back{{.capacity = 1, .wait = strait::wait_policy::park}};
  asio::io_context left{1};
  asio::io_context right{1};
  std::uint64_t counted = 1;
  strait::spawn(
      left, [](strait::sender<message> out, strait::receiver<message>& in, std::uint64_t& result) -> strait::task<> {
        std::uint64_t before = 0;
        for (message i = 0; i < 2'000; ++i) {
          if (i == 1'000) before = allocations;
          co_await out.send(i);
          (void)co_await in.recv();
        }
        result = allocations - before;
      }(std::move(there.tx), back.rx, counted));
  strait::spawn(right, [](strait::receiver<message>& in, strait::sender<message> out) -> strait::task<> {
    while (const auto value = co_await in.recv()) co_await out.send(*value);
  }(there.rx, std::move(back.tx)));
  std::thread other{[&] { right.run(); }};
  left.run();
  other.join();
  CHECK(counted == 0);
}
