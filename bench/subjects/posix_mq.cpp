// Two POSIX message queues, one a direction. There is no call that sends or receives several messages, so a batch is
// one by one as well.
#include <fcntl.h>
#include <mqueue.h>

#include <cerrno>
#include <fstream>
#include <system_error>

#include <fmt/format.h>

#include "../subject.hpp"

namespace bench {
namespace {

long limit_of(const char* name, long otherwise) {
  std::ifstream file{fmt::format("/proc/sys/fs/mqueue/{}", name)};
  long value = otherwise;
  file >> value;
  return value;
}

descriptor make_queue(std::size_t message_bytes) {
  mq_attr wanted{};
  // As deep as an unprivileged process may have it: 10 unless the machine was told otherwise.
  wanted.mq_maxmsg = limit_of("msg_max", 10);
  wanted.mq_msgsize = static_cast<long>(message_bytes);
  const std::string name = fmt::format("/strait-demo-{:x}", tick_clock::monotonic_ns());
  // The conductor takes signals only where it waits, so nothing comes between the two calls, and no name stays.
  const mqd_t queue = ::mq_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600, &wanted);
  if (queue < 0) throw std::system_error{errno, std::system_category(), "cannot make a POSIX message queue"};
  ::mq_unlink(name.c_str());
  return descriptor{queue};  // on Linux a queue is a descriptor
}

link connect(const job& task) {
  descriptor there = make_queue(task.message_bytes);
  descriptor back = make_queue(task.message_bytes);
  link both;
  both.producer.push_back(back.duplicate());
  both.producer.push_back(there.duplicate());
  both.consumer.push_back(std::move(there));
  both.consumer.push_back(std::move(back));
  return both;
}

template <class M>
void run_queue(end& self, mqd_t in, mqd_t out) {
  const bool one_cpu = self.one_cpu();
  const auto send = [out](const M& message) {
    while (::mq_send(out, reinterpret_cast<const char*>(&message), sizeof message, 0) != 0) {
      if (errno != EINTR && errno != EAGAIN) {
        throw std::system_error{errno, std::system_category(), "cannot send to the queue"};
      }
    }
  };
  const auto receive = [in, one_cpu] {
    M message;
    while (::mq_receive(in, reinterpret_cast<char*>(&message), sizeof message, nullptr) < 0) {
      if (errno == EAGAIN) {
        if (one_cpu) relax(true);
      } else if (errno != EINTR) {
        throw std::system_error{errno, std::system_category(), "cannot receive from the queue"};
      }
    }
    return message;
  };
  if (self.kind() == work::spin) {
    // O_NONBLOCK belongs to the description, which the two ends share; both ask for the same.
    mq_attr flags{};
    flags.mq_flags = O_NONBLOCK;
    for (const mqd_t queue : {in, out}) checked(::mq_setattr(queue, &flags, nullptr), "cannot make a queue not block");
  }
  if (self.kind() == work::spin || self.kind() == work::parked) {
    self.producing() ? ping<M>(self, send, receive) : pong<M>(self, send, receive);
  } else {
    self.producing() ? produce<M>(self, send) : consume<M>(self, receive);
  }
}

void run(end& self) {
  with_message(self.message_bytes(), [&self]<class M>() { run_queue<M>(self, self.fd(0), self.fd(1)); });
}

}  // namespace

subject posix_mq_subject() {
  return {.name = "posix-mq", .run = run, .connect = connect};
}

}  // namespace bench
