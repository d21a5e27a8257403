#include "cases.hpp"

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <utility>

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

/// Whether strait's channels lie in each memory that was asked for, one after the other.
bool compares_memories(const job& task) {
  return !alone(task.kind) && task.counted == tally::nothing && task.message_bytes == 8;
}

/// One subject, or one setting of one, in the rounds of a case.
struct lane {
  const subject* what;
  unsigned variant;
  memory where;
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

/// Whether the case has only one thread, for which it does not matter how far away the other CPU is.
bool on_one_thread(const job& task) {
  return alone(task.kind) && !beside_load(task.kind);
}

std::string placement_of(const lane& one, const job& task, const conductor& by) {
  if (on_one_thread(task)) return "one thread";
  return by.where().words + (one.ends->in_one_process() ? ", one process" : "");
}

/// The memory in which a lane's channels lie because it was asked for; empty where that cannot be chosen.
std::string_view memory_of(const lane& one, const job& task) {
  if (!one.what->in_any_memory || alone(task.kind)) return {};
  return memory_names[static_cast<std::size_t>(one.where)];
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
  if (const std::string_view where = memory_of(one, task); !where.empty()) state += fmt::format(", {}", where);
  if (one.what->name == "posix-mq" && task.kind == work::batch) state += ", no batch call";
  if (!one.what->variants.empty()) state += fmt::format(", {}", one.what->variants[one.variant]);
  return state;
}

/// `line`: what the bare line took, at each look.
row to_row(lane& one, const bench_case& what, const conductor& by, const std::vector<double>& line) {
  row result{.kase = std::string{what.name},
             .subject = std::string{one.what->name},
             .placement = placement_of(one, what.task, by),
             .state = "not counted: " + one.refused,
             .unit = std::string{what.unit},
             .memory = std::string{memory_of(one, what.task)}};
  if (!line.empty()) {
    const summary seen = summarise(line);
    result.line_min = seen.min;
    result.line_max = seen.max;
  }
  if (!one.refused.empty()) return result;
  result.state = state_of(one, what.task, by.where().one_cpu());
  const summary over_rounds = summarise(one.values);
  result.median = over_rounds.median;
  result.min = over_rounds.min;
  result.max = over_rounds.max;
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

line_probe::line_probe(conductor& by) {
  if (by.where().one_cpu()) return;
  ends_.emplace(by, subject_named("raw-line"), 1U, job{.kind = work::spin}, plant::none, "the probe of the machine");
}

std::optional<double> line_probe::look() {
  if (!ends_) return std::nullopt;
  constexpr std::uint64_t trips = 2'000;
  double best = std::numeric_limits<double>::infinity();
  for (int round = 0; round < 3; ++round) {
    ends_->play({.messages = trips});
    best = std::min(best, ends_->ping_ns() / static_cast<double>(trips));
  }
  return best;
}

std::vector<row> run_case(conductor& by, line_probe& line, const bench_case& what, const plan& how,
                          const progress& tell) {
  std::vector<lane> lanes;
  for (const std::string_view name : what.subjects) {
    if (!how.wants(name)) continue;
    const subject& one = subject_named(name);
    const bool each_memory = one.in_any_memory && compares_memories(what.task);
    for (const memory where : std::span{how.memories}.first(each_memory ? how.memories.size() : 1)) {
      const auto variants = std::max<std::size_t>(one.variants.size(), 1);
      for (unsigned variant = 0; variant < variants; ++variant) {
        tell(0, name);
        lane made{
            .what = &one, .variant = variant, .where = where, .ends = {}, .size = {}, .values = {}, .samples = {}};
        job task = what.task;
        task.memory = where;
        std::string label = fmt::format("{}, {}", what.name, name);
        if (each_memory) label += fmt::format(", {}", memory_names[static_cast<std::size_t>(where)]);
        made.ends = std::make_unique<pair>(by, one, variant, task, how.fault, std::move(label));
        if (what.task.counted == tally::syscalls) made.refused = made.ends->count_syscalls();
        made.size = find_size(made, what.task, how);
        lanes.push_back(std::move(made));
      }
    }
  }
  std::vector<double> looks;
  const auto look_at_line = [&] {
    if (on_one_thread(what.task)) return;
    if (const auto seen = line.look()) looks.push_back(*seen);
  };
  for (unsigned round = 1; round <= how.rounds; ++round) {
    look_at_line();
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
  look_at_line();
  for (lane& one : lanes) one.ends->finish();

  // The best variant of each subject in each memory; they stand beside one another.
  std::vector<row> rows;
  for (auto first = lanes.begin(); first != lanes.end();) {
    const auto next = std::find_if(first, lanes.end(), [&](const lane& other) {
      return other.what != first->what || other.where != first->where;
    });
    const auto best = std::max_element(first, next, [&](const lane& a, const lane& b) {
      return what.rate ? best_of(a, true) < best_of(b, true) : best_of(a, false) > best_of(b, false);
    });
    rows.push_back(to_row(*best, what, by, looks));
    first = next;
  }
  return rows;
}

}  // namespace bench
