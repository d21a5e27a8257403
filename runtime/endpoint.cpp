module;
#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
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
module strait.endpoint;

namespace strait {
namespace {

constexpr std::size_t default_capacity = 1024;

constexpr std::uint64_t byte_of(role r) noexcept { return gate_byte + 1 + static_cast<std::uint64_t>(r); }

bool looks_alive(std::uint32_t word) noexcept {
  const auto now = static_cast<presence>(word);
  return now == presence::awake || now == presence::thread_parked || now == presence::hub_parked;
}

std::uint64_t round_up(std::uint64_t value, std::uint64_t step) noexcept { return (value + step - 1) / step * step; }

std::uint64_t slots_offset_for(std::uint32_t alignment) noexcept {
  return round_up(sizeof(segment_header), std::max<std::uint64_t>(alignment, line_padding));
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

std::string quoted(std::string_view name) { return name.empty() ? "unnamed" : '"' + std::string{name} + '"'; }

std::string_view name_in(const segment_header& header) {
  return {header.message_name, ::strnlen(header.message_name, sizeof header.message_name)};
}

std::string describe(std::string_view name, std::uint32_t version, std::uint32_t bytes, std::uint32_t alignment) {
  return "type " + quoted(name) + " version " + std::to_string(version) + " of " + std::to_string(bytes) +
         " bytes aligned to " + std::to_string(alignment);
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

/// Declares the end dead if it looks alive and nobody holds its lock. The gate must be held.
bool declare_if_dead(segment_header& header, role who, const file_locks& locks) noexcept {
  end_entry& entry = header.ends[static_cast<std::size_t>(who)];
  // relaxed: entering and declaring are ordered by the gate.
  if (!looks_alive(entry.presence.load(std::memory_order_relaxed)) || locks.held_by_other(byte_of(who))) return false;
  // relaxed: the release of `deaths` covers it.
  entry.died_at.store(header.lane.tail.load(std::memory_order_relaxed), std::memory_order_relaxed);
  entry.presence.store(static_cast<std::uint32_t>(presence::dead), std::memory_order_relaxed);
  // release: pairs with the acquire in look_at_peer.
  entry.deaths.fetch_add(1, std::memory_order_release);
  return true;
}

}  // namespace

struct endpoint::private_channel {
  mapping memory;
  destroy_messages destroy = nullptr;
  segment_header* header = nullptr;

  ~private_channel() {
    // relaxed: the shared_ptr's count ordered both ends before us.
    if (destroy != nullptr && header != nullptr) {
      destroy(memory.data() + header->slots_offset, header->capacity - 1,
              header->lane.head.load(std::memory_order_relaxed), header->lane.tail.load(std::memory_order_relaxed));
    }
  }
};

void endpoint::adopt(segment_header& header, role mine, const channel_options& options) noexcept {
  header_ = &header;
  role_ = mine;
  capacity_ = header.capacity;
  slots_offset_ = header.slots_offset;
  barrier_ = header.barrier;
  policy_ = options.wait;
  longest_spin_ = options.longest_spin.count();
  spin_ = spin_budget{options.wait, std::min<std::int64_t>(longest_spin_, 10'000), longest_spin_};
  fork_generation_ = fork_generation();
}

std::pair<std::unique_ptr<endpoint>, std::unique_ptr<endpoint>> endpoint::make_private(const message_shape& shape,
                                                                                       const channel_options& options,
                                                                                       destroy_messages destroy) {
  const std::uint64_t capacity = checked_capacity("private channel", options.capacity, shape);
  auto shared = std::make_shared<private_channel>();
  shared->memory = mapping::anonymous(slots_offset_for(shape.alignment) + capacity * shape.bytes, options.node);
  auto* header = ::new (static_cast<void*>(shared->memory.data())) segment_header{};
  const bool barrier = options.order == ordering::automatic && register_barrier(store_load::by_process_barrier);
  fill_header(*header, shape, capacity, barrier ? store_load::by_process_barrier : store_load::by_fence);
  shared->header = header;
  shared->destroy = destroy;
  const auto make = [&](role mine) {
    std::unique_ptr<endpoint> made{new endpoint};
    made->adopt(*header, mine, options);
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
  const std::uint64_t capacity = checked_capacity(channel, options.capacity, shape);
  const bool registered = register_barrier(store_load::by_machine_barrier);
  const auto barrier =
      registered && options.order == ordering::automatic ? store_load::by_machine_barrier : store_load::by_fence;

  segment_plan plan;
  plan.bytes = slots_offset_for(shape.alignment) + capacity * shape.bytes;
  plan.mode = options.mode;
  plan.node = options.node;
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
    // What a crash left is no obstacle; an end that lives decides what the channel is.
    const auto refuse = [&](errc e, const std::string& expected, const std::string& found) {
      if (!inhabited) return verdict::replace;
      fail(e, channel + ": expected " + expected + ", found " + found);
    };
    if (size < header.segment_bytes) {
      return refuse(errc::truncated_segment, "a segment of " + std::to_string(header.segment_bytes) + " bytes",
                    std::to_string(size));
    }
    if (header.poisoned.load(std::memory_order_relaxed) != 0) {
      return refuse(errc::corrupt, "a sound channel", "one that was poisoned by an impossible value");
    }
    if (name_in(header) != shape.name.substr(0, sizeof header.message_name - 1) ||
        header.message_version != shape.version || header.message_bytes != shape.bytes ||
        header.message_alignment != shape.alignment) {
      return refuse(errc::type_mismatch, describe(shape.name, shape.version, shape.bytes, shape.alignment),
                    describe(name_in(header), header.message_version, header.message_bytes, header.message_alignment));
    }
    if (options.capacity && header.capacity != capacity) {
      return refuse(errc::layout_mismatch, "a capacity of " + std::to_string(capacity) + " messages",
                    std::to_string(header.capacity));
    }
    if (options.order == ordering::fence && header.barrier != store_load::by_fence) {
      return refuse(errc::layout_mismatch, "option order = fence", "order = automatic (membarrier)");
    }
    if (header.barrier == store_load::by_machine_barrier && !registered) {
      return refuse(errc::no_barrier, "a kernel that grants membarrier, or a channel made with option order = fence",
                    "neither");
    }
    if (options.open == open_mode::create && !inhabited) return verdict::replace;
    const auto& entry = header.ends[static_cast<std::size_t>(mine)];
    if (options.open != open_mode::create && locks.held_by_other(byte_of(mine))) {
      fail(errc::end_in_use, channel + ": expected no living " + std::string{to_string(mine)} + ", found one in process " +
                                 std::to_string(entry.pid.load(std::memory_order_relaxed)));
    }
    return verdict::enter;
  };

  made->segment_ = open_segment(made->name_, options.open, plan, sizeof(segment_header), examine, bytes_to_map);
  made->adopt(*std::launder(reinterpret_cast<segment_header*>(made->segment_.map.data())), mine, options);
  made->enter();
  return made;
}

void endpoint::enter() {
  file_locks& locks = segment_.locks;
  declare_if_dead(*header_, role_, locks);
  declare_if_dead(*header_, other(role_), locks);
  if (!locks.try_lock(byte_of(role_))) fail_errno(errno, text_ + ": locking this end's byte");
  const process_identity me = this_process();
  end_entry& mine = own();
  // relaxed, all of them: the presence below releases them.
  mine.process_high.store(me.high, std::memory_order_relaxed);
  mine.process_low.store(me.low, std::memory_order_relaxed);
  mine.doorbell.store(0, std::memory_order_relaxed);
  mine.pid.store(static_cast<std::uint32_t>(::getpid()), std::memory_order_relaxed);
  mine.incarnation.fetch_add(1, std::memory_order_relaxed);
  // Whoever comes to a dead peer is told once, like a survivor.
  const std::uint32_t deaths = peer().deaths.load(std::memory_order_relaxed);
  const bool found_dead =
      static_cast<presence>(peer().presence.load(std::memory_order_relaxed)) == presence::dead;
  deaths_seen_ = found_dead ? deaths - 1 : deaths;
  entered_ = true;
  // release: pairs with the acquire in look_at_peer.
  mine.presence.store(static_cast<std::uint32_t>(presence::awake), std::memory_order_release);
  // The peer may be waiting for somebody to come; it has to know whose lock to keep an eye on.
  const presence parked = claim_ring(peer_word(), barrier_);
  ring(parked);
  locks.unlock(gate_byte);
}

endpoint::~endpoint() { close(); }

void endpoint::close() noexcept {
  if (private_) {
    // release: pairs with the acquire in look_at_peer: everything sent comes before the end of the stream.
    own_word().store(static_cast<std::uint32_t>(presence::closed), std::memory_order_release);
    ring(claim_ring(peer_word(), barrier_));
    return;
  }
  // In a forked child the ends are the parent's; an end that never entered has nothing to leave.
  if (segment_.map.data() == nullptr || !entered_ || fork_generation_ != fork_generation()) return;
  unwatch_process(*this);
  // A hub that was destroyed while it was parked leaves its announcement, and the relay watches for its end.
  if (relay_) take_back(own_word());
  relay_.reset();
  segment_.locks.lock(gate_byte);
  // release: as above.
  own_word().store(static_cast<std::uint32_t>(presence::closed), std::memory_order_release);
  ring(claim_ring(peer_word(), barrier_));
  if (!segment_.locks.held_by_other(byte_of(other(role_)))) {
    // Messages for a receiver that has yet to come keep the name; otherwise the last one out removes it.
    const bool undelivered = header_->lane.tail.load(std::memory_order_relaxed) !=
                             header_->lane.head.load(std::memory_order_relaxed);
    const bool receiver_to_come =
        role_ == role::sender &&
        static_cast<presence>(peer_word().load(std::memory_order_relaxed)) == presence::vacant;
    if (!(undelivered && receiver_to_come)) remove_name(name_, segment_.locks);
  }
  // Closing the descriptor, in the destructor of segment_, drops this end's lock and the gate at once.
}

void endpoint::ring(presence parked) noexcept {
  if (parked == presence::thread_parked) {
    futex_wake(peer_word());
  } else if (parked == presence::hub_parked) {
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

void endpoint::poison() noexcept {
  // release: pairs with the acquire in look_at_peer.
  header_->poisoned.store(1, std::memory_order_release);
  ring(claim_ring(peer_word(), barrier_));
}

void endpoint::watch_peer() noexcept {
  const end_entry& them = peer();
  // relaxed: read again by look(); a replacement in between leaves the incarnation different, so we come back here.
  const std::uint32_t incarnation = them.incarnation.load(std::memory_order_relaxed);
  const process_identity process{them.process_high.load(std::memory_order_relaxed),
                                 them.process_low.load(std::memory_order_relaxed)};
  // Before the watch begins, because look() may run at once.
  const std::uint32_t before = watched_incarnation_.exchange(incarnation, std::memory_order_relaxed);
  if (process == this_process()) return;
  try {
    watch_process(process, *this);
  } catch (const std::system_error&) {
    // No thread to be had now: the incarnation stays unwatched, so the next look at the peer tries again.
    watched_incarnation_.store(before, std::memory_order_relaxed);
  }
}

bool endpoint::look() noexcept {
  // The sentry calls this between watch_process and unwatch_process; the owner uses the gate before and after, so that
  // the two never hold it together (a lock does not exclude its own description).
  if (!segment_.locks.try_lock(gate_byte)) return false;  // somebody enters or leaves: look again soon
  declare_if_dead(*header_, other(role_), segment_.locks);
  const end_entry& them = peer();
  // relaxed: ordered by the gate. Where another end holds the role by now, it has declared the death itself.
  const bool settled =
      !looks_alive(them.presence.load(std::memory_order_relaxed)) ||
      them.incarnation.load(std::memory_order_relaxed) != watched_incarnation_.load(std::memory_order_relaxed);
  segment_.locks.unlock(gate_byte);
  if (!settled) return false;
  // Wake whoever waits on this end, as the peer would have done. It may be asleep with a doorbell that only the dead
  // process had, so this is done for a replaced peer, too.
  const presence parked = claim_ring(own_word(), barrier_);
  if (parked == presence::thread_parked) {
    futex_wake(own_word());
  } else if (parked == presence::hub_parked) {
    doorbell::ring(own().doorbell.load(std::memory_order_relaxed));
  }
  return true;
}

void endpoint::announce_hub(std::uint64_t doorbell_number) {
  end_entry& mine = own();
  // relaxed: the announcement's barrier orders it before anybody reads it.
  mine.doorbell.store(doorbell_number, std::memory_order_relaxed);
  hub_waits_on_futex_ = false;
  if (!private_) {
    const end_entry& them = peer();
    // acquire: the peer's identity was written before.
    const bool alive = looks_alive(them.presence.load(std::memory_order_acquire));
    const std::uint32_t incarnation = them.incarnation.load(std::memory_order_relaxed);
    const process_identity process{them.process_high.load(std::memory_order_relaxed),
                                   them.process_low.load(std::memory_order_relaxed)};
    if (!alive) {
      hub_waits_on_futex_ = true;  // whoever comes does not have our doorbell
    } else if (offered_doorbell_ != doorbell_number || offered_incarnation_ != incarnation) {
      hub_waits_on_futex_ = !offer_doorbell(process, doorbell_number);
      if (!hub_waits_on_futex_) {
        offered_doorbell_ = doorbell_number;
        offered_incarnation_ = incarnation;
      }
    }
    if (hub_waits_on_futex_ && (!relay_ || relay_doorbell_ != doorbell_number)) {
      relay_ = std::make_unique<futex_relay>(own_word(), doorbell_number);
      relay_doorbell_ = doorbell_number;
    }
  }
  announce(own_word(), hub_waits_on_futex_ ? presence::thread_parked : presence::hub_parked);
}

void endpoint::hub_sleeps() noexcept {
  if (hub_waits_on_futex_) relay_->arm();
}

}  // namespace strait
