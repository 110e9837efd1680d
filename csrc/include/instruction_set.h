// The instruction set that this process uses: the best one that the processor has, or less if
// ATEN_CPU_CAPABILITY (torch's own switch: default, avx2, avx512) says so.
#pragma once

#include <cstdlib>
#include <cstring>

namespace ensemw2s {

enum class InstructionSet { kPlain, kAvx2, kAvx512 };

inline InstructionSet detect_instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (limit && std::strcmp(limit, "default") == 0) return InstructionSet::kPlain;
  __builtin_cpu_init();
  // __builtin_cpu_supports knows no "f16c"; every processor with AVX2 has it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && !(limit && std::strcmp(limit, "avx2") == 0)) return InstructionSet::kAvx512;
  if (avx2) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPlain;
}

inline InstructionSet instruction_set() {
  static const InstructionSet chosen = detect_instruction_set();
  return chosen;
}

}  // namespace ensemw2s
