// The gateway: an ordinary Asio application on its own io_context, and one thread. Clients come in over TCP; what they
// ask crosses to the engine in one channel and comes back in another. Both are awaited like any socket.

#include <fmt/format.h>
#include <asio.hpp>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <utility>
#include <vector>

#include <unistd.h>

#include "child.hpp"
#include "message.hpp"
#include "request_queue.hpp"
#include "roles.hpp"
#include "session.hpp"

// These import strait, and imports come after all other includes.
#include <strait/asio.hpp>

#include "channels.hpp"

namespace kv {
namespace {

using asio::ip::tcp;
using namespace std::chrono_literals;

class gateway {
 public:
  gateway(asio::io_context& context, asio::signal_set& signals, tcp::acceptor acceptor, strait::sender<slot> requests,
          strait::receiver<slot> replies)
      : context_(context),
        signals_(signals),
        acceptor_(std::move(acceptor)),
        requests_(std::move(requests)),
        replies_(std::move(replies)),
        queue_(context.get_executor()),
        patience_(context) {}

  /// Serves clients as soon as `engine`, the process at the other end of the channels, is ready.
  void start(const child& engine) { spawn(run(engine)); }

  /// After the io_context has run out of work: whether that was because somebody asked us to stop.
  bool was_asked_to_stop() const { return stopping_; }

 private:
  asio::awaitable<void> run(const child& engine);
  asio::awaitable<void> wait_for_signal();
  asio::awaitable<void> accept_clients();
  asio::awaitable<void> send_requests();
  asio::awaitable<void> receive_replies();
  asio::awaitable<void> hang_up_on_the_slow();

  void open_session(tcp::socket socket);
  void deliver(const message& reply);
  void close_session(session& ended);
  void stop();
  void engine_is_gone(std::string_view how);

  void spawn(asio::awaitable<void> coroutine) { asio::co_spawn(context_, std::move(coroutine), asio::detached); }

  asio::io_context& context_;
  asio::signal_set& signals_;
  tcp::acceptor acceptor_;
  strait::sender<slot> requests_;   // belongs to send_requests, as one coroutine at a time may use a handle
  strait::receiver<slot> replies_;  // belongs to receive_replies
  request_queue queue_;             // from all sessions to send_requests
  std::unordered_map<std::uint64_t, std::shared_ptr<session>> sessions_;
  std::uint64_t last_session_ = 0;
  asio::steady_timer patience_;
  bool stopping_ = false;
  bool engine_died_ = false;
};

/// Throws when the engine ends before it has said that it is ready.
asio::awaitable<void> wait_until_ready(const child& engine) {
  // A descriptor of its own, because Asio closes what it was given, and `engine` will, too.
  asio::posix::stream_descriptor output(co_await asio::this_coro::executor, ::dup(engine.output()));
  char first = 0;
  co_await output.async_read_some(asio::buffer(&first, 1), asio::use_awaitable);
}

asio::awaitable<void> gateway::run(const child& engine) {
  spawn(wait_for_signal());
  try {
    co_await wait_until_ready(engine);
  } catch (const std::exception&) {
    engine_is_gone("it did not start");
    signals_.cancel();
    co_return;
  }
  if (!stopping_) {
    fmt::print("kv-server: listening on 127.0.0.1:{}, engine is process {}\n", acceptor_.local_endpoint().port(),
               engine.id());
    std::fflush(stdout);
  }
  spawn(send_requests());
  spawn(receive_replies());
  spawn(accept_clients());
}

asio::awaitable<void> gateway::wait_for_signal() {
  std::error_code cancelled;
  co_await signals_.async_wait(asio::redirect_error(asio::use_awaitable, cancelled));
  signals_.clear();  // whoever is in a hurry and signals again gets the default action
  if (!cancelled) stop();
}

asio::awaitable<void> gateway::accept_clients() {
  asio::steady_timer pause(context_);
  for (;;) {
    std::error_code error;
    auto socket = co_await acceptor_.async_accept(asio::redirect_error(asio::use_awaitable, error));
    if (!acceptor_.is_open()) co_return;  // a client that came at this very moment is too late, too
    if (!error) {
      open_session(std::move(socket));
    } else {
      // Most likely all file descriptors are taken. That passes, and until then there is no point in spinning.
      pause.expires_after(100ms);
      co_await pause.async_wait(asio::use_awaitable);
    }
  }
}

void gateway::open_session(tcp::socket socket) {
  std::error_code ignored;  // a client that is gone already is noticed by the first read
  socket.set_option(tcp::no_delay(true), ignored);
  const auto client = std::make_shared<session>(++last_session_, std::move(socket), queue_);
  sessions_.emplace(client->id(), client);
  asio::co_spawn(context_, client->read_requests(), [client](std::exception_ptr) { client->finish(); });
  asio::co_spawn(context_, client->write_replies(), [this, client](std::exception_ptr) { close_session(*client); });
}

void gateway::close_session(session& ended) {
  ended.close();
  sessions_.erase(ended.id());
  if (sessions_.empty()) patience_.cancel();
}

/// Requests to the engine: the only coroutine that sends.
asio::awaitable<void> gateway::send_requests() {
  std::vector<slot> batch;
  try {
    while (co_await queue_.pop_all(batch)) co_await requests_.send_many(batch);
    // Which the engine takes for the end. After its death there is nobody to tell, and run_gateway says why our ends
    // stay open until the kernel has cleared the engine away.
    if (!engine_died_) requests_.close();
  } catch (const std::exception&) {
    // The engine is gone. receive_replies is told the same, after the last reply, and takes care of it.
  }
}

/// Replies from the engine: the only coroutine that receives. It waits for no client, so that the engine never waits
/// long for room, and so both channels can never be full for good.
asio::awaitable<void> gateway::receive_replies() {
  std::string how = "it closed its end";
  try {
    assembler incoming;
    while (auto slot = co_await replies_.recv()) {
      if (const auto reply = incoming.add(*slot)) deliver(*reply);
    }
  } catch (const std::system_error& error) {
    engine_died_ = error.code() == strait::errc::peer_died;
    how = error.what();
  } catch (const std::exception& error) {
    how = error.what();
  }
  if (!engine_died_) replies_.close();  // otherwise as in send_requests
  if (!stopping_) engine_is_gone(how);
  signals_.cancel();
}

void gateway::deliver(const message& reply) {
  const auto client = sessions_.find(reply.to.session);
  if (client == sessions_.end()) return;  // hung up before its reply was there
  client->second->deliver(reply.to.request, reply.bytes);
}

void gateway::stop() {
  stopping_ = true;
  acceptor_.close();
  for (const auto& [id, client] : sessions_) client->close();
  queue_.close();  // send_requests closes the channel, the engine ends, and with that receive_replies
}

void gateway::engine_is_gone(std::string_view how) {
  fmt::print(stderr, "kv-server: the engine is gone: {}\n", how);
  acceptor_.close();
  queue_.close();
  for (const auto& [id, client] : sessions_) client->fail("-ERR engine is gone\r\n");
  if (!sessions_.empty()) spawn(hang_up_on_the_slow());
}

asio::awaitable<void> gateway::hang_up_on_the_slow() {
  std::error_code all_gone;
  patience_.expires_after(1s);
  co_await patience_.async_wait(asio::redirect_error(asio::use_awaitable, all_gone));
  for (const auto& [id, client] : sessions_) client->close();
}

tcp::acceptor listen_on(asio::io_context& context, std::uint16_t port) {
  try {
    return tcp::acceptor(context, tcp::endpoint(asio::ip::address_v4::loopback(), port));
  } catch (const std::system_error& error) {
    throw std::system_error(error.code(), fmt::format("cannot listen on 127.0.0.1:{}", port));
  }
}

/// Names the channels of this run. What a killed pair may have left under the same port is not picked up again: its
/// requests were made to data that no longer exist.
std::string name_pair(const tcp::acceptor& acceptor) {
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  return fmt::format("{}.{:x}", acceptor.local_endpoint().port(), now);
}

}  // namespace

int run_gateway(std::uint16_t port) {
  asio::io_context context(1);
  asio::signal_set signals(context, SIGINT, SIGTERM);
  auto acceptor = listen_on(context, port);
  const auto pair = name_pair(acceptor);

  const strait::channel_options options{.capacity = 4096, .open = strait::open_mode::create};
  auto requests = strait::open_sender<slot>(requests_of(pair), options);
  auto replies = strait::open_receiver<slot>(replies_of(pair), options);
  child engine({this_program(), "--engine", pair});

  gateway server(context, signals, std::move(acceptor), std::move(requests), std::move(replies));
  server.start(engine);
  context.run();

  // The engine has ended or is about to. Wait for it before our ends are destroyed: whoever leaves a channel last
  // removes it, and a process that was killed still holds its ends until the kernel has cleared it away.
  const int status = engine.wait();
  const bool asked_to_stop = server.was_asked_to_stop();
  if (status != 0) fmt::print(stderr, "kv-server: the engine ended with status {}\n", status);
  return asked_to_stop && status == 0 ? 0 : 1;
}

}  // namespace kv
