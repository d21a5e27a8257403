// A connected pair of Unix sockets. SOCK_STREAM: with a buffering reader it carries more than SOCK_SEQPACKET, which
// costs a system call for each message at both ends.
#include <sys/socket.h>

#include "bytes.hpp"

namespace bench {
namespace {

link connect(const job&) {
  int ends[2];
  checked(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "cannot make a pair of Unix sockets");
  link both;
  both.producer.emplace_back(ends[0]);
  both.consumer.emplace_back(ends[1]);
  return both;
}

}  // namespace

subject unix_socket_subject() {
  return {.name = "unix-socket", .run = run_socket, .connect = connect};
}

}  // namespace bench
