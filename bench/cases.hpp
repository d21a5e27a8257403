// What is measured, and the rounds in which it is.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "conductor.hpp"
#include "measure.hpp"
#include "subject.hpp"

namespace bench {

struct bench_case {
  std::string_view name;
  job task;
  std::string_view unit;
  /// Whether more is better.
  bool rate;
  std::vector<std::string_view> subjects;
};

[[nodiscard]] std::span<const bench_case> cases();

struct plan {
  unsigned rounds = 9;
  bool quick = false;
  plant fault = plant::none;
  /// Where strait's channels lie. Several are compared, in the same rounds, with messages of 8 bytes; elsewhere the first
  /// of them counts.
  std::vector<bench::memory> memories{bench::memory::posix};
  /// Only subjects whose names begin with one of these; all when there are none.
  std::vector<std::string> subject_prefixes;
  [[nodiscard]] bool wants(std::string_view subject) const {
    return subject_prefixes.empty() ||
           std::any_of(subject_prefixes.begin(), subject_prefixes.end(),
                       [&](const std::string& prefix) { return subject.starts_with(prefix); });
  }
};

/// How long a bare cache line takes to the other end and back. A virtual machine says "same L3" of CPUs that its host
/// moves about; this tells where they are. Two processes for as long as it lives, asleep between two looks.
class line_probe {
 public:
  explicit line_probe(conductor& by);
  /// In ns: the best of a few short rounds. Takes some ms. Nothing where there is only one CPU.
  [[nodiscard]] std::optional<double> look();

 private:
  std::optional<pair> ends_;
};

/// Told before each round: which round (0 while the sizes of the rounds are found), of which subject.
using progress = std::function<void(unsigned round, std::string_view subject)>;

/// Runs all subjects of a case in interleaved rounds: each subject once, then each once again. A noisy neighbour so
/// hits all alike. `line` looks before each round and after the last. Throws on a broken message, a dead or hung end, or an
/// interruption.
[[nodiscard]] std::vector<row> run_case(conductor& by, line_probe& line, const bench_case& what, const plan& how,
                                        const progress& tell);

}  // namespace bench
