module;
#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>
module strait.endpoint;

import strait.topology;

namespace strait {
namespace {

constexpr std::size_t default_capacity = 1024;

constexpr std::uint64_t byte_of(role r) noexcept {
  return gate_byte + 1 + static_cast<std::uint64_t>(r);
}

bool looks_alive(std::uint32_t word) noexcept {
  const auto now = static_cast<presence>(word);
  return now == presence::awake || now == presence::thread_parked || now == presence::hub_parked;
}

/// The capacity in slots: a power of two that memory can hold.
std::uint64_t checked_capacity(const std::string& channel, std::optional<std::size_t> asked,
                               const message_shape& shape) {
  const std::uint64_t wanted = asked.value_or(default_capacity);
  const auto pages = static_cast<std::uint64_t>(std::max(::sysconf(_SC_PHYS_PAGES), 1L));
  const auto page = static_cast<std::uint64_t>(std::max(::sysconf(_SC_PAGESIZE), 1L));
  const std::uint64_t most = std::bit_floor(pages * page / shape.bytes);
  if (wanted == 0 || wanted > most) {
    fail(errc::bad_capacity, channel + ": expected a capacity of 1 to " + std::to_string(most) + " messages of " +
                                 std::to_string(shape.bytes) + " bytes (this machine's memory), found " +
                                 std::to_string(wanted));
  }
  return std::bit_ceil(wanted);
}

void fill_header(segment_header& header, const message_shape& shape, std::uint64_t capacity, store_load barrier) {
  header.layout_version = segment_header::expected_layout;
  header.header_bytes = sizeof(segment_header);
  header.slots_offset = static_cast<std::uint32_t>(slots_offset_for(shape.alignment));
  header.capacity = capacity;
  header.segment_bytes = header.slots_offset + capacity * shape.bytes;
  header.message_bytes = shape.bytes;
  header.message_alignment = shape.alignment;
  header.message_version = shape.version;
  header.barrier = barrier;
  shape.name.copy(header.message_name, sizeof header.message_name - 1);
  header.creator_pid = static_cast<std::uint32_t>(::getpid());
  header.magic = segment_header::expected_magic;
}

/// The number in a word that holds one more than that, or 0 for none.
std::optional<unsigned> counted_from_one(std::uint32_t word) noexcept {
  return word == 0 ? std::nullopt : std::optional<unsigned>{word - 1};
}

page_wishes wishes_of(const channel_options& options) noexcept {
  return {.node = options.node, .kind = options.pages, .prefault = options.prefault, .lock = options.lock};
}

/// The same for memory between processes. Without more rights the kernel moves only pages that one process alone has
/// touched: a sender leaves them to the receiver until it writes to them. They are allocated all the same.
page_wishes shared_wishes_of(role mine, const channel_options& options) {
  page_wishes wishes = wishes_of(options);
  if (mine == role::sender && !options.node && options.pages == page_kind::automatic && !options.lock &&
      memory_nodes().size() > 1) {
    wishes.prefault = false;
  }
  return wishes;
}

std::string quoted(std::string_view name) {
  return name.empty() ? "unnamed" : '"' + std::string{name} + '"';
}

std::string_view name_in(const segment_header& header) {
  return {header.message_name, ::strnlen(header.message_name, sizeof header.message_name)};
}

message_shape shape_in(const segment_header& header) {
  return {name_in(header), header.message_version, header.message_bytes, header.message_alignment};
}

bool same_type(const segment_header& header, const message_shape& shape) {
  return name_in(header) == shape.name.substr(0, sizeof header.message_name - 1) &&
         header.message_version == shape.version && header.message_bytes == shape.bytes &&
         header.message_alignment == shape.alignment;
}

/// Throws unless these bytes begin a whole segment of our layout. Returns how long it is.
std::size_t checked_size(const std::string& channel, std::span<const std::byte> bytes, segment_header& header) {
  if (bytes.size() < sizeof(std::uint64_t) ||
      std::memcmp(bytes.data(), &segment_header::expected_magic, sizeof(std::uint64_t)) != 0) {
    fail(errc::foreign_segment, channel + ": expected a strait segment, found a file that does not begin like one");
  }
  if (bytes.size() < sizeof(segment_header)) {
    fail(errc::truncated_segment, channel + ": expected a header of " + std::to_string(sizeof(segment_header)) +
                                      " bytes, found " + std::to_string(bytes.size()));
  }
  std::memcpy(static_cast<void*>(&header), bytes.data(), sizeof header);
  if (header.layout_version != segment_header::expected_layout) {
    fail(errc::version_mismatch, channel + ": expected layout version " +
                                     std::to_string(segment_header::expected_layout) + ", found " +
                                     std::to_string(header.layout_version));
  }
  const bool sane = header.header_bytes == sizeof(segment_header) && header.message_bytes > 0 &&
                    std::has_single_bit(header.message_alignment) && std::has_single_bit(header.capacity) &&
                    header.slots_offset == slots_offset_for(header.message_alignment) &&
                    header.capacity <= (std::numeric_limits<std::uint64_t>::max() >> 1) / header.message_bytes &&
                    header.segment_bytes == header.slots_offset + header.capacity * header.message_bytes &&
                    header.barrier >= store_load::by_fence && header.barrier <= store_load::by_machine_barrier;
  if (!sane) {
    fail(errc::layout_mismatch, channel + ": expected header fields that agree with each other, found capacity " +
                                    std::to_string(header.capacity) + ", message size " +
                                    std::to_string(header.message_bytes) + ", segment size " +
                                    std::to_string(header.segment_bytes));
  }
  return header.segment_bytes;
}

/// Why a channel is not the one that was asked for.
struct misfit {
  errc why;
  std::string expected;
  std::string found;
};

/// Nothing: it is. `capacity` counts where the options have one; `registered`: this process has the machine barrier.
std::optional<misfit> misfit_of(const segment_header& header, const message_shape& shape,
                                const channel_options& options, std::uint64_t capacity, bool registered) {
  if (!same_type(header, shape)) return misfit{errc::type_mismatch, describe(shape), describe(shape_in(header))};
  if (options.capacity && header.capacity != capacity) {
    return misfit{errc::layout_mismatch, "a capacity of " + std::to_string(capacity) + " messages",
                  std::to_string(header.capacity)};
  }
  if (header.barrier == store_load::by_fence) return std::nullopt;
  if (options.order == ordering::fence) {
    return misfit{errc::layout_mismatch, "option order = fence", "order = automatic (membarrier)"};
  }
  // That of one process is of no use between two.
  if (header.barrier == store_load::by_machine_barrier && registered) return std::nullopt;
  return misfit{errc::no_barrier, "a kernel that grants membarrier, or a channel made with option order = fence",
                "neither"};
}

/// Whether the words of this copy of a header are such as correct ends write. The cursors are compared only where
/// nobody lives: they were not copied at one instant.
bool words_are_sound(const segment_header& header, bool inhabited) noexcept {
  // relaxed, all of them: a copy of our own.
  if (header.poisoned.load(std::memory_order_relaxed) != 0) return false;
  for (const end_entry& entry : header.ends) {
    if (!is_presence(entry.presence.load(std::memory_order_relaxed))) return false;
  }
  return inhabited ||
         header.lane.tail.load(std::memory_order_relaxed) - header.lane.head.load(std::memory_order_relaxed) <=
             header.capacity;
}

bool of_this_boot(const end_entry& entry) {
  const boot_identity boot = this_boot();
  // relaxed: entering and examining are ordered by the gate.
  return entry.boot_high.load(std::memory_order_relaxed) == boot.high &&
         entry.boot_low.load(std::memory_order_relaxed) == boot.low;
}

/// Before anything is made or entered: it may fail, and later there would be a segment to be taken back.
void learn_who_we_are() {
  (void)this_process();
  (void)this_boot();
}

/// Whether a sender that closed left messages for a receiver that is yet to come; see close().
bool holds_a_deposit(const segment_header& header) noexcept {
  // relaxed, all of them: a copy of our own, or the gate is held.
  const auto presence_of = [&](role r) {
    return static_cast<presence>(header.ends[static_cast<std::size_t>(r)].presence.load(std::memory_order_relaxed));
  };
  return presence_of(role::sender) == presence::closed && presence_of(role::receiver) == presence::vacant &&
         header.lane.tail.load(std::memory_order_relaxed) != header.lane.head.load(std::memory_order_relaxed);
}

/// Declares the end dead if it looks alive and nobody holds its lock. The gate must be held.
bool declare_if_dead(segment_header& header, role who, const file_locks& locks) noexcept {
  end_entry& entry = header.ends[static_cast<std::size_t>(who)];
  // The lock first: who closes says so before it drops its lock, and does both without the gate where somebody was
  // stopped in it; the other way round it could do so between the two looks, and be taken for dead.
  // relaxed: entering and declaring are ordered by the gate, closing by the lock.
  if (locks.held_by_other(byte_of(who)) || !looks_alive(entry.presence.load(std::memory_order_relaxed))) return false;
  // relaxed: the release of `last_death` covers it.
  entry.died_at.store(header.lane.tail.load(std::memory_order_relaxed), std::memory_order_relaxed);
  // Three stores that can be done again: if we are killed between them, the next to look finds an end that seems alive
  // and stores the same values. Before `dead`, or the death could be left untold; not a count, or it could be told twice.
  // release: pairs with the acquire in look_at_peer.
  entry.last_death.store(entry.incarnation.load(std::memory_order_relaxed), std::memory_order_release);
  entry.presence.store(static_cast<std::uint32_t>(presence::dead), std::memory_order_relaxed);
  return true;
}

}  // namespace

std::string describe(const message_shape& shape) {
  return "type " + quoted(shape.name) + " version " + std::to_string(shape.version) + " of " +
         std::to_string(shape.bytes) + " bytes aligned to " + std::to_string(shape.alignment);
}

struct endpoint::private_channel {
  mapping memory;
  destroy_messages destroy = nullptr;
  segment_header* header = nullptr;

  ~private_channel() {
    if (destroy == nullptr || header == nullptr) return;
    // relaxed: the shared_ptr's count ordered both ends before us.
    const std::uint64_t head = header->lane.head.load(std::memory_order_relaxed);
    const std::uint64_t tail = header->lane.tail.load(std::memory_order_relaxed);
    // Cursors that cannot be are not believed here, either.
    if (tail - head > header->capacity) return;
    destroy(memory.data() + header->slots_offset, header->capacity - 1, head, tail);
  }
};

void endpoint::adopt(segment_header& header, const segment_header& checked, role mine,
                     const channel_options& options) noexcept {
  header_ = &header;
  own_ = &header.ends[static_cast<std::size_t>(mine)];
  peer_ = &header.ends[static_cast<std::size_t>(other(mine))];
  role_ = mine;
  capacity_ = checked.capacity;
  message_bytes_ = checked.message_bytes;
  barrier_ = checked.barrier;
  policy_ = options.wait;
  longest_spin_ = options.longest_spin.count();
  spin_ = spin_budget{options.wait, std::min<std::int64_t>(longest_spin_, 10'000), longest_spin_};
  fork_generation_ = fork_generation();
  memory_to_follow_ = mine == role::receiver && memory_nodes().size() > 1;
}

std::pair<std::unique_ptr<endpoint>, std::unique_ptr<endpoint>> endpoint::make_private(const message_shape& shape,
                                                                                       const channel_options& options,
                                                                                       destroy_messages destroy) {
  const std::uint64_t capacity = checked_capacity("private channel", options.capacity, shape);
  auto shared = std::make_shared<private_channel>();
  shared->memory = mapping::anonymous(slots_offset_for(shape.alignment) + capacity * shape.bytes, wishes_of(options));
  auto* header = ::new (static_cast<void*>(shared->memory.data())) segment_header{};
  const bool barrier = options.order == ordering::automatic && register_barrier(store_load::by_process_barrier);
  fill_header(*header, shape, capacity, barrier ? store_load::by_process_barrier : store_load::by_fence);
  // relaxed: nobody else has it yet.
  header->node_asked.store(options.node ? *options.node + 1 : 0, std::memory_order_relaxed);
  shared->header = header;
  shared->destroy = destroy;
  const auto make = [&](role mine) {
    std::unique_ptr<endpoint> made{new endpoint};
    made->adopt(*header, *header, mine, options);
    made->text_ = "private channel";
    made->private_ = shared;
    // relaxed: the handles are given to other threads by means that order this.
    made->own().incarnation.store(1, std::memory_order_relaxed);
    made->own().presence.store(static_cast<std::uint32_t>(presence::awake), std::memory_order_relaxed);
    return made;
  };
  return {make(role::sender), make(role::receiver)};
}

std::unique_ptr<endpoint> endpoint::open(role mine, std::string_view name, const message_shape& shape,
                                         const channel_options& options) {
  std::unique_ptr<endpoint> made{new endpoint};
  made->name_ = parse_memory_name(name);
  made->text_ = made->name_.text();
  const std::string& channel = made->text_;
  if (made->name_.scheme == memory_scheme::handed_over) {
    fail(errc::unknown_scheme, channel +
                                   ": expected a channel that is opened by its name, found one that is handed over "
                                   "by a strait::listener and reached with strait::connect");
  }
  const std::uint64_t capacity = checked_capacity(channel, options.capacity, shape);
  const bool registered = register_barrier(store_load::by_machine_barrier);
  const auto barrier =
      registered && options.order == ordering::automatic ? store_load::by_machine_barrier : store_load::by_fence;

  segment_plan plan;
  plan.bytes = slots_offset_for(shape.alignment) + capacity * shape.bytes;
  plan.mode = options.mode;
  plan.group = options.group;
  plan.pages = shared_wishes_of(mine, options);
  plan.fill = [&](std::byte* memory) {
    fill_header(*::new (static_cast<void*>(memory)) segment_header{}, shape, capacity, barrier);
  };

  const auto bytes_to_map = [&](std::span<const std::byte> bytes) {
    segment_header header{};
    return checked_size(channel, bytes, header);
  };
  const auto examine = [&](std::span<const std::byte> bytes, std::uint64_t size, const file_locks& locks) {
    segment_header header{};
    checked_size(channel, bytes, header);
    const bool inhabited = locks.held_by_other(byte_of(role::sender)) || locks.held_by_other(byte_of(role::receiver));
    const bool whole = size >= header.segment_bytes;
    const bool sound = words_are_sound(header, inhabited);
    // From a broken segment nobody can take messages.
    const bool deposited = whole && sound && holds_a_deposit(header);
    // What a crash left is no obstacle to whoever may create; an end that lives decides what the channel is. What is
    // meant to outlive its ends is no leftover but the user's.
    const bool leftover = !inhabited && !deposited && !made->name_.outlives_its_ends();
    const auto refuse = [&](errc e, const std::string& expected, const std::string& found) {
      if (leftover && options.open != open_mode::open) return verdict::replace;
      fail(e, channel + ": expected " + expected + ", found " + found);
    };
    if (!whole) {
      return refuse(errc::truncated_segment, "a segment of " + std::to_string(header.segment_bytes) + " bytes",
                    std::to_string(size));
    }
    if (!sound) {
      return refuse(errc::corrupt, "a sound channel", "one that was poisoned by an impossible value");
    }
    if (const auto found = misfit_of(header, shape, options, capacity, registered)) {
      return refuse(found->why, found->expected, found->found);
    }
    if (options.open == open_mode::create && leftover) return verdict::replace;
    // A lock ends with its boot, at the latest. One that is held under another boot is held on another machine, which
    // sees the same file over the network and not the same memory.
    for (const role r : {role::sender, role::receiver}) {
      const end_entry& entry = header.ends[static_cast<std::size_t>(r)];
      if (!of_this_boot(entry) && locks.held_by_other(byte_of(r))) {
        fail(errc::end_in_use, channel + ": expected ends of this machine only, found a living " +
                                   std::string{to_string(r)} + " that entered under another boot");
      }
    }
    const auto& entry = header.ends[static_cast<std::size_t>(mine)];
    if (options.open != open_mode::create && locks.held_by_other(byte_of(mine))) {
      fail(errc::end_in_use, channel + ": expected no living " + std::string{to_string(mine)} +
                                 ", found one in process " + std::to_string(entry.pid.load(std::memory_order_relaxed)));
    }
    return verdict::enter;
  };

  learn_who_we_are();
  const auto now = std::chrono::steady_clock::now();
  constexpr auto end_of_time = std::chrono::steady_clock::time_point::max();
  const auto deadline = options.patience < end_of_time - now ? now + options.patience : end_of_time;
  made->segment_ =
      open_segment(made->name_, options.open, deadline, plan, sizeof(segment_header), examine, bytes_to_map);
  if (options.node && !made->segment_.created) {
    // Refused as when it is created, where there is no such node.
    made->segment_.map.ask_for_node(*options.node, channel);
  }
  // Once more, and from here on only this copy: what was examined can have been overwritten before it was mapped.
  segment_header checked{};
  const std::span<const std::byte> mapped{made->segment_.map.data(), sizeof(segment_header)};
  if (checked_size(channel, mapped, checked) != made->segment_.map.size() || checked.message_bytes != shape.bytes) {
    fail(errc::corrupt, channel + ": expected a header that stays as it is, found it changed while it was entered");
  }
  made->adopt(*std::launder(reinterpret_cast<segment_header*>(made->segment_.map.data())), checked, mine, options);
  made->enter(options.node);
  made->keep_from_children();
  return made;
}

void endpoint::keep_from_children() {
  // Whatever a child does with the handle that it inherits, it does not do it to the channel; and every operation that
  // looks at the lane finds at once that it must not go on.
  segment_.map.keep_from_children(sizeof(segment_header), [](std::byte* copy) noexcept {
    auto& lane = std::launder(reinterpret_cast<segment_header*>(copy))->lane;
    // relaxed: one thread. Whatever the other end's cursor, these are further away than any capacity.
    lane.tail.fetch_xor(1ULL << 63U, std::memory_order_relaxed);
    lane.head.fetch_xor(1ULL << 63U, std::memory_order_relaxed);
  });
}

void endpoint::enter(std::optional<unsigned> node) {
  file_locks& locks = segment_.locks;
  declare_if_dead(*header_, role_, locks);
  declare_if_dead(*header_, other(role_), locks);
  if (!locks.try_lock(byte_of(role_))) fail_errno(errno, text_ + ": locking this end's byte");
  // Both roles are free now. A peer that closed with nobody left took the name with it, unless it left messages for a
  // receiver to come; where the name is here all the same, the last one was killed on its way out. This end does not
  // pay for that with an end of the stream that is none: the peer is yet to come.
  const bool undelivered =
      header_->lane.tail.load(std::memory_order_relaxed) != header_->lane.head.load(std::memory_order_relaxed);
  if (static_cast<presence>(peer_word().load(std::memory_order_relaxed)) == presence::closed &&
      (role_ == role::sender || !undelivered)) {
    peer_word().store(static_cast<std::uint32_t>(presence::vacant), std::memory_order_relaxed);
  }
  // After a reboot the peer's entry tells of a process that cannot be: another may have its number by now.
  if (end_entry& them = peer(); !of_this_boot(them)) {
    // relaxed, all of them: ordered by the gate.
    them.process_high.store(0, std::memory_order_relaxed);
    them.process_low.store(0, std::memory_order_relaxed);
    them.doorbell.store(0, std::memory_order_relaxed);
    them.pid.store(0, std::memory_order_relaxed);
  }
  hold(this_process(), node);
  // Whoever comes to a dead peer is told once, like a survivor.
  const std::uint32_t last_death = peer().last_death.load(std::memory_order_relaxed);
  const bool found_dead = static_cast<presence>(peer().presence.load(std::memory_order_relaxed)) == presence::dead;
  death_seen_ = found_dead ? last_death - 1 : last_death;
  // release: pairs with the acquire in look_at_peer.
  own().presence.store(static_cast<std::uint32_t>(presence::awake), std::memory_order_release);
  // The peer may be waiting for somebody to come; it has to know whose lock to keep an eye on. The futex is woken whatever
  // its word says: whoever came before us may have been killed between taking the announcement back and ringing.
  ring(claim_ring(peer_word(), barrier_));
  futex_wake(peer_word());
  locks.unlock(gate_byte);
}

/// Writes whose this end is into its entry, and which node it asked for.
void endpoint::hold(process_identity process, std::optional<unsigned> node) noexcept {
  const boot_identity boot = this_boot();
  end_entry& mine = own();
  // relaxed, all of them: the incarnation below releases them.
  mine.boot_high.store(boot.high, std::memory_order_relaxed);
  mine.boot_low.store(boot.low, std::memory_order_relaxed);
  mine.process_high.store(process.high, std::memory_order_relaxed);
  mine.process_low.store(process.low, std::memory_order_relaxed);
  mine.doorbell.store(0, std::memory_order_relaxed);
  mine.pid.store(static_cast<std::uint32_t>(::getpid()), std::memory_order_relaxed);
  mine.cpu.store(0, std::memory_order_relaxed);
  if (node) header_->node_asked.store(*node + 1, std::memory_order_relaxed);
  // release: pairs with the acquire in watch_peer and announce_hub, which must not take a number for the process that
  // held the role before.
  mine.incarnation.fetch_add(1, std::memory_order_release);
  entered_ = true;
}

endpoint::to_hand_over endpoint::make_handed_over(role mine, const memory_name& name, const message_shape& shape,
                                                  const channel_options& options, bool barrier) {
  learn_who_we_are();
  to_hand_over made{std::unique_ptr<endpoint>{new endpoint}, {}};
  endpoint& end = *made.end;
  end.name_ = name;
  end.text_ = name.text();
  const std::uint64_t capacity = checked_capacity(end.text_, options.capacity, shape);
  const bool by_machine =
      barrier && options.order == ordering::automatic && register_barrier(store_load::by_machine_barrier);
  // What we go by: in the segment the peer may change it.
  segment_header header{};
  fill_header(header, shape, capacity, by_machine ? store_load::by_machine_barrier : store_load::by_fence);
  segment_plan plan;
  plan.bytes = header.segment_bytes;
  plan.pages = shared_wishes_of(mine, options);
  plan.fill = [&](std::byte* memory) {
    fill_header(*::new (static_cast<void*>(memory)) segment_header{}, shape, capacity, header.barrier);
  };
  end.segment_ = make_sealed_segment(name, plan, made.memory);
  end.adopt(*std::launder(reinterpret_cast<segment_header*>(end.segment_.map.data())), header, mine, options);
  end.enter_handed_over_memory(options.node);
  return made;
}

std::unique_ptr<endpoint> endpoint::enter_handed_over(role mine, const memory_name& name, int memory,
                                                      const message_shape& shape, const channel_options& options) {
  learn_who_we_are();
  std::unique_ptr<endpoint> made{new endpoint};
  made->name_ = name;
  made->text_ = name.text();
  const std::string& channel = made->text_;
  // The one copy that is checked and gone by: the peer can change what is in the segment at any time.
  segment_header checked{};
  made->segment_ = enter_sealed_segment(
      name, memory, sizeof(segment_header),
      [&](std::span<const std::byte> bytes) {
        const std::size_t whole = checked_size(channel, bytes, checked);
        const std::uint64_t capacity = options.capacity ? checked_capacity(channel, options.capacity, shape) : 0;
        // Asked for only where the channel wants it.
        const bool registered =
            checked.barrier == store_load::by_machine_barrier && register_barrier(store_load::by_machine_barrier);
        if (const auto found = misfit_of(checked, shape, options, capacity, registered)) {
          fail(found->why, channel + ": expected " + found->expected + ", found " + found->found);
        }
        return whole;
      },
      shared_wishes_of(mine, options));
  if (options.node) made->segment_.map.ask_for_node(*options.node, channel);
  made->adopt(*std::launder(reinterpret_cast<segment_header*>(made->segment_.map.data())), checked, mine, options);
  made->enter_handed_over_memory(options.node);
  return made;
}

void endpoint::enter_handed_over_memory(std::optional<unsigned> node) {
  // No gate: there are two ends, each of whom enters once, and the peer could hold it for ever.
  if (!segment_.locks.try_lock(byte_of(role_))) {
    fail(errc::end_in_use, text_ + ": expected no living " + std::string{to_string(role_)} + ", found one");
  }
  // No process is named: the peer rings the line, and is told nothing by which it could find our mailbox.
  hold({}, node);
  // release: pairs with the acquire in look_at_peer.
  own().presence.store(static_cast<std::uint32_t>(presence::awake), std::memory_order_release);
  keep_from_children();
}

void endpoint::take_line(unshared_descriptor line) {
  line_ = std::move(line);
  // Whatever stands there later is of the same peer.
  watched_incarnation_.store(peer().incarnation.load(std::memory_order_relaxed), std::memory_order_relaxed);
  watch_line(line_.get(), *this);
}

mapping& endpoint::memory() noexcept {
  return private_ ? private_->memory : segment_.map;
}

void endpoint::fetch_memory() noexcept {
  memory_to_follow_ = false;
  // In a forked child the end is the parent's.
  if (inherited()) return;
  // relaxed: nothing else is concluded from it. A peer that asks at this very moment may find its wish undone.
  if (header_->node_asked.load(std::memory_order_relaxed) != 0) return;
  // Where the kernel refuses, it stays where it is and works as well, only farther away; `explain` tells.
  if (const auto here = nearest_memory_node()) (void)memory().move_to(*here);
}

void endpoint::count_park(bell_kind bell) noexcept {
  woken_by_ = bell;
  count_one(own().parks);
  // relaxed: like the count.
  own().cpu.store(static_cast<std::uint32_t>(this_cpu() + 1), std::memory_order_relaxed);
}

void endpoint::sync() {
  if (!name_.outlives_its_ends()) return;  // neither it nor what it holds is on any disk
  if (inherited()) fail(errc::inherited, text_ + ": expected an end of this process's own to be written to the disk");
  const std::error_code error = segment_.map.write_to_disk();
  if (error) fail_errno(error.value(), text_ + ": writing it to the disk");
}

explanation endpoint::explain() {
  explanation told;
  told.channel = text_;
  told.which = role_;
  told.capacity = capacity_;
  // Not of the shared header: that is the peer's to spoil.
  told.message_bytes = message_bytes_;
  told.pages = memory().report();
  // relaxed, here and below: figures, from which nothing is concluded.
  told.node_asked = counted_from_one(header_->node_asked.load(std::memory_order_relaxed));
  for (const role r : {role::sender, role::receiver}) {
    const end_entry& entry = header_->ends[static_cast<std::size_t>(r)];
    end_place& place = told.ends[static_cast<std::size_t>(r)];
    const std::uint32_t word = entry.presence.load(std::memory_order_relaxed);
    if (is_presence(word)) place.state = static_cast<presence>(word);
    place.pid = private_ ? static_cast<std::uint32_t>(::getpid()) : entry.pid.load(std::memory_order_relaxed);
    if (r != role_) {
      place.cpu = counted_from_one(entry.cpu.load(std::memory_order_relaxed));
    } else if (const int here = this_cpu(); here >= 0) {
      place.cpu = static_cast<unsigned>(here);
    }
    if (place.cpu) place.node = node_of_cpu(*place.cpu);
  }
  told.wait = policy_;
  told.longest_spin = std::chrono::nanoseconds{longest_spin_};
  told.spin = std::chrono::nanoseconds{policy_ == wait_policy::park ? 0 : spin_.length()};
  told.barrier = barrier_;
  constexpr int tries = 5;
  for (int i = 0; i < tries; ++i) {
    const std::int64_t before = now_ns();
    heavy_barrier(barrier_);
    const std::chrono::nanoseconds took{now_ns() - before};
    if (i == 0 || took < told.barrier_cost) told.barrier_cost = took;
  }
  told.bell = woken_by_;
  return told;
}

namespace {

std::string microseconds(std::chrono::nanoseconds span) {
  const auto tenths = (span.count() + 50) / 100;
  return std::to_string(tenths / 10) + '.' + std::to_string(tenths % 10) + " us";
}

std::string describe_place(role which, const end_place& place, bool here) {
  std::string text{to_string(which)};
  if (place.pid != 0) text += " in process " + std::to_string(place.pid);
  text += ", " + std::string{place.state ? to_string(*place.state) : "corrupt"};
  if (!place.cpu) return text + (place.pid == 0 ? "" : "; it has not slept yet, so its CPU is not known");
  text += (here ? "; on CPU " : "; last slept on CPU ") + std::to_string(*place.cpu);
  if (place.node) text += ", node " + std::to_string(*place.node);
  return text;
}

}  // namespace

std::string explanation::text() const {
  std::string lines;
  const auto add = [&](std::string_view what, const std::string& found) {
    constexpr std::size_t width = 11;
    lines += std::string{what} + std::string(width - what.size(), ' ') + found + '\n';
  };
  add("channel",
      channel + ": " + std::to_string(capacity) + " messages of " + std::to_string(message_bytes) + " bytes");

  std::string memory = std::to_string(pages.bytes) + " bytes";
  if (pages.page_bytes != 0) memory += " in pages of " + std::to_string(pages.page_bytes);
  if (pages.transparent_bytes != 0) {
    memory += ", of which " + std::to_string(pages.transparent_bytes) + " bytes in transparent huge pages";
  }
  if (pages.locked_bytes != 0) memory += ", " + std::to_string(pages.locked_bytes) + " bytes of them locked";
  add("memory", memory);
  if (!pages.shortfall.empty()) add("not had", pages.shortfall);
  std::size_t touched = 0;
  for (const node_share& share : pages.nodes) touched += share.pages;
  std::string nodes;
  for (const node_share& share : pages.nodes) {
    nodes += (nodes.empty() ? "" : ", ") + std::to_string(share.pages * 100 / touched) + "% on node " +
             std::to_string(share.node);
  }
  if (!pages.nodes_refused.empty()) nodes = "not known, because the kernel refuses move_pages: " + pages.nodes_refused;
  if (nodes.empty()) nodes = "nowhere yet";
  if (pages.untouched != 0) {
    nodes += "; " + std::to_string(pages.untouched) + " pages that this process has not touched, a page fault each";
  }
  add("placed", nodes + (node_asked ? "; node " + std::to_string(*node_asked) + " was asked for"
                                    : "; no node was asked for, so it follows the receiver"));

  const end_place& mine = ends[static_cast<std::size_t>(which)];
  const end_place& theirs = ends[static_cast<std::size_t>(other(which))];
  add("this end", describe_place(which, mine, true));
  add("other end", describe_place(other(which), theirs, false));
  if (mine.cpu && theirs.cpu) {
    std::string distance;
    if (*mine.cpu == *theirs.cpu) {
      distance = "one CPU: the ends take turns, and a spin only delays the other";
    } else if (mine.node && theirs.node && *mine.node != *theirs.node) {
      distance = "two nodes: each cache line of messages crosses between them";
    } else {
      distance = "one node: each cache line of messages crosses between two CPUs";
    }
    add("distance", distance + " (`rtt/8B/spin` beside `raw-line` in ./dev demo measures it)");
  }

  std::string policy{to_string(wait)};
  if (wait == wait_policy::busy) {
    policy += ": never sleeps, and takes a CPU for itself";
  } else if (wait == wait_policy::park) {
    policy += ": sleeps at once, so each message that is waited for costs two wake-ups (`rtt/8B/parked` in ./dev demo)";
  } else {
    policy += ": spins for " + microseconds(spin) + " now and " + microseconds(longest_spin) +
              " at most, a CPU's time, then sleeps (`rtt/8B/spin` and `rtt/8B/parked` in ./dev demo)";
  }
  add("waiting", policy);

  if (barrier == store_load::by_fence) {
    add("order", "a fence in each send, " + microseconds(barrier_cost) +
                     " just now: 4 to 10 times slower one by one (docs/design/waiting.md)");
  } else {
    add("order", "membarrier by who waits, " + microseconds(barrier_cost) +
                     " just now, before each sleep; a send pays for nothing");
  }

  switch (bell) {
    case bell_kind::none:
      add("bell", "none yet: this end has not slept");
      break;
    case bell_kind::futex:
      add("bell", "futex: a wake-up is one system call of the other end and one here");
      break;
    case bell_kind::eventfd:
      add("bell",
          "eventfd: a wake-up is one write of the other end, and an epoll_wait and a read here (`raw-eventfd` in ./dev "
          "demo)");
      break;
    case bell_kind::line:
      add("bell",
          "line: a wake-up is one send of the other end over the connection, and an epoll_wait and a read here");
      break;
    case bell_kind::relay:
      add("bell", "relay: a helper thread sleeps for this end's hub and rings it, so a wake-up is two");
      break;
  }
  return lines;
}

endpoint::~endpoint() {
  close();
}

void endpoint::close() noexcept {
  if (private_) {
    // release: pairs with the acquire in look_at_peer: everything sent comes before the end of the stream.
    own_word().store(static_cast<std::uint32_t>(presence::closed), std::memory_order_release);
    ring(claim_ring(peer_word(), barrier_));
    return;
  }
  if (inherited()) {
    (void)relay_.release();  // its thread is the parent's: there is nobody to join
    return;
  }
  if (!entered_) return;  // nothing to leave
  unwatch_process(*this);
  if (name_.scheme == memory_scheme::handed_over) {
    // release: as above.
    own_word().store(static_cast<std::uint32_t>(presence::closed), std::memory_order_release);
    ring(claim_ring(peer_word(), barrier_));
    if (attended_by_ != 0) doorbell::leave(attended_by_, line_.get());
    segment_.locks = {};  // before the line
    return;
  }
  // The hub may have ended without taking its announcement back, and a relay sleeps as long as that stands.
  take_back(own_word());
  relay_.reset();
  // Entering and leaving take microseconds. Who holds the gate for longer is stopped, and must not stop us as well: then
  // the name is left to whoever comes next.
  const bool at_the_gate = segment_.locks.lock_within(gate_byte, std::chrono::seconds{1});
  // release: as above.
  own_word().store(static_cast<std::uint32_t>(presence::closed), std::memory_order_release);
  ring(claim_ring(peer_word(), barrier_));
  if (at_the_gate && peer_has_left()) {
    // Messages for a receiver that has yet to come keep the name; otherwise the last one out removes it.
    if (!holds_a_deposit(*header_) && !name_.outlives_its_ends()) remove_name(name_, segment_.locks);
  }
  // Closing the descriptor, in the destructor of segment_, drops this end's lock and the gate at once.
}

/// With the gate held: whether this end is the last one.
bool endpoint::peer_has_left() noexcept {
  const std::uint64_t theirs = byte_of(other(role_));
  if (!segment_.locks.held_by_other(theirs)) return true;
  // A living peer takes the name away when it leaves. A dead one does not, and the kernel drops its locks one after the
  // other: we may have been told of its death by another channel, which was the first. Then the rest is sure to follow,
  // and there is nobody but us to take the name away.
  const end_entry& them = peer();
  // relaxed, both: ordered by the gate.
  const process_identity process{them.process_high.load(std::memory_order_relaxed),
                                 them.process_low.load(std::memory_order_relaxed)};
  return !name_.outlives_its_ends() && is_remembered_dead(process) &&
         segment_.locks.lock_within(theirs, std::chrono::seconds{1});
}

void endpoint::death_reported() noexcept {
  // acquire: as in look_at_peer.
  death_seen_ = peer().last_death.load(std::memory_order_acquire);
  death_told_ = true;
  if (name_.scheme == memory_scheme::handed_over) {
    decide(news::died);  // for good, also where the peer lives and only says that it has died
    return;              // there is no name that anybody would have to take away
  }
  // A replacement that entered in the middle of watch_peer may be taken for the dead here. That costs whoever closes
  // beside it a second at most: in peer_has_left, the lock decides.
  // relaxed: written by this thread.
  if (watched_incarnation_.load(std::memory_order_relaxed) == death_seen_) remember_death(watched_process_);
}

void endpoint::ring(presence parked) noexcept {
  if (inherited()) return;  // whoever sleeps there waits for the parent
  if (parked == presence::thread_parked) {
    count_one(own().wakes);
    futex_wake(peer_word());
  } else if (parked == presence::hub_parked) {
    count_one(own().wakes);
    if (name_.scheme == memory_scheme::handed_over) {
      // Without a line the peer is not in yet: what its word says is none of ours.
      if (line_) ring_line(line_.get());
      return;
    }
    const end_entry& them = peer();
    // relaxed: the owner wrote them before it announced, and the claim acquired the announcement.
    const process_identity owner{them.process_high.load(std::memory_order_relaxed),
                                 them.process_low.load(std::memory_order_relaxed)};
    const std::uint64_t number = them.doorbell.load(std::memory_order_relaxed);
    if (private_) {
      doorbell::ring(number);
    } else {
      ring_doorbell(owner, number);
    }
  }
}

news endpoint::poison() noexcept {
  if (inherited()) return news::inherited;
  // release: pairs with the acquire in look_at_peer.
  header_->poisoned.store(1, std::memory_order_release);
  // relaxed: this end's own thread reads it; the sentry may write it at the same time, and either is right.
  if (line_) fate_.store(news::corrupt, std::memory_order_relaxed);
  // The peer's word may be what was overwritten, with the peer asleep behind it: ring, whatever the word says.
  (void)claim_ring(peer_word(), barrier_);
  ring(presence::thread_parked);
  ring(presence::hub_parked);
  return news::corrupt;
}

void endpoint::watch_peer() noexcept {
  // In a forked child the end is the parent's, and close() would not end the watch.
  // A peer at the other end of a line is watched from the first, and has no successor.
  if (inherited() || line_) return;
  const end_entry& them = peer();
  // acquire: the process below is that of this incarnation, or of a later one; then the incarnation is found different
  // at the next look, and we come back here.
  const std::uint32_t incarnation = them.incarnation.load(std::memory_order_acquire);
  const process_identity process{them.process_high.load(std::memory_order_relaxed),
                                 them.process_low.load(std::memory_order_relaxed)};
  watched_process_ = process;
  // Before the watch begins, because look() may run at once.
  const std::uint32_t before = watched_incarnation_.exchange(incarnation, std::memory_order_relaxed);
  if (process == this_process()) return;
  try {
    watch_process(process, *this);
  } catch (const std::system_error&) {
    // No thread to be had now: the incarnation stays unwatched, so the next look at the peer tries again. Until then we
    // are our own sentry. look() takes back what this end announced, so it does not fall asleep with nobody on watch.
    watched_incarnation_.store(before, std::memory_order_relaxed);
    look();
  }
}

bool endpoint::look() noexcept {
  if (line_) return look_at_line_end();
  // The sentry calls this between watch_process and unwatch_process; the owner uses the gate before and after, or when it
  // got no sentry, so that the two never hold it together (a lock does not exclude its own description).
  if (!segment_.locks.try_lock(gate_byte)) return false;  // somebody enters or leaves: look again soon
  declare_if_dead(*header_, other(role_), segment_.locks);
  const end_entry& them = peer();
  // relaxed: ordered by the gate. Where another end holds the role by now, it has declared the death itself.
  const bool settled =
      !looks_alive(them.presence.load(std::memory_order_relaxed)) ||
      them.incarnation.load(std::memory_order_relaxed) != watched_incarnation_.load(std::memory_order_relaxed);
  segment_.locks.unlock(gate_byte);
  if (!settled) return false;
  wake_own_waiter();
  return true;
}

bool endpoint::look_at_line_end() noexcept {
  // The peer may have passed its line on, or closed it, and live; then its lock is held.
  if (segment_.locks.held_by_other(byte_of(other(role_)))) return false;
  // acquire: what it published before its farewell.
  const bool farewell = static_cast<presence>(peer_word().load(std::memory_order_acquire)) == presence::closed;
  // So that a sender that always finds room looks, too. relaxed: what counts is `fate_`.
  if (!farewell) peer_word().store(static_cast<std::uint32_t>(presence::dead), std::memory_order_relaxed);
  decide(farewell ? news::closed : news::died);
  wake_own_waiter();
  return true;
}

void endpoint::decide(news fate) noexcept {
  // release: pairs with the acquire in look_at_peer. The first counts: what was found corrupt, or told, stays that.
  news none = news::none;
  fate_.compare_exchange_strong(none, fate, std::memory_order_release, std::memory_order_relaxed);
}

news endpoint::found_closed() noexcept {
  if (line_) decide(news::closed);  // for good, whatever the peer writes there afterwards
  return news::closed;
}

void endpoint::wake_own_waiter() noexcept {
  // Wake whoever waits on this end, whatever the word says by now. `awake` does not mean that somebody was woken: the
  // peer may have been killed between taking the announcement back and ringing, or a replacement took it back and could
  // not ring, because only the dead process had the doorbell. A wake too many makes the owner look once more.
  (void)claim_ring(own_word(), barrier_);
  futex_wake(own_word());
  // relaxed: a hub that announced another bell meanwhile has looked since, and saw what is to be told.
  doorbell::ring(bell_.load(std::memory_order_relaxed));
}

void endpoint::announce_hub(std::uint64_t doorbell_number) {
  // relaxed, both: the announcement's barrier orders them before anybody reads them.
  bell_.store(doorbell_number, std::memory_order_relaxed);
  if (line_) {
    if (attended_by_ != doorbell_number) {
      if (attended_by_ != 0) doorbell::leave(attended_by_, line_.get());
      attended_by_ = 0;  // none, if the next throws
      doorbell::attend(doorbell_number, line_.get());
      attended_by_ = doorbell_number;
    }
    announce(own_word(), presence::hub_parked);
    return;
  }
  own().doorbell.store(doorbell_number, std::memory_order_relaxed);
  hub_waits_on_futex_ = false;
  if (!private_) {
    const end_entry& them = peer();
    // acquire, both: the peer's identity was written before.
    const bool alive = looks_alive(them.presence.load(std::memory_order_acquire));
    const std::uint32_t incarnation = them.incarnation.load(std::memory_order_acquire);
    const process_identity process{them.process_high.load(std::memory_order_relaxed),
                                   them.process_low.load(std::memory_order_relaxed)};
    // Whoever comes where nobody is does not have our doorbell. Offered each time, because only the switchboard knows
    // whether a connection over which it was given still stands.
    hub_waits_on_futex_ = !alive || !offer_doorbell(process, doorbell_number);
    announced_to_ = incarnation;
    if (hub_waits_on_futex_ && (!relay_ || relay_doorbell_ != doorbell_number)) {
      take_back(own_word());  // of a hub that ended, see close()
      relay_ = std::make_unique<futex_relay>(own_word(), doorbell_number);
      relay_doorbell_ = doorbell_number;
    }
  }
  announce(own_word(), hub_waits_on_futex_ ? presence::thread_parked : presence::hub_parked);
}

bool endpoint::hub_sleeps() noexcept {
  if (hub_waits_on_futex_) {
    relay_->arm();
  } else if (!private_ && !line_ && peer().incarnation.load(std::memory_order_relaxed) != announced_to_) {
    // relaxed: behind the announcement's barrier. A peer that entered before it is seen here; one that enters after it
    // takes the announcement back in vain, but then its predecessor has rung, or died, which the sentry tells.
    return false;
  }
  count_park(line_ ? bell_kind::line : hub_waits_on_futex_ ? bell_kind::relay : bell_kind::eventfd);
  return true;
}

namespace {

/// What the look at a segment tells; throws `foreign_segment` when it is none of ours.
channel_state judge(const memory_name& name, const segment_look& look) {
  channel_state state;
  state.name = name;
  segment_header header{};
  if (look.unfinished) {
    // Somebody is at work on it: there is no channel yet, or no more.
    if (look.gate_held) fail_errno(ENOENT, name.text() + ": expected an existing channel at " + name.path());
    state.condition = channel_condition::unfinished;
    state.trouble = name.text() + ": expected a channel, found what was left unfinished";
    return state;
  }
  try {
    checked_size(name.text(), look.header, header);
    if (look.size < header.segment_bytes) {
      fail(errc::truncated_segment, name.text() + ": expected a segment of " + std::to_string(header.segment_bytes) +
                                        " bytes, found " + std::to_string(look.size));
    }
  } catch (const std::system_error& error) {
    if (error.code() == errc::foreign_segment) throw;
    state.condition =
        error.code() == errc::version_mismatch ? channel_condition::other_version : channel_condition::damaged;
    state.trouble = error.what();
    return state;
  }
  bool inhabited = false;
  for (const role r : {role::sender, role::receiver}) {
    const end_entry& entry = header.ends[static_cast<std::size_t>(r)];
    end_state& end = state.ends[static_cast<std::size_t>(r)];
    end.which = r;
    end.alive = look.locks.held_by_other(byte_of(r));
    inhabited = inhabited || end.alive;
    // relaxed, all of them: a copy of our own.
    const std::uint32_t word = entry.presence.load(std::memory_order_relaxed);
    if (is_presence(word)) {
      end.state = !end.alive && looks_alive(word) ? presence::dead : static_cast<presence>(word);
    }
    end.pid = entry.pid.load(std::memory_order_relaxed);
    end.parks = entry.parks.load(std::memory_order_relaxed);
    end.wakes = entry.wakes.load(std::memory_order_relaxed);
    end.cpu = counted_from_one(entry.cpu.load(std::memory_order_relaxed));
  }
  // Who enters takes its own lock before it leaves the gate. The gate was looked at first: had it been looked at last, an
  // end that entered in between would have been missed in both places.
  state.condition = inhabited || look.gate_held ? channel_condition::live : channel_condition::stale;
  state.type = name_in(header);
  state.type_version = header.message_version;
  state.message_bytes = header.message_bytes;
  state.message_alignment = header.message_alignment;
  state.capacity = header.capacity;
  state.segment_bytes = header.segment_bytes;
  state.creator_pid = header.creator_pid;
  state.barrier = header.barrier;
  state.node_asked = counted_from_one(header.node_asked.load(std::memory_order_relaxed));
  state.sent = header.lane.tail.load(std::memory_order_relaxed);
  state.taken = header.lane.head.load(std::memory_order_relaxed);
  // The cursors of a live channel are not of one instant: the difference may come out beyond both bounds.
  const std::uint64_t difference = state.sent - state.taken;
  if (difference <= state.capacity) {
    state.depth = difference;
  } else {
    state.depth = static_cast<std::int64_t>(difference) < 0 ? 0 : state.capacity;
  }
  state.corrupt = !words_are_sound(header, state.condition == channel_condition::live);
  state.deposited = state.condition == channel_condition::stale && !state.corrupt && holds_a_deposit(header);
  return state;
}

/// What was handed over has no name by which it could be found, and nobody has to remove it.
void refuse_handed_over(const memory_name& name) {
  if (name.scheme != memory_scheme::handed_over) return;
  fail(errc::unknown_scheme, name.text() +
                                 ": expected a channel with a name of its own, found one that is handed over at "
                                 "a socket, and that goes with its ends");
}

}  // namespace

channel_state inspect(std::string_view name) {
  const memory_name parsed = parse_memory_name(name);
  refuse_handed_over(parsed);
  return judge(parsed, look_at_segment(parsed, sizeof(segment_header)));
}

std::vector<channel_state> list_channels() {
  std::vector<channel_state> found;
  for (auto& [name, size, link] : named_files()) {
    try {
      found.push_back(judge(name, link.empty() ? look_at_segment(name, sizeof(segment_header))
                                               : look_at_handed_over(name, link, sizeof(segment_header))));
    } catch (const std::system_error& error) {
      if (error.code() == errc::no_permission) {
        if (size < sizeof(segment_header)) continue;  // a semaphore, for instance
        channel_state& state = found.emplace_back();
        state.name = std::move(name);
        state.condition = channel_condition::no_permission;
        state.trouble = error.what();
      } else if (error.code() != errc::foreign_segment && error.code() != std::errc::no_such_file_or_directory) {
        throw;
      }
    }
  }
  return found;
}

void remove_channel(std::string_view name, removal which) {
  const memory_name parsed = parse_memory_name(name);
  refuse_handed_over(parsed);
  const std::string channel = parsed.text();
  const auto refuse_unless_removable = [&](const segment_look& look) {
    const channel_state state = judge(parsed, look);
    if (state.condition == channel_condition::other_version) fail(errc::version_mismatch, state.trouble);
    std::string living;
    for (const role r : {role::sender, role::receiver}) {
      // Asked of the kernel once more, because of a damaged segment nothing else is known.
      if (!look.locks.held_by_other(byte_of(r))) continue;
      const std::uint32_t pid = state.ends[static_cast<std::size_t>(r)].pid;
      living += (living.empty() ? "" : " and ") + std::string{"its "} + std::string{to_string(r)} + " in process " +
                (pid != 0 ? std::to_string(pid) : std::string{"unknown"});
    }
    if (!living.empty()) {
      fail(errc::end_in_use, channel + ": expected a channel in which nobody lives, found " + living);
    }
    if (which == removal::any || state.condition == channel_condition::live) return;
    if (state.condition == channel_condition::damaged) fail(errc::layout_mismatch, state.trouble);
    if (state.deposited) {
      fail(errc::layout_mismatch, channel + ": expected what a crash left, found " + std::to_string(state.depth) +
                                      " messages for a receiver that has yet to come");
    }
  };
  remove_segment(parsed, sizeof(segment_header), refuse_unless_removable);
}

}  // namespace strait
