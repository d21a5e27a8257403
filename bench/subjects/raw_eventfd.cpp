// An eventfd and an epoll a direction, and nothing else: what a wake-up costs here. The message lies in shared memory.
// Edge-triggered and never read, as the leanest event loops do it: one write and one epoll_wait a direction.
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>

#include "../subject.hpp"

namespace bench {
namespace {

struct mailbox {
  alignas(cache_pair) std::atomic<std::uint64_t> there{0};
  alignas(cache_pair) std::atomic<std::uint64_t> back{0};
};

link connect(const job&) {
  descriptor memory = make_memory("strait-demo mailbox", sizeof(mailbox));
  descriptor there{checked(::eventfd(0, EFD_CLOEXEC), "cannot make an eventfd")};
  descriptor back{checked(::eventfd(0, EFD_CLOEXEC), "cannot make an eventfd")};
  link both;
  both.producer.push_back(memory.duplicate());
  both.producer.push_back(back.duplicate());
  both.producer.push_back(there.duplicate());
  both.consumer.push_back(std::move(memory));
  both.consumer.push_back(std::move(there));
  both.consumer.push_back(std::move(back));
  return both;
}

void run(end& self) {
  using M = message<8>;
  const mapping memory{self.fd(0), sizeof(mailbox)};
  auto& box = memory.as<mailbox>();
  std::atomic<std::uint64_t>& out = self.producing() ? box.there : box.back;
  std::atomic<std::uint64_t>& in = self.producing() ? box.back : box.there;
  const int my_bell = self.fd(1);
  const int other_bell = self.fd(2);
  const descriptor poll{checked(::epoll_create1(EPOLL_CLOEXEC), "cannot make an epoll")};
  epoll_event interest{.events = EPOLLIN | EPOLLET, .data = {.fd = my_bell}};
  checked(::epoll_ctl(poll.get(), EPOLL_CTL_ADD, my_bell, &interest), "cannot watch an eventfd");

  const auto send = [&out, other_bell](const M& m) {
    out.store(m.words[0], std::memory_order_release);
    const std::uint64_t one = 1;
    if (::write(other_bell, &one, sizeof one) < 0) {
      throw std::system_error{errno, std::system_category(), "cannot ring the eventfd"};
    }
  };
  const auto receive = [&in, &poll] {
    epoll_event event{};
    while (::epoll_wait(poll.get(), &event, 1, -1) != 1) {
      if (errno != EINTR) throw std::system_error{errno, std::system_category(), "cannot wait for the eventfd"};
    }
    return M{{in.load(std::memory_order_acquire)}};
  };
  self.producing() ? ping<M>(self, send, receive) : pong<M>(self, send, receive);
}

}  // namespace

subject raw_eventfd_subject() {
  return {.name = "raw-eventfd", .run = run, .connect = connect};
}

}  // namespace bench
