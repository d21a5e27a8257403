// A TCP connection over loopback. Streams leave Nagle's algorithm on, which gathers small writes; round trips turn it
// off, as everybody does who cares for latency.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include "bytes.hpp"

namespace bench {
namespace {

link connect(const job& task) {
  const descriptor door{checked(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "cannot make a TCP socket")};
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  socklen_t length = sizeof address;
  checked(::bind(door.get(), generic, length), "cannot bind to loopback");
  checked(::listen(door.get(), 1), "cannot listen on loopback");
  checked(::getsockname(door.get(), generic, &length), "cannot ask for the port");

  descriptor producer{checked(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "cannot make a TCP socket")};
  checked(::connect(producer.get(), generic, length), "cannot connect over loopback");
  descriptor consumer{checked(::accept4(door.get(), nullptr, nullptr, SOCK_CLOEXEC), "cannot accept over loopback")};
  if (task.kind == work::spin || task.kind == work::parked) {
    const int on = 1;
    for (const descriptor* each : {&producer, &consumer}) {
      checked(::setsockopt(each->get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), "cannot set TCP_NODELAY");
    }
  }
  link both;
  both.producer.push_back(std::move(producer));
  both.consumer.push_back(std::move(consumer));
  return both;
}

}  // namespace

subject tcp_subject() {
  return {.name = "tcp", .run = run_socket, .connect = connect};
}

}  // namespace bench
