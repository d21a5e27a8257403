// Files in a strait::task, which Asio reads and writes through io_uring (CMake's STRAIT_ASIO_IO_URING), beside channels.
#include <strait/asio.hpp>

#include <doctest/doctest.h>
#include <unistd.h>

#include <array>
#include <asio/buffer.hpp>
#include <asio/io_context.hpp>
#include <asio/random_access_file.hpp>
#include <asio/read.hpp>
#include <asio/stream_file.hpp>
#include <asio/write.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

import strait;

namespace {

using strait::use_op;

/// A file's name that nobody else uses, and that is gone with this object.
class temporary_name {
 public:
  temporary_name()
      : path_{std::filesystem::temp_directory_path() / ("strait-test-file-" + std::to_string(::getpid()))} {}
  temporary_name(const temporary_name&) = delete;
  temporary_name& operator=(const temporary_name&) = delete;
  ~temporary_name() {
    std::error_code gone;
    std::filesystem::remove(path_, gone);
  }
  [[nodiscard]] std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

/// Why this machine's kernel gives no io_uring to us, if it does not: containers often forbid it.
std::optional<std::string> refusal() {
  asio::io_context context{1};
  const temporary_name name;
  try {
    const asio::stream_file file{context, name.path(), asio::stream_file::write_only | asio::stream_file::create};
    return std::nullopt;
  } catch (const std::system_error& error) {
    const std::error_code& code = error.code();
    if (code == std::errc::operation_not_permitted || code == std::errc::permission_denied ||
        code == std::errc::function_not_supported || code == std::errc::not_enough_memory) {
      return error.what();
    }
    throw;
  }
}

using number = std::uint64_t;
constexpr number count = 20'000;

/// Takes from the channel what is there and writes it behind what was written before.
strait::task<> write_down(asio::stream_file file, strait::receiver<number> numbers) {
  std::array<number, 512> some;
  for (;;) {
    const std::size_t n = co_await numbers.recv_many(some);
    if (n == 0) break;
    co_await asio::async_write(file, asio::buffer(some.data(), n * sizeof(number)), use_op);
  }
}

strait::task<> send_all(strait::sender<number> numbers) {
  for (number i = 0; i < count; ++i) co_await numbers.send(i);
}

strait::task<> read_back(asio::stream_file file, number& read) {
  std::array<number, 300> some;
  for (;;) {
    std::error_code error;
    const std::size_t bytes = co_await asio::async_read(file, asio::buffer(some), use_op(error));
    for (const number one : std::span{some}.first(bytes / sizeof(number))) {
      if (one != read++) throw std::runtime_error{"a wrong number in the file"};
    }
    if (error == asio::error::eof) break;
    if (error) throw std::system_error{error};
  }
}

}  // namespace

TEST_CASE("a file is written from a channel and read back, in tasks") {
  if (const auto why = refusal()) {
    MESSAGE("left out: no io_uring here: ", *why);
    return;
  }
  const temporary_name name;
  {
    asio::io_context context{1};
    auto [tx, rx] = strait::make_channel<number>({.capacity = 256});
    asio::stream_file file{context, name.path(),
                           asio::stream_file::write_only | asio::stream_file::create | asio::stream_file::truncate};
    strait::spawn(context, write_down(std::move(file), std::move(rx)));
    strait::spawn(context, send_all(std::move(tx)));
    context.run();
  }
  CHECK(std::filesystem::file_size(name.path()) == count * sizeof(number));
  asio::io_context context{1};
  number read = 0;
  strait::spawn(context, read_back(asio::stream_file{context, name.path(), asio::stream_file::read_only}, read));
  // Any place of it, too.
  number found = 0;
  strait::spawn(context, [](asio::random_access_file file, number& one) -> strait::task<> {
    (void)co_await file.async_read_some_at(12'345 * sizeof(number), asio::buffer(&one, sizeof one), use_op);
  }(asio::random_access_file{context, name.path(), asio::random_access_file::read_only}, found));
  context.run();
  CHECK(read == count);
  CHECK(found == 12'345);
}
