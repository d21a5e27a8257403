// strait itself, as a user writes it: coroutines on a runtime of one worker, pinned where every other subject's end is.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include <fmt/format.h>

#include "../conductor.hpp"
#include "../subject.hpp"
#include "strait.hpp"

import strait;

/// What a channel of these messages is called across processes; the size tells the three apart.
template <std::size_t Bytes>
struct strait::message_traits<bench::message<Bytes>> {
  static constexpr std::string_view name = "strait-demo message";
  static constexpr std::uint32_t version = static_cast<std::uint32_t>(Bytes);
};

namespace bench {
namespace {

std::string bare_name(std::uint64_t nonce, std::string_view way) {
  return fmt::format("strait-demo.{:016x}.{}", nonce, way);
}

std::string channel_name(memory where, std::uint64_t nonce, std::string_view way) {
  const std::string bare = bare_name(nonce, way);
  if (where == memory::file) return "file:" + (std::filesystem::temp_directory_path() / bare).string();
  return (where == memory::system_v ? "sysv:" : "posix:") + bare;
}

/// The stream ended although nobody was asked to end it.
[[noreturn]] void report_end() {
  throw std::runtime_error{"expected a message, found that the other end has closed"};
}

template <class M>
strait::task<> send_each(end& self, strait::sender<M> tx) {
  source<M> out;
  while (const auto round = self.next_round()) {
    out.spoil(self.fault());
    for (std::uint64_t i = 0; i < round.warm_up; ++i) co_await tx.send(out.next());
    self.begin();
    for (std::uint64_t i = 0; i < round.messages; ++i) co_await tx.send(out.next());
    self.done();
  }
}

template <class M>
strait::task<> receive_each(end& self, strait::receiver<M> rx) {
  checker<M> in;
  while (const auto round = self.next_round()) {
    for (std::uint64_t i = 0; i < round.warm_up; ++i) {
      const auto message = co_await rx.recv();
      if (!message) report_end();
      in.take(*message);
    }
    self.begin();
    for (std::uint64_t i = 0; i < round.messages; ++i) {
      const auto message = co_await rx.recv();
      if (!message) report_end();
      in.take(*message);
    }
    self.done();
  }
}

/// In place and without a copy, as the rings do it: reserve, fill, commit; peek, check, release.
template <class M>
strait::task<> send_batches(end& self, strait::sender<M> tx) {
  source<M> out;
  while (const auto round = self.next_round()) {
    out.spoil(self.fault());
    self.begin();
    for (std::uint64_t sent = 0; sent < round.messages;) {
      auto permit = co_await tx.reserve(std::min<std::uint64_t>(batch_messages, round.messages - sent));
      const std::span<M> room = permit.messages();
      for (M& each : room) each = out.next();
      sent += room.size();
      permit.commit();
    }
    self.done();
  }
}

template <class M>
strait::task<> receive_batches(end& self, strait::receiver<M> rx) {
  checker<M> in;
  while (const auto round = self.next_round()) {
    self.begin();
    for (std::uint64_t got = 0; got < round.messages;) {
      const std::span<const M> there = co_await rx.peek();
      if (there.empty()) report_end();
      const std::size_t run = std::min<std::size_t>(there.size(), round.messages - got);
      for (const M& each : there.first(run)) in.take(each);
      rx.release(run);
      got += run;
    }
    self.done();
  }
}

/// As `ping` in subject.hpp, with `co_await` where that calls.
template <class M>
strait::task<> send_pings(end& self, strait::sender<M> tx, strait::receiver<M> rx) {
  source<M> out{direction::there};
  checker<M> in{direction::back};
  while (const auto round = self.next_round()) {
    out.spoil(self.fault());
    self.begin();
    for (std::uint64_t i = 0; i < round.messages; ++i) {
      co_await tx.send(out.next());
      const auto answer = co_await rx.recv();
      if (!answer) report_end();
      in.take(*answer);
    }
    self.done();
    const bool parked = self.kind() == work::parked;
    std::uint64_t before = self.ticks();
    for (std::uint64_t i = 0; i < round.stamped; ++i) {
      if (parked) {
        self.pause_before_ping();
        before = self.ticks();
      }
      co_await tx.send(out.next());
      const auto answer = co_await rx.recv();
      if (!answer) report_end();
      in.take(*answer);
      const std::uint64_t after = self.ticks();
      self.sample(after - before);
      before = after;
    }
  }
}

template <class M>
strait::task<> answer_pings(end& self, strait::receiver<M> rx, strait::sender<M> tx) {
  checker<M> in{direction::there};
  source<M> out{direction::back};
  while (const auto round = self.next_round()) {
    self.begin();
    for (std::uint64_t i = 0; i < round.messages + round.stamped; ++i) {
      const auto message = co_await rx.recv();
      if (!message) report_end();
      in.take(*message);
      co_await tx.send(out.next());
    }
    self.done();
  }
}

/// Ends the process with the message where the conductor finds it: there is no one else to tell.
strait::task<> guarded(end& self, strait::task<> work) {
  try {
    co_await std::move(work);
  } catch (const std::exception& problem) {
    self.complain(problem.what());
    ::_exit(1);
  }
}

strait::channel_options options_for(const end& self) {
  strait::channel_options options{.capacity = capacity_for(self.message_bytes())};
  if (self.kind() == work::parked) options.wait = strait::wait_policy::park;
  return options;
}

bool pings(const end& self) {
  return self.kind() == work::spin || self.kind() == work::parked;
}

/// `back` has no end unless there are answers.
template <class M>
strait::task<> producers_work(end& self, strait::sender<M> there, strait::receiver<M> back) {
  if (pings(self)) return send_pings<M>(self, std::move(there), std::move(back));
  return self.kind() == work::batch ? send_batches<M>(self, std::move(there)) : send_each<M>(self, std::move(there));
}

template <class M>
strait::task<> consumers_work(end& self, strait::receiver<M> there, strait::sender<M> back) {
  if (pings(self)) return answer_pings<M>(self, std::move(there), std::move(back));
  return self.kind() == work::batch ? receive_batches<M>(self, std::move(there))
                                    : receive_each<M>(self, std::move(there));
}

/// Both lanes of a pair: the consumer listens, and the producer waits until it does. An abstract name, which nobody has to
/// remove.
template <class M>
strait::task<> work_over_a_socket(end& self) {
  const std::string name = "unix:@" + bare_name(self.nonce(), "door");
  const strait::channel_options options = options_for(self);
  if (!self.producing()) {
    // As patient as the conductor: on a machine with other work the client may be slow, but it is ours.
    strait::listener<M, M> door{name, {.lanes = options, .handshake = conductor::patience}};
    auto peer = door.blocking_accept();
    return consumers_work<M>(self, std::move(peer.in), std::move(peer.out));
  }
  for (;;) {
    std::error_code error;
    auto link = strait::blocking_connect<M, M>(name, error, {.lanes = options});
    if (!error) return producers_work<M>(self, std::move(link.out), std::move(link.in));
    if (error != std::errc::connection_refused) throw std::system_error{error, name};
    std::this_thread::sleep_for(std::chrono::milliseconds{1});
  }
}

template <class M>
strait::task<> work_of(end& self) {
  if (self.memory() == memory::handed_over) return work_over_a_socket<M>(self);
  const strait::channel_options options = options_for(self);
  const std::string there = channel_name(self.memory(), self.nonce(), "there");
  const std::string back = channel_name(self.memory(), self.nonce(), "back");
  if (self.producing()) {
    auto tx = strait::open_sender<M>(there, options);
    return producers_work<M>(self, std::move(tx),
                             pings(self) ? strait::open_receiver<M>(back, options) : strait::receiver<M>{});
  }
  auto rx = strait::open_receiver<M>(there, options);
  return consumers_work<M>(self, std::move(rx),
                           pings(self) ? strait::open_sender<M>(back, options) : strait::sender<M>{});
}

/// Both ends, each on a worker that is pinned where its process would be.
void run_in_one_process(end& producer) {
  end consumer = producer.other();
  strait::runtime near{{.cpus = std::vector<unsigned>{producer.cpu()}}};
  strait::runtime far{{.cpus = std::vector<unsigned>{consumer.cpu()}}};
  with_message(producer.message_bytes(), [&]<class M>() {
    const strait::channel_options options = options_for(producer);
    auto [tx, rx] = strait::make_channel<M>(options);
    auto [back_tx, back_rx] = strait::make_channel<M>(options);
    near.spawn(guarded(producer, producers_work<M>(producer, std::move(tx), std::move(back_rx))));
    far.spawn(guarded(consumer, consumers_work<M>(consumer, std::move(rx), std::move(back_tx))));
  });
  near.join();
  far.join();
}

void run(end& self) {
  switch (self.kind()) {
    case work::task_ready:
    case work::task_switch:
    case work::task_spawn:
      return run_strait_task(self);
    case work::asio_ready:
    case work::timer:
    case work::socket:
      return run_strait_asio(self);
    default:
      break;
  }
  if (self.memory() == memory::private_memory) return run_in_one_process(self);
  // The process itself stays free to use every CPU and its one worker is pinned, as strait does it for its users.
  strait::runtime runtime{{.cpus = std::vector<unsigned>{self.cpu()}}};
  with_message(self.message_bytes(), [&]<class M>() { runtime.spawn(guarded(self, work_of<M>(self))); });
  runtime.join();
}

/// Once the ends are gone: while they run, `strait ls` shows their channels.
void forget_names(memory where, std::uint64_t nonce) {
  if (where == memory::private_memory || where == memory::handed_over) return;  // they have none
  for (const std::string_view way : {"there", "back"}) {
    try {
      strait::remove_channel(channel_name(where, nonce, way));
    } catch (const std::system_error& error) {
      if (error.code() != std::errc::no_such_file_or_directory) fmt::print(stderr, "strait-demo: {}\n", error.what());
    }
  }
}

}  // namespace

subject strait_subject() {
  return {.name = "strait",
          .run = run,
          .forget_names = forget_names,
          .is_ring = true,
          .in_any_memory = true,
          .pins_itself = true};
}

}  // namespace bench
