// Two processes that bounce one cache line and do nothing else: what the machine allows. The word in it is the message.
#include <atomic>

#include "../subject.hpp"

namespace bench {
namespace {

struct line_memory {
  alignas(cache_pair) std::atomic<std::uint64_t> word{0};
};

template <unsigned Pauses>
void run_line(end& self) {
  using M = message<8>;
  const mapping memory{self.fd(0), sizeof(line_memory)};
  std::atomic<std::uint64_t>& word = memory.as<line_memory>().word;
  const bool one_cpu = self.one_cpu();
  // Each end sees by the change that the other has written. The two sequences never meet: they begin far apart.
  std::uint64_t mine = 0;
  const auto send = [&word, &mine](const M& m) {
    mine = m.words[0];
    word.store(mine, std::memory_order_release);
  };
  const auto receive = [&word, &mine, one_cpu] {
    std::uint64_t now;
    while ((now = word.load(std::memory_order_acquire)) == mine) {
      if (one_cpu || Pauses > 0) relax(one_cpu);
    }
    return M{{now}};
  };
  self.producing() ? ping<M>(self, send, receive) : pong<M>(self, send, receive);
}

link connect(const job&) {
  link both;
  both.producer.push_back(make_memory("strait-demo line", sizeof(line_memory)));
  both.consumer.push_back(both.producer.front().duplicate());
  return both;
}

void run(end& self) {
  self.variant() == 0 ? run_line<0>(self) : run_line<1>(self);
}

}  // namespace

subject raw_line_subject() {
  return {.name = "raw-line", .run = run, .connect = connect, .variants = {"no PAUSE", "1 PAUSE"}};
}

}  // namespace bench
