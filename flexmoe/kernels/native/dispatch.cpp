// The library of a wheel: attention.cpp is compiled for several sets of instructions, its functions with the set's name behind
// their own (portable.py). Here each gets its name back, for the best set that the CPU has: the loader asks once, when it binds it.
//
// FLEXMOE_FUNCTIONS lists the functions as X(name).

namespace {

using Any = void (*)();

Any best(Any base, Any avx2, Any avx512, Any bf16, Any amx) {
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512cd");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16"))
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") ? amx : bf16;
  return has_avx512 ? avx512 : has_avx2 ? avx2 : base;
}

}  // namespace

#define X(name)                                                                                            \
  extern "C" {                                                                                             \
  void name##_base();                                                                                      \
  void name##_avx2();                                                                                      \
  void name##_avx512();                                                                                    \
  void name##_bf16();                                                                                      \
  void name##_amx();                                                                                       \
  __attribute__((visibility("hidden"))) Any resolve_##name() {                                             \
    return best(name##_base, name##_avx2, name##_avx512, name##_bf16, name##_amx);                         \
  }                                                                                                        \
  void name() __attribute__((ifunc("resolve_" #name)));                                                    \
  }
FLEXMOE_FUNCTIONS
