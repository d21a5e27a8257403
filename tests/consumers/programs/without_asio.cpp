// A program that knows nothing of Asio: tasks on the runtime.
#include <cstdint>
#include <cstdio>
#include <utility>

import strait;

namespace {

strait::task<> produce(strait::sender<std::uint64_t> numbers, std::uint64_t count) {
  for (std::uint64_t i = 0; i < count; ++i) co_await numbers.send(i);
}

strait::task<> consume(strait::receiver<std::uint64_t> numbers, std::uint64_t& sum) {
  while (auto number = co_await numbers.recv()) sum += *number;
}

}  // namespace

int main() {
  constexpr std::uint64_t count = 1'000;
  std::uint64_t sum = 0;
  strait::runtime rt;
  auto [tx, rx] = strait::make_channel<std::uint64_t>({.capacity = 8});
  rt.node(0).spawn(produce(std::move(tx), count));
  rt.node(rt.node_count() - 1).spawn(consume(std::move(rx), sum));
  rt.join();
  const std::uint64_t expected = count * (count - 1) / 2;
  if (sum == expected) return 0;
  std::printf("expected the sum %llu, found %llu\n", static_cast<unsigned long long>(expected),
              static_cast<unsigned long long>(sum));
  return 1;
}
