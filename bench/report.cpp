#include "report.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace bench {
namespace {

std::string number(std::optional<double> value, std::string_view unit) {
  if (!value) return "-";
  if (unit == "messages/s") {
    if (*value >= 1e9) return fmt::format("{:.2f} G/s", *value / 1e9);
    if (*value >= 1e6) return fmt::format("{:.2f} M/s", *value / 1e6);
    return fmt::format("{:.1f} k/s", *value / 1e3);
  }
  if (unit == "ns" || unit == "us") return fmt::format("{:.1f} {}", *value, unit);
  return fmt::format("{:.0f}", *value);
}

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string json_number(std::optional<double> value) {
  return value && std::isfinite(*value) ? fmt::format("{}", *value) : "null";
}

const row* find(std::span<const row> rows, std::string_view kase, std::string_view subject) {
  const auto found = std::find_if(rows.begin(), rows.end(),
                                  [&](const row& one) { return one.kase == kase && one.subject == subject; });
  return found == rows.end() ? nullptr : &*found;
}

struct promise {
  std::string_view kase;
  std::string_view other_case;
  std::string_view other;
  /// The ratio is strait's over the other's (rates, times) or, `inverted`, the other's over strait's.
  bool inverted;
  bool at_least;
  double target;
  std::string_view words;
  /// Held in each memory that crosses processes, not only in the first.
  bool in_each_memory = false;
};

constexpr promise all_promises[] = {
    {"stream/8B/single", "stream/8B/single", "textbook-ring", false, true, 2.0, "one by one, strait / textbook-ring"},
    {"stream/8B/single", "stream/8B/single", "tuned-ring", false, true, 0.7, "one by one, strait / tuned-ring"},
    {"stream/8B/batch", "stream/8B/single", "textbook-ring", false, true, 5.0,
     "in batches, strait / textbook-ring one by one"},
    {"rtt/8B/spin", "rtt/8B/spin", "raw-line", false, false, 1.5, "round trip spinning, strait / raw-line"},
    {"rtt/8B/parked", "rtt/8B/parked", "raw-eventfd", false, false, 1.3, "round trip parked, strait / raw-eventfd",
     true},
    {"task/ready-await", "task/ready-await", "raw-ring", false, false, 1.5, "ready await in a task, strait / raw-ring"},
    {"task/switch", "task/switch", "asio-post", true, true, 1.0, "task switch, asio-post / strait"},
    {"task/switch", "task/switch", "asio-co-spawn", true, true, 1.0, "task switch, asio-co-spawn / strait"},
    {"task/spawn", "task/spawn", "asio-post", true, true, 1.0, "spawn, asio-post / strait"},
    {"task/spawn", "task/spawn", "asio-co-spawn", true, true, 1.0, "spawn, asio-co-spawn / strait"},
    {"asio/ready-await", "asio/ready-await", "asio-concurrent-channel", true, true, 10.0,
     "ready await, asio-concurrent-channel / strait"},
    {"asio/timer-beside-load", "asio/timer-beside-load", "asio-post", false, false, 1.0,
     "p99 of a timer beside a load, strait / asio-post"},
    {"asio/socket-beside-load", "asio/socket-beside-load", "asio-post", false, false, 1.0,
     "p99 of a socket beside a load, strait / asio-post"},
};

/// Of several memories the slowest is held against the fastest.
struct memory_promise {
  std::string_view kase;
  double target;
  std::string_view words;
};

constexpr memory_promise all_memory_promises[] = {
    {"stream/8B/single", 0.9, "one by one, slowest memory / fastest"},
    {"stream/8B/batch", 0.9, "in batches, slowest memory / fastest"},
};

/// A noisy neighbour only ever takes away: the best round.
double best_round(const row& one) {
  return one.unit == "messages/s" ? *one.max : *one.min;
}

std::string verdict(std::string_view words, double ratio, bool at_least, double target) {
  const bool met = at_least ? ratio >= target : ratio <= target;
  return fmt::format("  {:<49}  {:>7.2f}   {} {:<4}  {}", words, ratio, at_least ? "at least" : "at most ", target,
                     met ? "met" : "missed");
}

/// strait's rows of a case: one, or one for each memory.
std::vector<const row*> rows_of_strait(std::span<const row> rows, std::string_view kase) {
  std::vector<const row*> found;
  for (const row& one : rows) {
    if (one.kase == kase && one.subject == "strait" && one.max) found.push_back(&one);
  }
  return found;
}

}  // namespace

std::string table(std::span<const row> rows) {
  if (rows.empty()) return {};
  const bool samples = std::any_of(rows.begin(), rows.end(), [](const row& one) { return one.p50.has_value(); });
  std::vector<std::vector<std::string>> cells;
  std::vector<std::string> heading{rows[0].kase, "median", "min", "max"};
  if (samples) heading.insert(heading.end(), {"p50", "p99", "p99.9", "slowest"});
  heading.emplace_back("placement");
  if (rows[0].line_min && rows[0].line_max) {
    heading.back() += fmt::format(", line {:.0f} to {:.0f} ns", *rows[0].line_min, *rows[0].line_max);
  }
  heading.emplace_back("state");
  const std::size_t first_words = heading.size() - 2;
  cells.push_back(std::move(heading));
  for (const row& one : rows) {
    std::vector<std::string> line{"  " + one.subject, number(one.median, one.unit), number(one.min, one.unit),
                                  number(one.max, one.unit)};
    if (samples) {
      for (const auto& value : {one.p50, one.p99, one.p999, one.slowest}) line.push_back(number(value, one.unit));
    }
    line.push_back(one.placement);
    line.push_back(one.state);
    cells.push_back(std::move(line));
  }
  std::vector<std::size_t> widths(cells[0].size(), 0);
  for (const auto& line : cells) {
    for (std::size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  widths[0] = std::max<std::size_t>(widths[0], 28);  // so that the cases stand below one another
  std::string out;
  for (const auto& line : cells) {
    std::string text;
    for (std::size_t i = 0; i < line.size(); ++i) {
      const bool words = i == 0 || i >= first_words;
      text += words ? fmt::format("{:<{}}  ", line[i], widths[i])
                    : fmt::format("{:>{}}  ", line[i], std::max<std::size_t>(widths[i], 11));
    }
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + '\n';
  }
  return out;
}

std::string json(std::span<const row> rows) {
  std::string out = "[";
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const row& one = rows[i];
    out += fmt::format(
        "{}\n  {{\"case\": {}, \"subject\": {}, \"placement\": {}, \"state\": {}, \"unit\": {}, \"median\": {}, "
        "\"min\": "
        "{}, \"max\": {}, \"p50\": {}, \"p99\": {}, \"p999\": {}, \"memory\": {}, \"line_ns_min\": {}, "
        "\"line_ns_max\": {}}}",
        i == 0 ? "" : ",", quoted(one.kase), quoted(one.subject), quoted(one.placement), quoted(one.state),
        quoted(one.unit), json_number(one.median), json_number(one.min), json_number(one.max), json_number(one.p50),
        json_number(one.p99), json_number(one.p999), one.memory.empty() ? "null" : quoted(one.memory),
        json_number(one.line_min), json_number(one.line_max));
  }
  return out + "\n]\n";
}

std::string where_the_cpus_were(std::span<const row> rows) {
  // What is more than noise. A virtual CPU that its host moved to another die is five times as far away.
  const auto moved = [](double least, double most) { return most > 1.5 * least; };
  double least = std::numeric_limits<double>::infinity();
  double most = 0;
  std::vector<std::string_view> within;
  for (const row& one : rows) {
    if (!one.line_min || !one.line_max) continue;
    least = std::min(least, *one.line_min);
    most = std::max(most, *one.line_max);
    if (moved(*one.line_min, *one.line_max) && (within.empty() || within.back() != one.kase))
      within.push_back(one.kase);
  }
  if (most == 0) return {};
  if (!moved(least, most)) {
    return fmt::format("A bare cache line went to the other CPU and back in {:.0f} to {:.0f} ns.\n\n", least, most);
  }
  std::string out = fmt::format(
      "A bare cache line went to the other CPU and back in {:.0f} ns at one time and {:.0f} ns at another: something\n"
      "else ran here, or the host moved our CPUs. Compare within a case only; better, measure again.\n",
      least, most);
  if (!within.empty()) out += fmt::format("It changed within: {}.\n", fmt::join(within, ", "));
  return out + '\n';
}

std::string promises(std::span<const row> rows) {
  std::string out;
  for (const promise& one : all_promises) {
    const row* theirs = find(rows, one.other_case, one.other);
    if (theirs == nullptr || !theirs->max) continue;
    const auto all = rows_of_strait(rows, one.kase);
    const bool each = one.in_each_memory && all.size() > 1;
    for (const row* ours : all) {
      if (each && ours->memory == "private") continue;  // crosses no processes
      const double a = best_round(*ours);
      const double b = best_round(*theirs);
      const std::string words = each ? fmt::format("{}, {}", one.words, ours->memory) : std::string{one.words};
      out += verdict(words, one.inverted ? b / a : a / b, one.at_least, one.target) + '\n';
      if (!each) break;
    }
  }
  for (const memory_promise& one : all_memory_promises) {
    const auto all = rows_of_strait(rows, one.kase);
    if (all.size() < 2) continue;
    const auto [slowest, fastest] = std::ranges::minmax(all, {}, [](const row* ours) { return best_round(*ours); });
    out += verdict(one.words, best_round(*slowest) / best_round(*fastest), true, one.target) +
           fmt::format(" ({} / {})\n", slowest->memory, fastest->memory);
  }
  for (const row& one : rows) {
    const std::string_view kase = one.kase;
    if (!kase.starts_with("cost/") || one.subject != "strait") continue;
    const row* const ours = &one;
    const std::string label = fmt::format("{}, strait", kase);
    if (!ours->min || !ours->max) {
      out += fmt::format("  {:<49}  {:>7}   exactly  0     missed\n", label, "unknown");
      continue;
    }
    // A round in which somebody took a CPU away is not one in which both were awake; the worst is shown beside it.
    out += fmt::format("  {:<49}  {:>7.0f}   exactly  0     {}", label, *ours->min, *ours->min == 0 ? "met" : "missed");
    out += *ours->max > *ours->min ? fmt::format(" (in the worst round {:.0f})\n", *ours->max) : "\n";
  }
  return out;
}

}  // namespace bench
