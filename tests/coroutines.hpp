// What the tests of coroutines share: waiting for a condition with a bound, seeing whether somebody sleeps, and a
// coroutine type that knows neither Asio nor strait.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "ends.hpp"

import strait;

namespace {

/// Waits until `condition()`, for 30 seconds at most: long enough for a loaded machine under a sanitizer, and a test
/// that hangs still says where.
template <class Condition>
[[maybe_unused]] bool eventually(Condition condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds{30};
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds{100});
  }
  return true;
}

/// Whether the kernel has this thread of ours asleep.
[[maybe_unused]] bool asleep(pid_t thread) {
  std::ifstream file{"/proc/self/task/" + std::to_string(thread) + "/stat"};
  const std::string line{std::istreambuf_iterator<char>{file}, {}};
  const std::size_t name_end = line.rfind(')');
  return name_end != std::string::npos && name_end + 2 < line.size() && line[name_end + 2] == 'S';
}

/// A channel whose presence words the test can read.
template <class T>
struct watched_channel {
  strait::sender<T> tx;
  strait::receiver<T> rx;
  std::atomic<std::uint32_t>* sender_word = nullptr;
  std::atomic<std::uint32_t>* receiver_word = nullptr;

  explicit watched_channel(const strait::channel_options& options = {}) {
    auto [sending, receiving] = test::make_ends<T>(options);
    sender_word = &sending->own_word();
    receiver_word = &receiving->own_word();
    tx = strait::sender<T>{std::move(sending)};
    rx = strait::receiver<T>{std::move(receiving)};
  }
};

/// Whether the word tells that its owner is parked in a hub, or as a thread.
[[maybe_unused]] bool parked(const std::atomic<std::uint32_t>& word) {
  const auto now = static_cast<strait::presence>(word.load());
  return now == strait::presence::hub_parked || now == strait::presence::thread_parked;
}

/// A coroutine that knows neither Asio nor strait: it begins at once, nobody awaits it, and what leaves it ends the
/// test.
struct bare_coroutine {
  struct promise_type {
    bare_coroutine get_return_object() noexcept { return {}; }
    std::suspend_never initial_suspend() const noexcept { return {}; }
    std::suspend_never final_suspend() const noexcept { return {}; }
    void return_void() const noexcept {}
    void unhandled_exception() const noexcept { std::terminate(); }
  };
};

/// The same, but somebody holds it and destroys it.
class owned_coroutine {
 public:
  struct promise_type {
    owned_coroutine get_return_object() noexcept {
      return owned_coroutine{std::coroutine_handle<promise_type>::from_promise(*this)};
    }
    std::suspend_always initial_suspend() const noexcept { return {}; }
    std::suspend_always final_suspend() const noexcept { return {}; }
    void return_void() const noexcept {}
    void unhandled_exception() const noexcept { std::terminate(); }
  };
  owned_coroutine(owned_coroutine&& other) noexcept : frame_{std::exchange(other.frame_, nullptr)} {}
  owned_coroutine& operator=(owned_coroutine&&) = delete;
  ~owned_coroutine() {
    if (frame_) frame_.destroy();
  }
  void resume() const { frame_.resume(); }
  [[nodiscard]] bool done() const { return frame_.done(); }

 private:
  explicit owned_coroutine(std::coroutine_handle<promise_type> frame) noexcept : frame_{frame} {}
  std::coroutine_handle<promise_type> frame_;
};

/// Suspends until the test resumes it.
struct gate {
  std::coroutine_handle<> waiting;
  [[nodiscard]] bool await_ready() const noexcept { return false; }
  void await_suspend(std::coroutine_handle<> h) noexcept { waiting = h; }
  void await_resume() const noexcept {}
};

/// Counts how many of it live.
struct counted {
  explicit counted(int& living) noexcept : living_{&living} { ++*living_; }
  counted(const counted&) = delete;
  counted& operator=(const counted&) = delete;
  ~counted() { --*living_; }

 private:
  int* living_;
};

}  // namespace
