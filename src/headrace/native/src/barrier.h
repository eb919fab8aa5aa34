// A barrier for teams whose cores are not theirs alone.
//
// A decoder step meets about ten times a layer, microseconds apart, so falling asleep each time costs more than the work between. But
// spinning until the others come, as OpenMP runtimes do, is fatal once another process wants a core: while this thread burns its share, the one it
// waits for is not running. So: spin for the length of an ordinary wait, then let others run, then sleep.
#pragma once

#include <atomic>
#include <cstdint>

#include <sched.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headrace {

class Barrier {
 public:
  // Returns when all `size` threads of the team have called it; what they wrote before is seen after.
  void wait(std::int64_t size) {
    if (size == 1) return;
    const std::uint32_t now = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(now + 1);
      if (sleepers_.load() != 0) wake();
      return;
    }
    for (int i = 0; i < SPINS; ++i) {
      if (passed(now)) return;
      relax();
    }
    for (int i = 0; i < YIELDS; ++i) {
      if (passed(now)) return;
      sched_yield();
    }
    // Sequentially consistent, as the store above: either the last thread sees a sleeper, or the sleeper sees the new round.
    sleepers_.fetch_add(1);
    while (!passed(now)) sleep(now);
    sleepers_.fetch_sub(1);
  }

 private:
  static constexpr int SPINS = 1000;  // some 20 to 50 microseconds
  static constexpr int YIELDS = 20;

  bool passed(std::uint32_t now) const { return round_.load() != now; }

  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

#if defined(__linux__)
  void sleep(std::uint32_t now) { syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0); }
  void wake() { syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
  void sleep(std::uint32_t) { sched_yield(); }
  void wake() {}
#endif

  alignas(64) std::atomic<std::uint32_t> round_{0};
  alignas(64) std::atomic<std::int64_t> arrived_{0};
  std::atomic<int> sleepers_{0};
};

}  // namespace headrace
