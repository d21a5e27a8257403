// subscriber: takes the ticks of some symbols and says what it got. See README.md.

#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>

// Imports come after all other includes.
#include "ticks.hpp"

import strait;

namespace fanout {
namespace {

struct options {
  std::string name;
  subscription wants{0, symbols - 1};
  std::chrono::microseconds work{0};  // for each tick
  bool again = false;                 // connects again when the feed died
};

struct tally {
  std::uint64_t got = 0;
  std::uint64_t missed = 0;
  std::uint64_t first = 0;
  std::uint64_t last = 0;
};

/// Whether these are the numbers of the wanted symbols that lie between two ticks.
std::uint64_t wanted_between(std::uint64_t last, std::uint64_t next, const subscription& wants) {
  std::uint64_t count = 0;
  for (std::uint64_t number = last + 1; number < next; ++number) {
    const auto symbol = static_cast<std::uint32_t>(number % symbols);
    if (symbol >= wants.first && symbol <= wants.last) ++count;
  }
  return count;
}

/// Until the feed ends. True: it did, in good order; false: it died.
bool follow(strait::duplex<tick, subscription>& feed, const options& chosen, tally& so_far) {
  feed.blocking_send(chosen.wants);
  std::uint64_t told_before = 0;
  for (bool first = true;; first = false) {
    std::error_code error;
    const auto next = feed.blocking_recv(error);
    if (error == strait::errc::peer_died) return false;
    if (error) throw std::system_error{error, "taking a tick"};
    if (!next) return true;
    if (first) {
      so_far.first = next->number;
    } else if (wanted_between(so_far.last, next->number, chosen.wants) != next->missed - told_before) {
      throw std::runtime_error{"ticks are missing, and the feed does not say so"};
    }
    if (next->missed != told_before) {
      std::printf("missed %llu before tick %llu\n", static_cast<unsigned long long>(next->missed - told_before),
                  static_cast<unsigned long long>(next->number));
      std::fflush(stdout);
    }
    told_before = next->missed;
    so_far.last = next->number;
    so_far.missed = next->missed;
    ++so_far.got;
    if (chosen.work.count() != 0) std::this_thread::sleep_for(chosen.work);  // stands for what one does with a price
  }
}

/// Waits for a feed to listen.
strait::duplex<tick, subscription> connect(const std::string& name) {
  for (;;) {
    std::error_code error;
    auto feed = strait::blocking_connect<tick, subscription>(name, error);
    if (!error) return feed;
    // Not there yet, or not any more.
    if (error != std::errc::no_such_file_or_directory && error != std::errc::connection_refused &&
        error != std::errc::connection_reset) {
      return strait::blocking_connect<tick, subscription>(name);  // throws, and says why
    }
    std::this_thread::sleep_for(std::chrono::milliseconds{20});
  }
}

std::uint32_t number_in(std::string_view text) {
  std::uint32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) {
    throw std::runtime_error{"expected a number, found '" + std::string{text} + "'"};
  }
  return value;
}

options parse(int argc, char** argv) {
  options chosen;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (word == "--symbols" && i + 2 < argc) {
      chosen.wants = {number_in(argv[i + 1]), number_in(argv[i + 2])};
      i += 2;
    } else if (word == "--work" && i + 1 < argc) {
      chosen.work = std::chrono::microseconds{number_in(argv[++i])};
    } else if (word == "--again") {
      chosen.again = true;
    } else if (chosen.name.empty() && word.starts_with("unix:")) {
      chosen.name = word;
    } else {
      throw std::runtime_error{"usage: subscriber unix:PATH [--symbols FIRST LAST] [--work MICROSECONDS] [--again]"};
    }
  }
  if (chosen.name.empty()) throw std::runtime_error{"expected unix:PATH, where the feed is"};
  return chosen;
}

}  // namespace
}  // namespace fanout

int main(int argc, char** argv) try {
  using namespace fanout;
  const options chosen = parse(argc, argv);
  for (;;) {
    auto feed = connect(chosen.name);
    tally got;
    const bool ended = follow(feed, chosen, got);
    std::printf("%s: got %llu, missed %llu, from %llu to %llu\n", ended ? "the feed ended" : "the feed died",
                static_cast<unsigned long long>(got.got), static_cast<unsigned long long>(got.missed),
                static_cast<unsigned long long>(got.first), static_cast<unsigned long long>(got.last));
    std::fflush(stdout);
    if (ended) return 0;
    if (!chosen.again) return 2;
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "subscriber: %s\n", error.what());
  return 1;
}
