// The demo's own arithmetic, and that no broken message passes for a whole one.
#include <algorithm>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "../bench/measure.hpp"
#include "../bench/message.hpp"
#include "../bench/report.hpp"

namespace {

template <class M>
std::string verdict(bench::plant fault) {
  bench::source<M> out;
  bench::checker<M> in;
  for (int i = 0; i < 100; ++i) in.take(out.next());
  out.spoil(fault);
  try {
    in.take(out.next());
  } catch (const bench::broken_message& broken) {
    return broken.what();
  }
  return "whole";
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

template <class M>
void check_verdicts() {
  CHECK(verdict<M>(bench::plant::none) == "whole");
  CHECK(contains(verdict<M>(bench::plant::lost), "expected message 100"));
  CHECK(contains(verdict<M>(bench::plant::lost), "message 101, so 1 lost or overtaken"));
  CHECK(contains(verdict<M>(bench::plant::doubled), "message 99 again, so it is doubled or late"));
  CHECK(contains(verdict<M>(bench::plant::torn), "torn"));
}

}  // namespace

TEST_CASE("summary: median, minimum and maximum of any order") {
  const auto odd = bench::summarise({3, 1, 2});
  CHECK(odd.median == 2);
  CHECK(odd.min == 1);
  CHECK(odd.max == 3);
  CHECK(bench::summarise({4, 1, 2, 3}).median == 2.5);
  CHECK(bench::summarise({7}).median == 7);
}

TEST_CASE("percentile: the nearest rank") {
  std::vector<double> samples;
  for (int i = 1; i <= 1000; ++i) samples.push_back(i);
  CHECK(bench::percentile(samples, 0.5) == 500);
  CHECK(bench::percentile(samples, 0.99) == 990);
  CHECK(bench::percentile(samples, 0.999) == 999);
  CHECK(bench::percentile(samples, 0) == 1);
  CHECK(bench::percentile(samples, 1) == 1000);
  CHECK(bench::percentile({5}, 0.999) == 5);
}

TEST_CASE("message: lost, doubled and torn are told apart, with what was expected and what was found") {
  check_verdicts<bench::message<8>>();
  check_verdicts<bench::message<64>>();
  check_verdicts<bench::message<1024>>();
}

TEST_CASE("message: one flipped bit anywhere is seen") {
  using M = bench::message<64>;
  for (std::size_t word = 0; word < 8; ++word) {
    for (unsigned bit = 0; bit < 64; ++bit) {
      bench::source<M> out;
      bench::checker<M> in;
      M spoilt = out.next();
      spoilt.words[word] ^= std::uint64_t{1} << bit;
      CHECK_THROWS_AS(in.take(spoilt), bench::broken_message);
    }
  }
}

TEST_CASE("report: what does not apply is null, and a quote does not end a string") {
  const std::vector<bench::row> rows{{.kase = "c",
                                      .subject = "s",
                                      .placement = "p",
                                      .state = "a \"b\"",
                                      .unit = "ns",
                                      .median = 1.5,
                                      .min = 1,
                                      .max = 2}};
  CHECK(
      bench::json(rows) ==
      "[\n  {\"case\": \"c\", \"subject\": \"s\", \"placement\": \"p\", \"state\": \"a \\\"b\\\"\", \"unit\": \"ns\", "
      "\"median\": 1.5, \"min\": 1, \"max\": 2, \"p50\": null, \"p99\": null, \"p999\": null}\n]\n");
  CHECK(bench::json({}) == "[\n]\n");
}

TEST_CASE("report: a promise compares the best round of a rate, or of a time") {
  const auto make = [](std::string kase, std::string subject, std::string unit, double min, double max) {
    return bench::row{.kase = std::move(kase),
                      .subject = std::move(subject),
                      .placement = {},
                      .state = {},
                      .unit = std::move(unit),
                      .median = min,
                      .min = min,
                      .max = max};
  };
  const std::vector<bench::row> rows{make("stream/8B/single", "strait", "messages/s", 10, 30),
                                     make("stream/8B/single", "textbook-ring", "messages/s", 5, 10),
                                     make("rtt/8B/spin", "strait", "ns", 40, 90),
                                     make("rtt/8B/spin", "raw-line", "ns", 20, 21),
                                     make("task/switch", "strait", "ns", 8, 9),
                                     make("task/switch", "asio-post", "ns", 20, 70),
                                     make("asio/timer-beside-load", "strait", "us", 50, 60),
                                     make("asio/timer-beside-load", "asio-post", "us", 40, 90),
                                     make("cost/allocations-task-ready", "strait", "allocations", 0, 3),
                                     make("cost/syscalls-per-million", "strait", "system calls", 1, 2),
                                     make("cost/syscalls-per-million", "pipe", "system calls", 9, 9)};
  const std::string text = bench::promises(rows);
  CHECK(contains(text, "3.00   at least 2     met"));
  CHECK(contains(text, "2.00   at most  1.5   missed"));
  CHECK(contains(text, "2.50   at least 1     met"));
  CHECK(contains(text, "1.25   at most  1     missed"));
  CHECK(contains(text, "0   exactly  0     met (in the worst round 3)"));
  CHECK(contains(text, "1   exactly  0     missed (in the worst round 2)"));
  CHECK(std::count(text.begin(), text.end(), '\n') == 6);
}
