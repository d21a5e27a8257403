/// One end of a channel, for tests/strait_tool.sh to look at: says `in` when it has entered, and then sends or receives
/// a message about every millisecond until it is killed. usage: test-tool-peer sender|receiver|listener|client NAME
#include <sys/prctl.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <string_view>
#include <thread>

import strait;

struct Reading {
  std::uint64_t number;
  std::uint64_t padding[2];
};

template <>
struct strait::message_traits<Reading> {
  static constexpr std::string_view name = "Reading";
  static constexpr std::uint32_t version = 2;
};

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // a test that was interrupted leaves nobody behind
  const auto say_in = [] {
    std::puts("in");
    std::fflush(stdout);
  };
  if (std::string_view{argv[1]} == "sender") {
    auto tx = strait::open_sender<Reading>(argv[2], {.capacity = 64});
    say_in();
    for (std::uint64_t i = 0;; ++i) {
      tx.blocking_send({.number = i, .padding = {}});
      std::this_thread::sleep_for(std::chrono::milliseconds{1});  // the rate, nothing else
    }
  }
  if (std::string_view{argv[1]} == "listener") {
    strait::listener<Reading, Reading> door{argv[2]};
    say_in();
    auto peer = door.blocking_accept();
    while (peer.blocking_recv()) {
    }
    return 0;
  }
  if (std::string_view{argv[1]} == "client") {
    auto link = strait::blocking_connect<Reading, Reading>(argv[2]);
    say_in();
    while (link.blocking_recv()) {
    }
    return 0;
  }
  auto rx = strait::open_receiver<Reading>(argv[2], {.capacity = 64});
  say_in();
  while (rx.blocking_recv()) {
  }
}
