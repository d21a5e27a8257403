#pragma once
// One client's TCP connection: requests in, replies out. An ordinary Asio class that knows nothing of channels.

#include <asio.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "event.hpp"
#include "request_queue.hpp"
#include "resp.hpp"

namespace kv {

/// Two coroutines serve a session, one for each direction. Whoever spawns them keeps the session alive meanwhile.
///
/// A client that does not read its replies is not read from any more. That bounds what it can make us hold, and it is
/// all that happens: nobody else waits for it.
class session {
 public:
  session(std::uint64_t id, asio::ip::tcp::socket socket, request_queue& requests);

  std::uint64_t id() const { return id_; }

  /// Passes requests on until the client quits or breaks the protocol. Throws when it hangs up or the connection
  /// fails. In any case `finish` must follow.
  asio::awaitable<void> read_requests();

  /// Sends replies until the session has finished and every request is answered. Throws when the connection fails. In
  /// any case `close` must follow.
  asio::awaitable<void> write_replies();

  /// A reply has arrived. They come in the order of the requests; throws std::runtime_error when this one does not.
  void deliver(std::uint64_t request, std::string_view reply);

  /// Answers every request that waits for its reply with `error`, and finishes.
  void fail(std::string_view error);

  /// Takes no more requests. Those that were taken are still answered.
  void finish();

  /// Hangs up at once.
  void close();

 private:
  static constexpr std::size_t window = 64;               // requests without a reply, each at most store::max_reply
  static constexpr std::size_t max_unsent = 1024 * 1024;  // bytes of replies

  asio::awaitable<void> pass_on(const resp::command& request);
  bool has_room() const { return asked_ - answered_ < window && output_.size() + sending_.size() < max_unsent; }

  const std::uint64_t id_;
  asio::ip::tcp::socket socket_;
  request_queue& requests_;

  std::uint64_t asked_ = 0;     ///< requests passed on
  std::uint64_t answered_ = 0;  ///< replies delivered
  std::string output_;          ///< replies to be sent
  std::string sending_;         ///< replies that are being sent
  std::string last_words_;      ///< to be sent when all that was asked is answered
  bool finished_ = false;
  event output_ready_;  ///< there is output, or the session has finished
  event room_;          ///< `has_room` again, or the session has finished
};

}  // namespace kv
