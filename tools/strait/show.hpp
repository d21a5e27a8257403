#pragma once
/// How channels are shown: for people and for programs. Names and types come from strangers, so no byte of them reaches
/// a terminal or a JSON document unexamined.
#include <string>
#include <string_view>
#include <vector>

import strait.endpoint;

namespace tool {

/// What happened to a channel between two looks, for each second.
struct rates {
  double sent = 0;
  double taken = 0;
  double parks = 0;
  double wakes = 0;
};

/// The rates between two looks at the same channel, `seconds` apart; none where the segment was replaced in between.
[[nodiscard]] rates between(const strait::channel_state& before, const strait::channel_state& after, double seconds);

/// The text with everything escaped that is not a visible character: control characters, bytes that are not UTF-8, and
/// characters that turn the direction of writing or cannot be seen.
[[nodiscard]] std::string safe(std::string_view text);

/// The text as a JSON string. Bytes that are not UTF-8 become U+FFFD.
[[nodiscard]] std::string json_string(std::string_view text);

/// An array of channels; with `each`, which is as long, their rates, too.
[[nodiscard]] std::string json(const std::vector<strait::channel_state>& channels,
                               const std::vector<rates>* each = nullptr);

/// Whether capacity, depth, type and ends are known.
[[nodiscard]] bool is_known(const strait::channel_state& channel);

/// One line a channel, in columns, beneath a line of titles.
[[nodiscard]] std::string list(const std::vector<strait::channel_state>& channels);

/// One line a thing that is known of the channel.
[[nodiscard]] std::string statistics(const strait::channel_state& channel);

/// One line a channel with its rates, beneath a line of titles. `channels` and `each` are equally long.
[[nodiscard]] std::string rates_table(const std::vector<strait::channel_state>& channels,
                                      const std::vector<rates>& each);

}  // namespace tool
