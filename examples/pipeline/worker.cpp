// A worker: takes blocks from one channel and puts compressed members into another. It knows no files.

#include <asio.hpp>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <stdexcept>
#include <string>

#include <zlib.h>

#include <strait/asio.hpp>

#include "blocks.hpp"

import strait;

namespace pipeline {
namespace {

/// zlib's state, made once: its tables are larger than a block.
class compressor {
 public:
  compressor() {
    const int gzip = 15 + 16;  // the largest window, and a gzip header and trailer around it
    if (::deflateInit2(&stream_, Z_DEFAULT_COMPRESSION, Z_DEFLATED, gzip, 8, Z_DEFAULT_STRATEGY) != Z_OK) {
      throw std::runtime_error("zlib does not start");
    }
  }
  compressor(const compressor&) = delete;
  compressor& operator=(const compressor&) = delete;
  ~compressor() { ::deflateEnd(&stream_); }

  /// From one channel's memory into the other's.
  void compress(const block& from, member& into) {
    ::deflateReset(&stream_);
    stream_.next_in = const_cast<unsigned char*>(from.bytes.data());  // zlib only reads it
    // Another process wrote the length: it is not believed.
    stream_.avail_in = std::min(from.length, static_cast<std::uint32_t>(block::room));
    stream_.next_out = into.bytes.data();
    stream_.avail_out = static_cast<unsigned>(member::room);
    if (::deflate(&stream_, Z_FINISH) != Z_STREAM_END) throw std::runtime_error("zlib does not compress a block");
    into.number = from.number;
    into.last = from.last;
    into.length = static_cast<std::uint32_t>(member::room) - stream_.avail_out;
  }

 private:
  z_stream stream_{};
};

/// Ends when the reader has closed its end; throws when it died.
///
/// The block is released when its member is sent, not before. If this process is killed in between, the process that
/// takes its place finds the block still there.
strait::task<> serve(strait::receiver<block>& blocks, strait::sender<member>& members) {
  compressor zlib;
  for (;;) {
    const auto next = co_await blocks.peek();
    if (next.empty()) co_return;
    auto place = co_await members.reserve(1);
    zlib.compress(next[0], place.messages()[0]);
    place.commit();
    blocks.release(1);
  }
}

}  // namespace

int run_worker(const std::string& run, unsigned worker) {
  // A terminal signals all processes. The reader is the one to act on it.
  std::signal(SIGINT, SIG_IGN);
  std::signal(SIGTERM, SIG_IGN);
  auto blocks = strait::open_receiver<block>(blocks_to(run, worker), {.open = strait::open_mode::open});
  auto members = strait::open_sender<member>(members_from(run, worker), {.open = strait::open_mode::open});
  asio::io_context context{1};
  strait::spawn(context, serve(blocks, members));
  context.run();
  return 0;
}

}  // namespace pipeline
