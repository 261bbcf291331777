#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace fastbandit {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512vpopcntdq") ? Isa::avx512vpopcntdq : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa chosen_isa() {
  const Isa best = best_isa();
  const char* wish = std::getenv("FASTBANDIT_CPU");
  if (wish == nullptr) return best;
  for (const Isa lower : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512vpopcntdq})
    if (std::strcmp(wish, isa_name(lower)) == 0 && lower <= best) return lower;
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512vpopcntdq: return "avx512vpopcntdq";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::baseline: break;
  }
  return "baseline";
}

}  // namespace fastbandit

// Read by fastbandit.info through ctypes.
extern "C" __attribute__((visibility("default"))) const char* fastbandit_cpu_isa() {
  return fastbandit::isa_name(fastbandit::isa());
}
