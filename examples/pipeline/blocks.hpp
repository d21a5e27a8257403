#pragma once
// What the reader of the file and its workers have in common: the messages and the names of the channels. Imports, so
// it comes last.

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

import strait;

namespace pipeline {

/// A piece of the file. Messages of this size are not built and copied: the reader reads the file into the channel's
/// memory, and the worker compresses it from there.
struct block {
  static constexpr std::size_t room = 128 * 1024;

  std::uint64_t number;
  std::uint32_t length;
  std::uint32_t last;  ///< 1: the file ends here
  std::array<unsigned char, room> bytes;
};

/// The same, compressed: one whole gzip member. Concatenated members are a gzip file (RFC 1952, 2.2).
struct member {
  /// Deflate stores what it cannot compress, at 5 bytes for each 16 KiB or less and 18 around it all; this is far more.
  static constexpr std::size_t room = block::room + block::room / 64;

  std::uint64_t number;
  std::uint32_t length;
  std::uint32_t last;
  std::array<unsigned char, room> bytes;
};

/// Small, because each message is large: a block under way, one that waits, and room to read ahead.
inline constexpr std::size_t capacity = 4;

/// `run` is one run of the program, `worker` one place in it, whichever process holds it.
inline std::string blocks_to(const std::string& run, unsigned worker) {
  return "posix:strait-pipeline." + run + "." + std::to_string(worker) + ".blocks";
}
inline std::string members_from(const std::string& run, unsigned worker) {
  return "posix:strait-pipeline." + run + "." + std::to_string(worker) + ".members";
}

/// Compresses what comes in the channels of one place until the reader closes them or dies. Returns the exit status.
int run_worker(const std::string& run, unsigned worker);

}  // namespace pipeline

/// Compared when an end enters. Whoever changes the fields counts the version up.
template <>
struct strait::message_traits<pipeline::block> {
  static constexpr std::string_view name = "strait.pipeline.block";
  static constexpr std::uint32_t version = 1;
};
template <>
struct strait::message_traits<pipeline::member> {
  static constexpr std::string_view name = "strait.pipeline.member";
  static constexpr std::uint32_t version = 1;
};
