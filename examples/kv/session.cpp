#include "session.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

namespace kv {
namespace {

bool is_quit(const resp::command& request) {
  constexpr std::string_view quit = "quit";
  return std::ranges::equal(request[0], quit, [](char c, char lower) { return (c | 0x20) == lower; });
}

}  // namespace

session::session(std::uint64_t id, asio::ip::tcp::socket socket, request_queue& requests)
    : id_(id),
      socket_(std::move(socket)),
      requests_(requests),
      output_ready_(socket_.get_executor()),
      room_(socket_.get_executor()) {}

asio::awaitable<void> session::read_requests() {
  resp::parser parser;
  std::array<char, 16 * 1024> chunk;
  try {
    while (!finished_) {
      const auto length = co_await socket_.async_read_some(asio::buffer(chunk), asio::use_awaitable);
      parser.feed({chunk.data(), length});
      while (auto request = parser.next()) co_await pass_on(*request);
    }
  } catch (const resp::protocol_error& error) {
    // The stream is lost, but not what was asked before: the complaint waits for its turn.
    resp::append_error(last_words_, std::string("ERR ") + error.what());
  }
}

asio::awaitable<void> session::pass_on(const resp::command& request) {
  while (!has_room() && !finished_) co_await room_.wait();
  if (finished_) co_return;
  const address from{.session = id_, .request = asked_++};
  co_await requests_.push(from, resp::encode(request));
  if (is_quit(request)) finish();
}

asio::awaitable<void> session::write_replies() {
  while (socket_.is_open()) {
    const bool all_said = finished_ && answered_ == asked_;
    if (all_said) output_ += std::exchange(last_words_, {});
    if (!output_.empty()) {
      sending_ = std::exchange(output_, {});
      co_await asio::async_write(socket_, asio::buffer(sending_), asio::use_awaitable);
      sending_ = {};
      room_.notify();
    } else if (all_said) {
      co_return;
    } else {
      co_await output_ready_.wait();
    }
  }
}

void session::deliver(std::uint64_t request, std::string_view reply) {
  if (request != answered_ || answered_ == asked_) throw std::runtime_error("the engine answers what nobody asked");
  ++answered_;
  output_ += reply;
  output_ready_.notify();
  room_.notify();
}

void session::fail(std::string_view error) {
  while (answered_ < asked_) deliver(answered_, error);
  finish();
}

void session::finish() {
  finished_ = true;
  output_ready_.notify();
  room_.notify();
}

void session::close() {
  std::error_code ignored;  // it may be closed already
  socket_.close(ignored);
  finish();
}

}  // namespace kv
