// Looks at the processor once, outside of all loops. On x86-64 the compiler's builtins check the processor and the
// operating system's support for the registers. AMX also needs permission from Linux, which is asked for here.
#include "choose.h"

#include <stdexcept>

#include "../trak_fast.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace trak_fast {

extern const Backend amx_backend, avx512_bf16_backend, avx512_backend, avx2_backend, portable_backend;

namespace {

struct Candidate {
  const Backend* backend;
  bool usable;
};

#if defined(__x86_64__)
struct Leaf7 {
  unsigned eax, ebx, ecx, edx;
  explicit Leaf7(unsigned subleaf) : eax(0), ebx(0), ecx(0), edx(0) {
    __get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx);
  }
};

// Asks Linux (5.16 or later) for tile registers in this process: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool amx_allowed() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::vector<Candidate> find_candidates() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && (Leaf7(1).eax >> 5 & 1) != 0;
  const Leaf7 leaf(0);
  const bool gfni = (leaf.ecx >> 8 & 1) != 0, amx_bf16 = (leaf.edx >> 22 & 1) != 0, tiles = (leaf.edx >> 24 & 1) != 0;
  const bool amx = avx512 && gfni && amx_bf16 && tiles && amx_allowed();
  return {{&amx_backend, amx},
          {&avx512_bf16_backend, bf16},
          {&avx512_backend, avx512},
          {&avx2_backend, avx2},
          {&portable_backend, true}};
}
#else
std::vector<Candidate> find_candidates() { return {{&portable_backend, true}}; }
#endif

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> found = find_candidates();
  return found;
}

std::string join(const std::vector<std::string>& names) {
  std::string all;
  for (const auto& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& c : candidates()) {
    if (c.usable) names.emplace_back(c.backend->name);
  }
  return names;
}

std::vector<std::string> built_instruction_sets() {
  std::vector<std::string> names;
  for (const auto& c : candidates()) names.emplace_back(c.backend->name);
  return names;
}

const Backend& choose_backend(const std::string& name) {
  for (const auto& c : candidates()) {
    if (c.usable && (name.empty() || name == c.backend->name)) return *c.backend;
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not one that this processor has: " + join(instruction_sets()));
}

}  // namespace trak_fast
