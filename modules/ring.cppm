module;
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <span>
#include <type_traits>
#include <utility>
export module strait.ring;

/// The one lane algorithm: single producer, single consumer, bounded. Every channel is made of lanes.
///
/// Two monotonic 64-bit cursors that never wrap: `tail` counts what was published, `head` what was consumed.
///
/// | shared word      | written by | read by  | what a SIGKILL between two stores leaves                            |
/// |------------------|------------|----------|---------------------------------------------------------------------|
/// | slot[n & mask]   | producer   | consumer | rubbish that no published `tail` covers: nobody reads it            |
/// | copies[n & 1]    | producer   | consumer | a torn copy of an unpublished message: nobody believes it           |
/// | tail             | producer   | consumer | one aligned store: the message is published or it is not            |
/// | head             | consumer   | producer | up to an eighth of the ring consumed but not released: sent again   |
///
/// The lane waits for nothing and calls nobody; `strait.park` and `strait.endpoint` add that.
export namespace strait {

/// Distance between two things that different CPUs write: two 64-byte lines, because the adjacent-line prefetcher of
/// x86 fetches lines in pairs. Fixed, because it is part of the layout in shared memory.
inline constexpr std::size_t line_padding = 128;

/// Tells the CPU that this is a spin loop.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
inline void cpu_relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // YIELD is a no-op on most cores; ISB is what spin loops use there
#endif
}

/// Fetches the line of `address` for reading, without waiting for it.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
inline void prefetch_for_reading(const void* address) noexcept {
  __builtin_prefetch(address, 0, 3);
}

/// Fetches the line of `address` for writing, taking it from the CPU that has it, without waiting for it.
///
/// Waits: never. Allocates: never. Errors: none. Complexity: constant.
inline void prefetch_for_writing(const void* address) noexcept {
#if defined(__x86_64__)
  // The builtin emits a read prefetch for baseline x86-64, which would leave the line shared and the store waiting.
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address, 1, 3);
#endif
}

/// One message's place in a lane: as large as the message, constructed by the producer, taken by the consumer.
///
/// Waits: never. Allocates: never. Errors: what the message's constructor throws. Complexity: that of the constructor.
template <class T>
class native_slot {
 public:
  template <class U>
  void put(U&& value) noexcept(std::is_nothrow_constructible_v<T, U>) {
    ::new (static_cast<void*>(bytes_)) T(std::forward<U>(value));
  }

  /// The message, which stays.
  [[nodiscard]] T copy() const noexcept
    requires std::is_trivially_copyable_v<T>
  {
    return *std::launder(reinterpret_cast<const T*>(bytes_));
  }

  [[nodiscard]] T take() noexcept(std::is_nothrow_move_constructible_v<T>) {
    if constexpr (std::is_trivially_copyable_v<T>) {
      return copy();
    } else {
      T* message = std::launder(reinterpret_cast<T*>(bytes_));
      struct destroy {
        T* message;
        ~destroy() { message->~T(); }
      } guard{message};
      return std::move(*message);
    }
  }

 private:
  alignas(T) std::byte bytes_[sizeof(T)];
};

/// What the lane is built on in production. The test scheduler puts its own in this place and so runs the same source.
struct native_atomics {
  template <class T>
  using atomic = std::atomic<T>;
  template <class T>
  using slot = native_slot<T>;
};

static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "a cursor in shared memory must not hide a lock");
static_assert(sizeof(std::atomic<std::uint64_t>) == 8);

/// Bytes of a message that fit beside `tail` in its 64-byte line, twice.
inline constexpr std::size_t line_message_bytes = 24;

/// Whether a lone message of this type travels in the line that announces it: one cache-line transfer instead of two.
template <class T>
inline constexpr bool travels_in_line = std::is_trivially_copyable_v<T> && sizeof(T) <= line_message_bytes;

/// The shared words of a lane. Zero is its valid first state.
template <class Atomics = native_atomics>
struct lane_control {
  template <class T>
  using atomic = typename Atomics::template atomic<T>;

  /// The producer's line: `tail` and, beside it, copies of the newest small messages.
  alignas(line_padding) atomic<std::uint64_t> tail{};
  std::array<std::array<atomic<std::uint64_t>, line_message_bytes / 8>, 2> copies{};

  /// The consumer's line.
  alignas(line_padding) atomic<std::uint64_t> head{};
};
static_assert(sizeof(lane_control<>) == 2 * line_padding);
static_assert(offsetof(lane_control<>, head) == line_padding);

/// The producer's private side of a lane. Lives in the producer's own memory; one thread at a time.
///
/// Waits: never. Allocates: never. Errors: `corrupt()`, and what the message's constructor throws. Complexity: constant.
template <class Atomics = native_atomics>
class lane_producer {
 public:
  lane_producer() = default;

  /// Takes up the lane where its last producer left it. `capacity` is a power of two.
  lane_producer(lane_control<Atomics>& control, std::uint64_t capacity) noexcept
      : control_{&control}, mask_{capacity - 1} {
    // relaxed: a dead or closed producer's cursor; whoever attached us ordered us after it (the gate's lock).
    tail_ = control.tail.load(std::memory_order_relaxed);
    look();
  }

  /// Free slots, as far as known without looking at the consumer's line.
  [[nodiscard]] std::uint64_t known_room() const noexcept { return limit_ - tail_; }
  /// The number of the first message for which no room is known.
  [[nodiscard]] std::uint64_t room_until() const noexcept { return limit_; }

  /// Looks at the consumer's line and returns the free slots; 0, with `corrupt()` set, when `head` is impossible.
  std::uint64_t look() noexcept {
    // acquire: pairs with lane_consumer::publish_head. Without it, this thread's store into a slot could become
    // visible before the consumer's read of the old message in it was done.
    const std::uint64_t head = control_->head.load(std::memory_order_acquire);
    if (tail_ - head > capacity()) [[unlikely]] {
      corrupt_ = true;
      limit_ = tail_;
      return 0;
    }
    limit_ = head + capacity();
    return known_room();
  }

  /// Puts one message and publishes it. The caller made sure of `known_room() > 0`.
  template <class T, class U>
  void push(typename Atomics::template slot<T>* slots, U&& value) {
    // Read once: to the compiler, the message's bytes might be those of our own members.
    const std::uint64_t at = tail_;
    lane_control<Atomics>& control = *control_;
    if constexpr (travels_in_line<T>) {
      const T message = std::forward<U>(value);
      std::array<std::uint64_t, words<T>> raw{};
      std::memcpy(raw.data(), &message, sizeof(T));
      slots[at & mask_].put(message);
      // After the slot, and right before `tail`: a consumer that polls takes the line away between two stores into it
      // when there is time, and the second then waits for the line to come back.
      auto& copy = control.copies[at & 1];
      for (std::size_t i = 0; i < words<T>; ++i) {
        // release: pairs with the acquire in lane_consumer::take. It keeps the store of `tail` that published the
        // previous message before this store, so that a consumer which reads a word of this copy also sees that
        // `tail` moved on and discards what it read. Without it, a torn copy could be believed.
        copy[i].store(raw[i], std::memory_order_release);
      }
    } else {
      slots[at & mask_].put(std::forward<U>(value));
    }
    // release: as in publish.
    control.tail.store(at + 1, std::memory_order_release);
    // After it, so that the copy and `tail`, in one line, leave the store buffer together.
    tail_ = at + 1;
  }

  /// Where message number `tail() + offset` goes; for batches, which end with `publish(n)`.
  template <class T>
  [[nodiscard]] typename Atomics::template slot<T>& slot(typename Atomics::template slot<T>* slots,
                                                         std::uint64_t offset) const noexcept {
    return slots[(tail_ + offset) & mask_];
  }

  /// Publishes `n` messages with one store. A batch of one goes through `push`: a consumer that saw `tail` move by
  /// exactly one expects the copy beside it.
  void publish(std::uint64_t n) noexcept {
    tail_ += n;
    // release: pairs with the acquire in lane_consumer::look. Without it, the consumer could read a slot before the
    // message is in it.
    control_->tail.store(tail_, std::memory_order_release);
  }

  [[nodiscard]] lane_control<Atomics>& control() const noexcept { return *control_; }
  [[nodiscard]] std::uint64_t tail() const noexcept { return tail_; }
  [[nodiscard]] std::uint64_t capacity() const noexcept { return mask_ + 1; }
  [[nodiscard]] bool corrupt() const noexcept { return corrupt_; }

 private:
  template <class T>
  static constexpr std::size_t words = (sizeof(T) + 7) / 8;

  std::uint64_t tail_ = 0;
  lane_control<Atomics>* control_ = nullptr;
  /// `capacity - 1`.
  std::uint64_t mask_ = std::uint64_t{0} - 1;
  /// Where `tail` would meet the newest `head` that was seen.
  std::uint64_t limit_ = 0;
  bool corrupt_ = false;
};

/// The consumer's private side of a lane. Lives in the consumer's own memory; one thread at a time.
///
/// Waits: never. Allocates: never. Errors: `corrupt()`, and what the message's constructor throws. Complexity: constant.
template <class Atomics = native_atomics>
class lane_consumer {
 public:
  lane_consumer() = default;

  /// Takes up the lane where its last consumer released it. `capacity` is a power of two.
  lane_consumer(lane_control<Atomics>& control, std::uint64_t capacity) noexcept
      : control_{&control}, mask_{capacity - 1}, stride_{capacity / 8 > 0 ? capacity / 8 : 1} {
    // relaxed: see lane_producer's constructor.
    head_ = control.head.load(std::memory_order_relaxed);
    tail_seen_ = head_;
    published_ = head_;
  }

  /// Messages that are there, as far as known without looking at the producer's line.
  [[nodiscard]] std::uint64_t known() const noexcept { return tail_seen_ - head_; }
  /// The number of the first message that `advance` and `last` are not enough for: it is not known, may lie beside
  /// `tail`, or completes an eighth of the ring.
  [[nodiscard]] std::uint64_t plain_until() const noexcept {
    const std::uint64_t release = published_ + stride_ - 1;
    return lone_ ? head_ : tail_seen_ < release ? tail_seen_ : release;
  }

  /// Looks at the producer's line and returns the messages there; 0, with `corrupt()` set, when `tail` is impossible.
  std::uint64_t look() noexcept {
    // acquire: pairs with lane_producer::publish; see there.
    const std::uint64_t tail = control_->tail.load(std::memory_order_acquire);
    // Nothing new: what a spinning consumer sees again and again, so it writes nothing.
    if (tail == tail_seen_ && attached_) return known();
    const std::uint64_t there = tail - head_;
    if (there > capacity()) [[unlikely]] {
      corrupt_ = true;
      return 0;
    }
    // Exactly one message after an empty lane: it was published alone, so its copy lies beside `tail`. When messages
    // were still known, or to a consumer that has just attached, it may as well be the last of a batch.
    lone_ = there == 1 && known() == 0 && attached_;
    attached_ = true;
    tail_seen_ = tail;
    return there;
  }

  /// Forgets for now the messages from number `end` on; returns how many are left. The next look finds them again.
  std::uint64_t limit(std::uint64_t end) noexcept {
    if (end - head_ < known()) {
      tail_seen_ = end;
    } else if (end < head_) {
      tail_seen_ = head_;
    }
    if (known() != 1) lone_ = false;
    return known();
  }

  /// Takes the oldest message. The caller made sure of `known() > 0`.
  template <class T>
  [[nodiscard]] T take(typename Atomics::template slot<T>* slots) noexcept(std::is_nothrow_move_constructible_v<T>) {
    if constexpr (travels_in_line<T>) {
      if (lone_) {
        lone_ = false;
        std::array<std::uint64_t, words<T>> raw;
        const auto& copy = control_->copies[head_ & 1];
        for (std::size_t i = 0; i < words<T>; ++i) {
          // acquire: pairs with the release in lane_producer::push. It keeps the load of `tail` below behind this one.
          raw[i] = copy[i].load(std::memory_order_acquire);
        }
        // The producer writes this copy again only after it has stored `tail = head_ + 2`. So `tail` unchanged means
        // that every word above belonged to our message. relaxed: the words were loaded with acquire.
        if (control_->tail.load(std::memory_order_relaxed) == head_ + 1) {
          ++head_;
          union {
            T message;
          } out;
          std::memcpy(static_cast<void*>(&out), raw.data(), sizeof(T));
          return out.message;
        }
      }
    }
    return slots[head_++ & mask_].take();
  }

  /// Takes the oldest message, of those before `plain_until()`, and leaves it in its slot ...
  void advance() noexcept { ++head_; }
  /// ... where it lies as long as `head` is not published.
  template <class T>
  [[nodiscard]] const typename Atomics::template slot<T>& last(
      const typename Atomics::template slot<T>* slots) const noexcept {
    return slots[(head_ - 1) & mask_];
  }

  /// Where message number `head() + offset` lies; for batches, which end with `skip(n)`.
  template <class T>
  [[nodiscard]] typename Atomics::template slot<T>& slot(typename Atomics::template slot<T>* slots,
                                                         std::uint64_t offset) const noexcept {
    return slots[(head_ + offset) & mask_];
  }

  /// Counts `n` messages as taken from their slots.
  void skip(std::uint64_t n) noexcept {
    lone_ = false;
    head_ += n;
  }

  /// Whether an eighth of the ring waits to be released. Releasing less often than for each message keeps the
  /// consumer's line where the consumer writes it.
  [[nodiscard]] bool release_due() const noexcept { return head_ - published_ >= stride_; }
  [[nodiscard]] bool release_pending() const noexcept { return head_ != published_; }

  /// Releases the slots of everything taken.
  void publish_head() noexcept {
    published_ = head_;
    // release: pairs with the acquire in lane_producer::look; see there.
    control_->head.store(head_, std::memory_order_release);
  }

  [[nodiscard]] lane_control<Atomics>& control() const noexcept { return *control_; }
  [[nodiscard]] std::uint64_t head() const noexcept { return head_; }
  [[nodiscard]] std::uint64_t capacity() const noexcept { return mask_ + 1; }
  [[nodiscard]] bool corrupt() const noexcept { return corrupt_; }

 private:
  template <class T>
  static constexpr std::size_t words = (sizeof(T) + 7) / 8;

  lane_control<Atomics>* control_ = nullptr;
  /// `capacity - 1`.
  std::uint64_t mask_ = std::uint64_t{0} - 1;
  std::uint64_t stride_ = 1;
  std::uint64_t head_ = 0;
  std::uint64_t tail_seen_ = 0;
  std::uint64_t published_ = 0;
  bool lone_ = false;
  /// Whether a look has been made: only then does `known() == 0` mean that the lane was seen empty.
  bool attached_ = false;
  bool corrupt_ = false;
};

}  // namespace strait
