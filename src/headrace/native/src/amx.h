// Intel's matrix tiles (AMX), where the compiler targets a processor that has them and the system lets us use them.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__)
#define HEADRACE_AMX 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace headrace {

// Whether this process may use tiles. Linux grants their 8 KiB of state on request, once per process.
inline bool may_use_tiles() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
}

// Stores to `p` are made before, and not moved behind: to the compiler the tile intrinsics read no memory.
inline void publish(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// What LDTILECFG reads: rows and bytes per row of each tile.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, int tile_rows) {
    rows[tile] = static_cast<std::uint8_t>(tile_rows);
    row_bytes[tile] = 64;
  }
};

}  // namespace headrace

#endif
