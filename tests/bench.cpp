// The demo's own arithmetic, and that no broken message passes for a whole one.
#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
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

bench::row make(std::string kase, std::string subject, std::string unit, double min, double max,
                std::string memory = {}) {
  return {.kase = std::move(kase),
          .subject = std::move(subject),
          .placement = {},
          .state = {},
          .unit = std::move(unit),
          .median = min,
          .min = min,
          .max = max,
          .memory = std::move(memory)};
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
  std::vector<bench::row> rows{make("c", "s", "ns", 1, 2), make("c", "strait", "ns", 1, 2, "sysv")};
  rows[0].placement = "p";
  rows[0].state = "a \"b\"";
  rows[0].median = 1.5;
  rows[1].p50 = 1.25;
  rows[1].line_min = 70.5;
  rows[1].line_max = 80;
  CHECK(bench::json(rows) == R"([
  {"case": "c", "subject": "s", "placement": "p", "state": "a \"b\"", "unit": "ns", "median": 1.5, "min": 1, "max": 2, "p50": null, "p99": null, "p999": null, "memory": null, "line_ns_min": null, "line_ns_max": null},
  {"case": "c", "subject": "strait", "placement": "", "state": "", "unit": "ns", "median": 1, "min": 1, "max": 2, "p50": 1.25, "p99": null, "p999": null, "memory": "sysv", "line_ns_min": 70.5, "line_ns_max": 80}
]
)");
  CHECK(bench::json({}) == "[\n]\n");
}

TEST_CASE("report: a promise compares the best round of a rate, or of a time") {
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

TEST_CASE(
    "report: of several memories the slowest is held against the fastest, and each that crosses against the eventfd") {
  std::vector<bench::row> rows{make("stream/8B/single", "strait", "messages/s", 10, 40, "posix"),
                               make("stream/8B/single", "strait", "messages/s", 20, 35, "file"),
                               make("stream/8B/single", "strait", "messages/s", 5, 39, "unix"),
                               make("stream/8B/single", "textbook-ring", "messages/s", 5, 10),
                               make("stream/8B/batch", "strait", "messages/s", 90, 100, "posix"),
                               make("stream/8B/batch", "strait", "messages/s", 10, 91, "private"),
                               make("rtt/8B/parked", "strait", "us", 11, 90, "posix"),
                               make("rtt/8B/parked", "strait", "us", 14, 15, "sysv"),
                               make("rtt/8B/parked", "strait", "us", 99, 99, "private"),
                               make("rtt/8B/parked", "raw-eventfd", "us", 10, 11)};
  const std::string text = bench::promises(rows);
  CHECK(contains(text, "one by one, strait / textbook-ring                    4.00   at least 2     met\n"));  // posix
  CHECK(contains(text,
                 "one by one, slowest memory / fastest                  0.88   at least 0.9   missed (file / posix)"));
  CHECK(contains(text,
                 "in batches, slowest memory / fastest                  0.91   at least 0.9   met (private / posix)"));
  CHECK(contains(text, "round trip parked, strait / raw-eventfd, posix        1.10   at most  1.3   met\n"));
  CHECK(contains(text, "round trip parked, strait / raw-eventfd, sysv         1.40   at most  1.3   missed\n"));
  CHECK(std::count(text.begin(), text.end(), '\n') == 6);

  // With one memory there is nothing to compare it with, and the rest is as ever.
  std::erase_if(rows, [](const bench::row& one) { return !one.memory.empty() && one.memory != "posix"; });
  const std::string less = bench::promises(rows);
  CHECK(!contains(less, "memory"));
  CHECK(contains(less, "round trip parked, strait / raw-eventfd               1.10   at most  1.3   met\n"));
}

TEST_CASE("report: what the bare line took stands above a case, and where it changed is said at the end") {
  std::vector<bench::row> rows{make("still", "strait", "ns", 1, 2), make("moved", "strait", "ns", 1, 2),
                               make("moved", "pipe", "ns", 1, 2), make("one thread", "strait", "ns", 1, 2)};
  CHECK(bench::where_the_cpus_were(rows).empty());
  CHECK(!contains(bench::table(rows), "line"));

  const auto line = [&rows](std::size_t at, double least, double most) {
    rows[at].line_min = least;
    rows[at].line_max = most;
  };
  for (const std::size_t at : {0U, 1U, 2U}) line(at, 70, 80);
  CHECK(bench::where_the_cpus_were(rows) == "A bare cache line went to the other CPU and back in 70 to 80 ns.\n\n");
  CHECK(contains(bench::table(rows), "placement, line 70 to 80 ns  state"));

  line(0, 390, 400);
  const std::string between = bench::where_the_cpus_were(rows);
  CHECK(contains(between, "in 70 ns at one time and 400 ns at another"));
  CHECK(!contains(between, "It changed within"));
  for (const std::size_t at : {1U, 2U}) line(at, 70, 390);
  CHECK(contains(bench::where_the_cpus_were(rows), "It changed within: moved.\n"));
}
