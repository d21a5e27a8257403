// kv-demo: starts kv-server, runs the real redis-benchmark against it, and checks that everything was as it should be.

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <signal.h>
#include <unistd.h>

#include "child.hpp"

namespace {

constexpr int requests = 100'000;

using file = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

/// Reads what a program prints, line by line. A line that the program overwrites with carriage returns, to show how far
/// it is, is told once in its final form.
class line_reader {
 public:
  explicit line_reader(const kv::child& program) : stream_(::fdopen(::dup(program.output()), "r"), &std::fclose) {}

  bool next(std::string& line) {
    line.clear();
    for (int c = std::fgetc(stream_.get()); c != EOF; c = std::fgetc(stream_.get())) {
      if (c == '\n') return true;
      if (c == '\r') {
        line.clear();
      } else {
        line += static_cast<char>(c);
      }
    }
    return !line.empty();
  }

 private:
  file stream_;
};

void expect(bool condition, const std::string& complaint) {
  if (!condition) throw std::runtime_error(complaint);
}

/// Runs a program to its end and returns what it printed. Throws when it fails.
std::vector<std::string> run(const std::vector<std::string>& arguments) {
  kv::child program(arguments);
  line_reader output(program);
  std::vector<std::string> lines;
  for (std::string line; output.next(line);) lines.push_back(line);
  const int status = program.wait();
  expect(status == 0, fmt::format("{} ended with status {}: {}", arguments[0], status, fmt::join(lines, "\n")));
  return lines;
}

/// The port that a new kv-server names in its first line.
std::string port_of(const kv::child& server) {
  std::string line;
  line_reader(server).next(line);
  const std::string_view before = "listening on 127.0.0.1:";
  const auto start = line.find(before);
  expect(start != std::string::npos, "kv-server did not start");
  fmt::print("{}\n", line);
  const auto port = line.substr(start + before.size());
  return port.substr(0, port.find(','));
}

void benchmark(const std::string& port) {
  fmt::print("redis-benchmark -t set,get,incr -n {} -c 20 -P 16 -q\n", requests);
  std::fflush(stdout);
  const auto lines = run({"redis-benchmark", "-p", port, "-t", "set,get,incr", "-n", std::to_string(requests), "-c",
                          "20", "-P", "16", "-q"});
  for (const auto& line : lines) {
    if (!line.empty()) fmt::print("  {}\n", line);
  }
  for (const std::string_view command : {"SET: ", "GET: ", "INCR: "}) {
    const bool reported = std::ranges::any_of(lines, [&](const auto& line) {
      return line.starts_with(command) && line.find("requests per second") != line.npos;
    });
    expect(reported, fmt::format("redis-benchmark reports nothing for {}", command));
  }
  for (const std::string_view trouble : {"rror", "WARNING"}) {
    const bool found = std::ranges::any_of(lines, [&](const auto& line) { return line.find(trouble) != line.npos; });
    expect(!found, "redis-benchmark complains");
  }
}

/// The benchmark looks at no reply. The counter that it increments tells whether each request was executed once.
void check_counter(const std::string& port) {
  const auto lines = run({"redis-cli", "-p", port, "get", "counter:__rand_int__"});
  const auto expected = std::to_string(requests);
  expect(lines.size() == 1 && lines[0] == expected,
         fmt::format("expected a counter of {}, found {}", expected, fmt::join(lines, " ")));
  fmt::print("  the counter is {}: no request was lost or executed twice\n", expected);
}

void check_nothing_is_left(const std::string& port) {
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    expect(entry.path().string().find("strait-kv." + port + ".") == std::string::npos,
           "left behind: " + entry.path().string());
  }
  fmt::print("kv-server stopped, and nothing is left in /dev/shm\n");
}

void demonstrate() {
  const auto here = std::filesystem::path(kv::this_program()).parent_path();
  kv::child server({here / "kv-server", "--port", "0"});
  const auto port = port_of(server);
  benchmark(port);
  check_counter(port);
  server.signal(SIGTERM);
  const int status = server.wait();
  expect(status == 0, fmt::format("kv-server ended with status {}", status));
  check_nothing_is_left(port);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    fmt::print(stderr, "kv-demo: expected no arguments, found '{}'\n", argv[1]);
    return 2;
  }
  try {
    demonstrate();
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "kv-demo: {}\n", error.what());
    return 1;
  }
}
