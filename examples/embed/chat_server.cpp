// chat_server: the application that is there already. Nothing but Asio: one thread, a coroutine or two for each client.
// A client's first line is its name; every other line is told to all. chat_server_moderated.cpp is this file with a
// moderator.

#include <asio.hpp>

#include <charconv>
#include <csignal>
#include <cstdio>
#include <deque>
#include <exception>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

namespace {

using asio::awaitable;
using asio::use_awaitable;
using asio::ip::tcp;

constexpr std::size_t longest_input = 200;
constexpr std::size_t most_unread = 1000;

/// One client: what it has yet to be told, and the coroutine that tells it.
class member {
 public:
  explicit member(tcp::socket socket)
      : socket_(std::move(socket)), news_(socket_.get_executor(), asio::steady_timer::time_point::max()) {}

  /// Without the end of the line. Throws when the client hung up or says too much at once.
  awaitable<std::string> read_line() {
    const auto length =
        co_await asio::async_read_until(socket_, asio::dynamic_buffer(input_, longest_input), '\n', use_awaitable);
    std::string line = input_.substr(0, length - 1);
    input_.erase(0, length);
    if (line.ends_with('\r')) line.pop_back();
    co_return line;
  }

  awaitable<void> write_lines() {
    while (socket_.is_open()) {
      if (unread_.empty()) {
        std::error_code woken;  // the timer never expires: it is cancelled
        co_await news_.async_wait(asio::redirect_error(use_awaitable, woken));
      } else {
        co_await asio::async_write(socket_, asio::buffer(unread_.front()), use_awaitable);
        unread_.pop_front();
      }
    }
  }

  void tell(std::string line) {
    if (unread_.size() == most_unread) return hang_up();  // it does not read
    unread_.push_back(std::move(line));
    news_.cancel();
  }

  void hang_up() {
    std::error_code ignored;  // it may be closed already
    socket_.close(ignored);
    news_.cancel();
  }

 private:
  tcp::socket socket_;
  asio::steady_timer news_;
  std::string input_;
  std::deque<std::string> unread_;
};

/// Everybody who is there.
class room {
 public:
  void enter(std::shared_ptr<member> who) { members_.insert(std::move(who)); }
  void leave(const std::shared_ptr<member>& who) { members_.erase(who); }
  void tell(std::string_view line) {
    for (const auto& who : members_) who->tell(std::string{line} + '\n');
  }

 private:
  std::set<std::shared_ptr<member>> members_;
};

awaitable<void> write_to(std::shared_ptr<member> who) {
  try {
    co_await who->write_lines();
  } catch (const std::system_error&) {
    who->hang_up();  // which ends what reads from it
  }
}

awaitable<void> serve(std::shared_ptr<member> who, room& everybody) {
  try {
    const std::string name = co_await who->read_line();
    everybody.enter(who);
    for (;;) {
      const std::string text = name + ": " + co_await who->read_line();
      everybody.tell(text);
    }
  } catch (const std::system_error&) {
    everybody.leave(who);
    who->hang_up();
  }
}

awaitable<void> accept_members(tcp::acceptor& acceptor, room& everybody) {
  for (;;) {
    auto who = std::make_shared<member>(co_await acceptor.async_accept(use_awaitable));
    asio::co_spawn(acceptor.get_executor(), write_to(who), asio::detached);
    asio::co_spawn(acceptor.get_executor(), serve(who, everybody), asio::detached);
  }
}

/// For coroutines without which the server is of no use: what ends them ends the server.
void rethrow(std::exception_ptr error) {
  if (error) std::rethrow_exception(error);
}

void run(unsigned short port) {
  room everybody;
  asio::io_context context{1};
  tcp::acceptor acceptor{context, tcp::endpoint{asio::ip::address_v4::loopback(), port}};
  const int bound = acceptor.local_endpoint().port();
  asio::signal_set signals{context, SIGINT, SIGTERM};
  signals.async_wait([&](std::error_code, int) { context.stop(); });
  asio::co_spawn(context, accept_members(acceptor, everybody), rethrow);
  std::printf("listening on 127.0.0.1:%d\n", bound);
  std::fflush(stdout);
  context.run();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view argument = argc == 2 ? argv[1] : "";
  const char* const end = argument.data() + argument.size();
  unsigned short port = 0;
  if (argument.empty() || std::from_chars(argument.data(), end, port).ptr != end) {
    std::fprintf(stderr, "usage: %s PORT    (0: a free one)\n", argv[0]);
    return 2;
  }
  try {
    run(port);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
}
