#include "cases.hpp"

#include <algorithm>
#include <limits>
#include <memory>

#include <fmt/format.h>

namespace bench {
namespace {

constexpr std::string_view carriers[] = {"strait", "unix-socket", "pipe", "posix-mq", "tcp"};

std::vector<std::string_view> with(std::initializer_list<std::string_view> more) {
  std::vector<std::string_view> all(std::begin(carriers), std::end(carriers));
  all.insert(all.begin() + 1, more);
  return all;
}

/// What a round is to take, in ns: long beside waking up, short beside the moods of a shared machine.
double target_ns(const plan& how) {
  return how.quick ? 10e6 : 60e6;
}

/// One subject, or one setting of one, in the rounds of a case.
struct lane {
  const subject* what;
  unsigned variant;
  std::unique_ptr<pair> ends;
  end::round size;
  std::vector<double> values;
  std::vector<double> samples;
  std::uint64_t growth = 0;
  /// Messages that were taken beside what was measured, and how long that went on, in all rounds.
  double load = 0;
  double load_ns = 0;
  /// Why there is nothing to count with; then there is no figure.
  std::string refused = {};
};

double best_of(const lane& one, bool rate) {
  return rate ? *std::max_element(one.values.begin(), one.values.end())
              : *std::min_element(one.values.begin(), one.values.end());
}

/// How large this lane's rounds are. Rounds of growing size, none of which counts, find out how fast it is, and warm it
/// up.
end::round find_size(lane& one, const job& task, const plan& how) {
  const bool spin = task.kind == work::spin;
  if (task.counted != tally::nothing) {
    // A million of strait's; of those that make system calls for each message fewer, and the rest is arithmetic. The
    // first tenth does not count, so that both ends are in their stride.
    const bool strait = one.what->name == "strait";
    const std::uint64_t all = strait ? 1'000'000 : task.counted == tally::syscalls ? 5'000 : 100'000;
    const end::round size{.warm_up = all / 10, .messages = how.quick && !strait ? all / 5 : all};
    one.ends->play(size);
    return size;
  }
  if (task.kind == work::parked) {
    one.ends->play({.stamped = 10});
    return {.stamped = how.quick ? 30U : 120U};
  }
  if (beside_load(task.kind)) {
    one.ends->play({.stamped = 10});
    // Enough of them that the third worst is the 99th percentile.
    return {.warm_up = 20, .stamped = how.quick ? 30U : 300U};
  }
  std::uint64_t messages = spin ? 200 : 4'000;
  double took = 0;
  for (;;) {
    one.ends->play({.messages = messages, .stamped = spin ? messages : 0});
    took = task.kind == work::spin ? one.ends->ping_ns() : one.ends->stream_ns();
    if (took > target_ns(how) / 8 || messages > std::uint64_t{1} << 32) break;
    messages *= 4;
  }
  // Round trips come twice: together, and each by itself.
  const double share = spin ? 0.5 : 1.0;
  const double wanted = static_cast<double>(messages) * share * target_ns(how) / std::max(took, 1.0);
  // A neighbour that held the CPU in the meantime must not make a ring's rounds so short that they fit into the ring.
  const std::uint64_t least = one.what->is_ring && !spin ? 64 * capacity_for(task.message_bytes) : 100;
  messages = std::max<std::uint64_t>(static_cast<std::uint64_t>(wanted), least);
  return {.messages = messages, .stamped = spin ? std::min<std::uint64_t>(messages, sample_limit) : 0};
}

double value_of(const lane& one, const job& task) {
  const auto messages = static_cast<double>(one.size.messages);
  switch (task.counted) {
    case tally::nothing:
      break;
    case tally::syscalls:
      return static_cast<double>(one.ends->syscalls()) * 1e6 / messages;
    case tally::allocations:
      return static_cast<double>(one.ends->allocations()) * 1e6 / messages;
  }
  switch (task.kind) {
    case work::stream:
    case work::batch:
      return messages * 1e9 / one.ends->stream_ns();
    case work::spin:
      return one.ends->ping_ns() / messages;
    case work::parked:
      return summarise(one.ends->samples()).median / 1e3;
    case work::asio_ready:
    case work::task_ready:
    case work::task_switch:
    case work::task_spawn:
      return one.ends->stream_ns() / messages;
    case work::timer:
    case work::socket: {
      std::vector<double> samples = one.ends->samples();
      std::sort(samples.begin(), samples.end());
      return percentile(samples, 0.99) / 1e3;
    }
  }
  return 0;
}

std::string placement_of(const lane& one, const job& task, const conductor& by, memory where) {
  if (alone(task.kind) && !beside_load(task.kind)) return "one thread";
  const bool threads = where == memory::private_memory && one.what->may_be_alone && !alone(task.kind);
  return by.where().words + (threads ? ", one process" : "");
}

std::string state_of(const lane& one, const job& task, bool one_cpu) {
  std::string state = "awake";
  if (task.counted == tally::syscalls) {
    state += fmt::format(", {} counted by ptrace", one.size.messages);
  } else if (task.counted == tally::allocations) {
    state += fmt::format(", {} under an interposed malloc, mimalloc grew by {} B", one.size.messages, one.growth);
  } else if (task.kind == work::spin) {
    state = one_cpu ? "yielding" : "spinning";
  } else if (task.kind == work::parked) {
    state = "parked";
  } else if (beside_load(task.kind)) {
    state += fmt::format(", beside {:.1f} M messages/s", one.load * 1e3 / one.load_ns);
  }
  if (one.what->name == "strait") state += task.kind == work::parked ? ", park" : ", adaptive";
  if (one.what->name == "posix-mq" && task.kind == work::batch) state += ", no batch call";
  if (!one.what->variants.empty()) state += fmt::format(", {}", one.what->variants[one.variant]);
  return state;
}

row to_row(lane& one, const bench_case& what, const conductor& by, memory where) {
  if (!one.refused.empty()) {
    return {.kase = std::string{what.name},
            .subject = std::string{one.what->name},
            .placement = by.where().words,
            .state = "not counted: " + one.refused,
            .unit = std::string{what.unit}};
  }
  const summary over_rounds = summarise(one.values);
  row result{.kase = std::string{what.name},
             .subject = std::string{one.what->name},
             .placement = placement_of(one, what.task, by, where),
             .state = state_of(one, what.task, by.where().one_cpu()),
             .unit = std::string{what.unit},
             .median = over_rounds.median,
             .min = over_rounds.min,
             .max = over_rounds.max};
  if (!one.samples.empty()) {
    std::sort(one.samples.begin(), one.samples.end());
    const double scale = what.unit == "us" ? 1e3 : 1.0;
    result.p50 = percentile(one.samples, 0.50) / scale;
    result.p99 = percentile(one.samples, 0.99) / scale;
    result.p999 = percentile(one.samples, 0.999) / scale;
    result.slowest = one.samples.back() / scale;
  }
  return result;
}

}  // namespace

std::span<const bench_case> cases() {
  static const std::vector<bench_case> all{
      {"stream/8B/single", {work::stream, 8}, "messages/s", true, with({"textbook-ring", "tuned-ring"})},
      {"stream/8B/batch", {work::batch, 8}, "messages/s", true, with({"textbook-ring", "tuned-ring"})},
      {"stream/64B/single", {work::stream, 64}, "messages/s", true, with({"textbook-ring", "tuned-ring"})},
      {"stream/1KiB/single", {work::stream, 1024}, "messages/s", true, with({"textbook-ring", "tuned-ring"})},
      {"rtt/8B/spin", {work::spin, 8}, "ns", false, with({"raw-line"})},
      {"rtt/8B/parked", {work::parked, 8}, "us", false, with({"raw-eventfd"})},
      {"task/ready-await", {work::task_ready, 8}, "ns", false, {"strait", "raw-ring"}},
      {"task/switch", {work::task_switch, 8}, "ns", false, {"strait", "asio-post", "asio-co-spawn"}},
      {"task/spawn", {work::task_spawn, 8}, "ns", false, {"strait", "asio-post", "asio-co-spawn"}},
      {"asio/ready-await", {work::asio_ready, 8}, "ns", false, {"strait", "asio-concurrent-channel"}},
      {"asio/timer-beside-load", {work::timer, 8}, "us", false, {"strait", "asio-post"}},
      {"asio/socket-beside-load", {work::socket, 8}, "us", false, {"strait", "asio-post"}},
      {"cost/syscalls-per-million", {work::stream, 8, tally::syscalls}, "system calls", false, with({})},
      {"cost/allocations-per-million", {work::stream, 8, tally::allocations}, "allocations", false, with({})},
      {"cost/allocations-task-ready", {work::task_ready, 8, tally::allocations}, "allocations", false, {"strait"}},
      {"cost/allocations-asio-ready",
       {work::asio_ready, 8, tally::allocations},
       "allocations",
       false,
       {"strait", "asio-concurrent-channel"}},
  };
  return all;
}

double line_ns(conductor& by) {
  pair ends{by, subject_named("raw-line"), 0, {work::spin, 8}, plant::none, "the probe of the machine"};
  double best = std::numeric_limits<double>::infinity();
  for (int round = 0; round < 5; ++round) {
    constexpr std::uint64_t trips = 10'000;
    ends.play({.messages = trips});
    best = std::min(best, ends.ping_ns() / static_cast<double>(trips));
  }
  ends.finish();
  return best;
}

std::vector<row> run_case(conductor& by, const bench_case& what, const plan& how, const progress& tell) {
  std::vector<lane> lanes;
  for (const std::string_view name : what.subjects) {
    if (!how.wants(name)) continue;
    const subject& one = subject_named(name);
    const auto variants = std::max<std::size_t>(one.variants.size(), 1);
    for (unsigned variant = 0; variant < variants; ++variant) {
      tell(0, name);
      lane made{.what = &one, .variant = variant, .ends = nullptr, .size = {}, .values = {}, .samples = {}};
      job task = what.task;
      task.memory = how.memory;
      made.ends = std::make_unique<pair>(by, one, variant, task, how.fault, fmt::format("{}, {}", what.name, name));
      if (what.task.counted == tally::syscalls) made.refused = made.ends->count_syscalls();
      made.size = find_size(made, what.task, how);
      lanes.push_back(std::move(made));
    }
  }
  for (unsigned round = 1; round <= how.rounds; ++round) {
    for (lane& one : lanes) {
      tell(round, one.what->name);
      one.ends->play(one.size);
      one.values.push_back(value_of(one, what.task));
      one.growth = std::max(one.growth, one.ends->mimalloc_growth());
      one.load += static_cast<double>(one.ends->load());
      one.load_ns += one.ends->stream_ns();
      const auto samples = one.ends->samples();
      one.samples.insert(one.samples.end(), samples.begin(), samples.end());
    }
  }
  for (lane& one : lanes) one.ends->finish();

  std::vector<row> rows;
  for (const std::string_view name : what.subjects) {
    lane* best = nullptr;
    for (lane& one : lanes) {
      if (one.what->name != name) continue;
      const bool better = best != nullptr && (what.rate ? best_of(one, true) > best_of(*best, true)
                                                        : best_of(one, false) < best_of(*best, false));
      if (best == nullptr || better) best = &one;
    }
    if (best != nullptr) rows.push_back(to_row(*best, what, by, how.memory));
  }
  return rows;
}

}  // namespace bench
