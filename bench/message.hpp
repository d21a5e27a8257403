// What the ends of every subject exchange, and how the receiving end proves that it came whole, once and in order.
// The work is the same for strait, for the baselines and for the rings: a multiplication's worth of arithmetic a word.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace bench {

/// A message of `Bytes` bytes, all of them derived from its sequence number.
template <std::size_t Bytes>
struct message {
  static_assert(Bytes % 8 == 0 && Bytes > 0);
  std::array<std::uint64_t, Bytes / 8> words;
};
static_assert(sizeof(message<8>) == 8 && sizeof(message<1024>) == 1024);

/// Consecutive first words differ by this odd number, so every word of 64 bits names exactly one sequence number
/// (the golden ratio: neighbours differ in about half of their bits, a torn one shows).
inline constexpr std::uint64_t sequence_step = 0x9E3779B97F4A7C15;
/// Consecutive words of one message differ by this one.
inline constexpr std::uint64_t word_step = 0xD1B54A32D192ED03;

/// A round trip's two directions are told apart by where their sequences begin.
enum class direction : std::uint64_t { there = 0x5851F42D4C957F2D, back = 0x2545F4914F6CDD1D };

/// The first word of message number `sequence`.
constexpr std::uint64_t first_word(direction way, std::uint64_t sequence) noexcept {
  return static_cast<std::uint64_t>(way) + sequence * sequence_step;
}

/// The sequence number that a first word names: `first_word` backwards.
constexpr std::uint64_t sequence_of(direction way, std::uint64_t word) noexcept {
  std::uint64_t inverse = sequence_step;  // Newton's iteration in the ring of 64-bit numbers: 5 steps give 64 bits
  for (int i = 0; i < 5; ++i) inverse *= 2 - sequence_step * inverse;
  return (word - static_cast<std::uint64_t>(way)) * inverse;
}
static_assert(sequence_of(direction::back, first_word(direction::back, 123456789)) == 123456789);

/// A fault that a test plants into the stream of a sending end, to see that the receiving end tells.
enum class plant : std::uint32_t { none, lost, doubled, torn };

/// A message that did not come whole, once and in order; `what()` names expected and found.
struct broken_message : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void report_broken(direction way, std::uint64_t expected_word, const std::uint64_t* found,
                                std::size_t words);

/// The messages that a sending end sends, one after another.
template <class M>
class source {
 public:
  explicit source(direction way = direction::there) noexcept : word_{first_word(way, 0)} {}

  [[nodiscard]] M next() noexcept {
    M made;
    for (std::size_t i = 0; i < made.words.size(); ++i) made.words[i] = word_ + i * word_step_;
    word_ += sequence_step;
    return made;
  }

  /// Spoils what comes next. The state is spoilt rather than a message, so that the measured loops hold no test.
  void spoil(plant fault) noexcept {
    switch (fault) {
      case plant::none:
        break;
      case plant::lost:
        word_ += sequence_step;
        break;
      case plant::doubled:
        word_ -= sequence_step;
        break;
      case plant::torn:
        // A message of one word is torn when some of its bytes are another's.
        if (sizeof(M) == 8) {
          word_ = (word_ & 0xFFFFFFFF) | ((word_ - sequence_step) & 0xFFFFFFFF00000000);
        } else {
          word_step_ += 1;
        }
        break;
    }
  }

 private:
  std::uint64_t word_;
  std::uint64_t word_step_ = word_step;
};

/// What a receiving end holds each message against.
template <class M>
class checker {
 public:
  explicit checker(direction way = direction::there) noexcept : way_{way}, word_{first_word(way, 0)} {}

  void take(const M& found) {
    std::uint64_t wrong = 0;
    for (std::size_t i = 0; i < found.words.size(); ++i) wrong |= found.words[i] ^ (word_ + i * word_step);
    if (wrong != 0) [[unlikely]] {
      const M copy = found;  // whose address may be given away: the message itself then need not be in memory
      report_broken(way_, word_, copy.words.data(), copy.words.size());
    }
    word_ += sequence_step;
  }

 private:
  direction way_;
  std::uint64_t word_;
};

}  // namespace bench
