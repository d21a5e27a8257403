module;
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>
module strait.memory;

import strait.error;

/// Memory without a name: made by one process, sealed, and handed to another that trusts nothing about it but the seals.
namespace strait {
namespace {

#ifndef MFD_NOEXEC_SEAL
constexpr unsigned MFD_NOEXEC_SEAL = 0x0008;
#endif

/// Nobody changes the size any more, so no access to a mapping can be a SIGBUS; and nobody adds a seal against writing.
constexpr int wanted_seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

std::string in_words(int seals) {
  std::string words;
  const auto add = [&](int seal, const char* word) {
    if ((seals & seal) != 0) words += (words.empty() ? "" : ", ") + std::string{word};
  };
  add(F_SEAL_SHRINK, "shrinking");
  add(F_SEAL_GROW, "growing");
  add(F_SEAL_WRITE, "writing");
  add(F_SEAL_SEAL, "further seals");
  return words.empty() ? "nothing" : words;
}

/// Its own open file description: the peer has a descriptor of the one that was handed over.
file_locks locks_on(int memory, const std::string& what) {
  const std::string link = "/proc/self/fd/" + std::to_string(memory);
  file_locks locks{link.c_str(), O_RDWR | O_CLOEXEC, 0};
  if (locks.descriptor() < 0) fail_errno(errno, what + ": opening " + link + " for its locks");
  return locks;
}

}  // namespace

segment make_sealed_segment(const memory_name& name, const segment_plan& plan, unshared_descriptor& to_hand_over) {
  const std::string what = name.text();
  constexpr std::size_t longest = 249;  // NAME_MAX, less "memfd:"
  const std::string label = ("strait:" + name.name).substr(0, longest);
  const auto create = [&](unsigned flags) {
    const fork_pause pause;
    to_hand_over = unshared_descriptor{pause, ::memfd_create(label.c_str(), flags)};
  };
  // Gives it its size.
  std::size_t bytes = plan.bytes;
  const auto set_size = [&] {
    bytes = file_bytes(to_hand_over.get(), plan.bytes, plan.pages);
    return ::ftruncate(to_hand_over.get(), static_cast<::off_t>(bytes)) == 0 ? 0 : errno;
  };
  if (plan.pages.kind == page_kind::huge) {
    create(MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB);
    // Are there as many? They go back at once: where they are to lie is not said yet.
    if (to_hand_over && (set_size() != 0 || allocate_bytes(to_hand_over.get(), bytes) != 0)) to_hand_over = {};
    if (to_hand_over) (void)allocate_bytes(to_hand_over.get(), bytes, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
  }
  if (!to_hand_over) create(MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
  if (!to_hand_over && errno == EINVAL) create(MFD_CLOEXEC | MFD_ALLOW_SEALING);  // a kernel before 6.3
  if (!to_hand_over) fail_errno(errno, what + ": memfd_create");
  if (const int error = set_size(); error != 0) {
    fail_errno(error, what + ": setting the memory's size to " + std::to_string(bytes));
  }
  const int memory = to_hand_over.get();
  segment made;
  made.created = true;
  made.map = mapping::of_file(memory, plan.bytes, plan.pages, what);
  // Now, so that a lack of memory is an error here and not a signal at the first message.
  const int error = allocate_bytes(memory, bytes);
  if (error == ENOSPC || error == ENOMEM) {
    fail(errc::no_space, what + ": expected " + std::to_string(bytes) + " free bytes of memory, found fewer");
  }
  if (error != 0) fail_errno(error, what + ": allocating " + std::to_string(bytes) + " bytes");
  made.map.furnish(plan.pages, what);
  plan.fill(made.map.data());
  if (::fcntl(memory, F_ADD_SEALS, wanted_seals) != 0) fail_errno(errno, what + ": sealing the memory");
  made.locks = locks_on(memory, what);
  return made;
}

segment enter_sealed_segment(const memory_name& name, int handed_over, std::size_t header_bytes,
                             const std::function<std::size_t(std::span<const std::byte>)>& bytes_to_map,
                             page_wishes wishes) {
  const std::string what = name.text();
  // Only a memfd has seals: this also refuses sockets, devices, and files of file systems that somebody made himself.
  const int seals = ::fcntl(handed_over, F_GET_SEALS);
  if (seals < 0) {
    fail(errc::foreign_segment, what + ": expected a memfd to be handed over, found a descriptor of another kind");
  }
  if ((seals & wanted_seals) != wanted_seals || (seals & F_SEAL_WRITE) != 0) {
    fail(errc::foreign_segment, what + ": expected memory sealed against " + in_words(wanted_seals) +
                                    " and not against writing, found it sealed against " + in_words(seals));
  }
  // Of those there are few, and its maker may punch holes into them: whoever touches a hole when none are left is ended by
  // a signal.
  if (wishes.kind != page_kind::huge && hugetlb_page_of(handed_over) != 0) {
    fail(errc::foreign_segment, what +
                                    ": expected memory of ordinary pages, as this end did not ask for `huge` ones, "
                                    "found pages of hugetlbfs");
  }
  struct ::stat file{};
  if (::fstat(handed_over, &file) != 0) fail_errno(errno, what + ": looking at the memory that was handed over");
  std::vector<std::byte> header(header_bytes);
  const ::ssize_t got = ::pread(handed_over, header.data(), header.size(), 0);
  if (got < 0) fail_errno(errno, what + ": reading the header of the memory that was handed over");
  const std::size_t bytes = bytes_to_map(std::span<const std::byte>{header.data(), static_cast<std::size_t>(got)});
  const auto size = static_cast<std::uint64_t>(file.st_size);
  if (size < bytes) {
    fail(errc::truncated_segment,
         what + ": expected a segment of " + std::to_string(bytes) + " bytes, found " + std::to_string(size));
  }
  // Huge pages are whole.
  if (size != bytes && size != file_bytes(handed_over, bytes, {.kind = page_kind::transparent})) {
    fail(errc::layout_mismatch,
         what + ": expected a segment of " + std::to_string(bytes) + " bytes, found " + std::to_string(size));
  }
  // What its maker has not paid for we do not pay for, either: touching holes would allocate here.
  const std::uint64_t allocated = static_cast<std::uint64_t>(file.st_blocks) * 512;
  if (allocated < bytes) {
    fail(errc::truncated_segment, what + ": expected " + std::to_string(bytes) + " allocated bytes, found " +
                                      std::to_string(allocated) + " and holes");
  }
  segment entered;
  wishes.node.reset();  // where they are, they are; the end that enters may have them moved
  entered.map = mapping::of_file(handed_over, bytes, wishes, what);
  entered.map.furnish(wishes, what);
  entered.locks = locks_on(handed_over, what);
  return entered;
}

std::optional<memory_name> name_of_handed_over(std::string_view shown, const char* link) {
  constexpr std::string_view before = "/memfd:strait:";
  constexpr std::string_view behind = " (deleted)";  // so says /proc of everything that has no name
  struct ::stat facts{};
  if (!shown.starts_with(before) || !shown.ends_with(behind) || ::stat(link, &facts) != 0) return std::nullopt;
  shown = shown.substr(before.size(), shown.size() - before.size() - behind.size());
  return memory_name{memory_scheme::handed_over, std::string{shown} + '#' + std::to_string(facts.st_ino)};
}

segment_look look_at_handed_over(const memory_name& name, const std::string& link, std::size_t header_bytes) {
  const auto vanished = [&] {
    fail(errc::foreign_segment,
         name.text() + ": expected the memory of a channel at " + link + ", found something else");
  };
  segment_look look;
  struct ::stat facts{};
  const auto is_still_there = [&] {
    return S_ISREG(facts.st_mode) && name.name.ends_with('#' + std::to_string(facts.st_ino));
  };
  // The number may be another file's by now, or of a process that ended; even in between, hence O_NONBLOCK.
  if (::stat(link.c_str(), &facts) != 0 || !is_still_there()) vanished();
  look.locks = file_locks{link.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0};
  const int memory = look.locks.descriptor();
  if (memory < 0) {
    if (errno == EMFILE || errno == ENFILE || errno == ENOMEM) fail_errno(errno, name.text() + ": opening " + link);
    vanished();
  }
  // A file of such a path has no seals.
  if (::fstat(memory, &facts) != 0 || !is_still_there() || ::fcntl(memory, F_GET_SEALS) < 0) vanished();
  look.size = static_cast<std::uint64_t>(facts.st_size);
  look.header.resize(header_bytes);
  const ::ssize_t got = ::pread(memory, look.header.data(), header_bytes, 0);
  if (got < 0) fail_errno(errno, name.text() + ": reading the header of the memory at " + link);
  look.header.resize(static_cast<std::size_t>(got));
  return look;
}

}  // namespace strait
