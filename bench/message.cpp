#include "message.hpp"

#include <fmt/format.h>

namespace bench {

void report_broken(direction way, std::uint64_t expected_word, const std::uint64_t* found, std::size_t words) {
  const std::uint64_t expected = sequence_of(way, expected_word);
  const std::uint64_t sequence = sequence_of(way, found[0]);
  std::string verdict;
  for (std::size_t i = 1; i < words && verdict.empty(); ++i) {
    if (found[i] != found[0] + i * word_step) {
      verdict = fmt::format("torn: word {} of {} is {:#018x}, message {} has {:#018x} there", i, words, found[i],
                            sequence, found[0] + i * word_step);
    }
  }
  const std::uint64_t ahead = sequence - expected;
  const std::uint64_t behind = expected - sequence;
  // No lane is deeper than this; a number further away is no number but a torn word.
  constexpr std::uint64_t plausible = std::uint64_t{1} << 32;
  if (!verdict.empty()) {
    // said above
  } else if (ahead > 0 && ahead < plausible) {
    verdict = fmt::format("message {}, so {} lost or overtaken", sequence, ahead);
  } else if (behind > 0 && behind < plausible) {
    verdict = fmt::format("message {} again, so it is doubled or late", sequence);
  } else {
    verdict = "torn: no message of this stream has this content";
  }
  throw broken_message{
      fmt::format("expected message {} ({:#018x}), found {:#018x} ({})", expected, expected_word, found[0], verdict)};
}

}  // namespace bench
