// feed: publishes prices to every subscriber at a socket. See README.md.

#include <asio.hpp>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <list>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

// These import strait, and imports come after all other includes.
#include <strait/asio.hpp>

#include "ticks.hpp"

import strait;

namespace fanout {
namespace {

struct options {
  std::string name;
  std::uint64_t count = 0;        // ticks; 0: until it is told to end
  std::uint64_t rate = 10'000;    // ticks a second
  std::uint64_t subscribers = 0;  // so many must be there before the first tick
  std::size_t lane = 1024;        // ticks that a subscriber may be behind
};

class feed {
 public:
  explicit feed(options chosen)
      : chosen_{std::move(chosen)},
        door_{chosen_.name, {.lanes = {.capacity = chosen_.lane}}},
        signals_{context_, SIGINT, SIGTERM} {}

  void operator()() {
    for (const auto part : {&feed::let_in, &feed::publish, &feed::end_on_signal}) {
      asio::co_spawn(context_, (this->*part)(), [](std::exception_ptr error) {
        if (error) std::rethrow_exception(error);  // out of io_context::run()
      });
    }
    context_.run();
    for (const subscriber& one : subscribers_) {
      std::fprintf(stderr, "feed: subscriber %u stays, having missed %llu\n", one.id,
                   static_cast<unsigned long long>(one.missed));
    }
    std::fprintf(stderr, "feed: published %llu ticks\n", static_cast<unsigned long long>(published_));
  }

 private:
  struct subscriber {
    strait::duplex<subscription, tick> line;
    unsigned id = 0;
    std::optional<subscription> wants;
    std::uint64_t missed = 0;
    bool gone = false;
  };

  asio::awaitable<void> let_in();
  asio::awaitable<void> hear(subscriber& from);
  asio::awaitable<void> publish();
  asio::awaitable<void> end_on_signal();
  void publish_one(const tick& next);

  options chosen_;
  strait::listener<subscription, tick> door_;
  /// In place where they are: coroutines refer to them. Outlives the context, which destroys these coroutines.
  std::list<subscriber> subscribers_;
  asio::io_context context_{1};
  asio::signal_set signals_;
  unsigned last_id_ = 0;
  std::uint64_t published_ = 0;
};

asio::awaitable<void> feed::let_in() {
  for (;;) {
    subscriber& came = subscribers_.emplace_back(co_await door_.accept());
    came.id = ++last_id_;
    std::fprintf(stderr, "feed: subscriber %u is process %u\n", came.id, came.line.peer().process);
    asio::co_spawn(context_, hear(came), [](std::exception_ptr error) {
      if (error) std::rethrow_exception(error);
    });
  }
}

/// What one subscriber says, until it is gone.
asio::awaitable<void> feed::hear(subscriber& from) {
  std::error_code error;
  while (const auto said = co_await from.line.recv(error)) {
    // It may be anybody's process: nothing it says is believed. A range that holds no symbol is just that.
    if (!from.wants) {
      std::fprintf(stderr, "feed: subscriber %u wants symbols %u to %u\n", from.id, said->first, said->last);
    }
    from.wants = *said;
  }
  std::fprintf(stderr, "feed: subscriber %u %s, having missed %llu\n", from.id,
               error ? error.message().c_str() : "left", static_cast<unsigned long long>(from.missed));
  // Removed between two ticks, and not while they are gone through. Nothing here refers to it any more.
  from.gone = true;
}

/// Nobody is waited for: where there is no room, a subscriber misses this tick, and learns how many it missed from the
/// next that fits.
void feed::publish_one(const tick& next) {
  for (subscriber& to : subscribers_) {
    if (!to.wants || next.symbol < to.wants->first || next.symbol > to.wants->last) continue;
    tick own = next;
    own.missed = to.missed;
    std::error_code gone;  // whether it closed or died is what `hear` is told
    if (to.line.try_send(own, gone) || gone) continue;
    if (to.missed++ == 0) std::fprintf(stderr, "feed: subscriber %u is too slow, and misses ticks\n", to.id);
  }
}

asio::awaitable<void> feed::publish() {
  using namespace std::chrono_literals;
  asio::steady_timer timer{context_};
  const auto wanting = [this] {
    std::uint64_t count = 0;
    for (const subscriber& one : subscribers_) count += one.wants ? 1 : 0;
    return count;
  };
  while (wanting() < chosen_.subscribers) {
    timer.expires_after(1ms);
    co_await timer.async_wait(asio::use_awaitable);
  }
  std::fprintf(stderr, "feed: begins\n");
  const auto began = std::chrono::steady_clock::now();
  const auto interval = std::chrono::nanoseconds{1'000'000'000 / chosen_.rate};
  timer.expires_at(began);
  for (;;) {
    // What is due since the last time, in one go: a timer for each tick would be most of the work.
    const auto due = static_cast<std::uint64_t>((std::chrono::steady_clock::now() - began) / interval);
    for (; published_ <= due; ++published_) {
      if (chosen_.count != 0 && published_ == chosen_.count) {
        context_.stop();  // the lanes close with their handles, and subscribers take what is in them
        co_return;
      }
      const auto symbol = static_cast<std::uint32_t>(published_ % symbols);
      publish_one({published_, symbol, 1000 + static_cast<std::uint32_t>(published_ * 7919 % 100), 0});
    }
    std::erase_if(subscribers_, [](const subscriber& one) { return one.gone; });
    timer.expires_at(std::max(timer.expiry() + 1ms, began + static_cast<std::int64_t>(published_) * interval));
    co_await timer.async_wait(asio::use_awaitable);
  }
}

asio::awaitable<void> feed::end_on_signal() {
  (void)co_await signals_.async_wait(asio::use_awaitable);
  context_.stop();
}

std::uint64_t number_in(std::string_view text, std::string_view what) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) {
    throw std::runtime_error{std::string{what} + ": expected a number, found '" + std::string{text} + "'"};
  }
  return value;
}

options parse(int argc, char** argv) {
  options chosen;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    const auto value = [&] {
      if (i + 1 == argc) throw std::runtime_error{std::string{word} + ": expected a number behind it"};
      return number_in(argv[++i], word);
    };
    if (word == "--count") {
      chosen.count = value();
    } else if (word == "--rate") {
      chosen.rate = value();
    } else if (word == "--subscribers") {
      chosen.subscribers = value();
    } else if (word == "--lane") {
      chosen.lane = value();
    } else if (chosen.name.empty() && word.starts_with("unix:")) {
      chosen.name = word;
    } else {
      throw std::runtime_error{"usage: feed unix:PATH [--count N] [--rate N] [--subscribers N] [--lane N]"};
    }
  }
  if (chosen.name.empty()) throw std::runtime_error{"expected unix:PATH, where subscribers come in"};
  if (chosen.rate == 0 || chosen.rate > 1'000'000) throw std::runtime_error{"--rate: expected 1 to 1000000"};
  return chosen;
}

}  // namespace
}  // namespace fanout

int main(int argc, char** argv) try {
  fanout::feed publish{fanout::parse(argc, argv)};
  publish();
} catch (const std::exception& error) {
  std::fprintf(stderr, "feed: %s\n", error.what());
  return 1;
}
