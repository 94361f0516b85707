// What the CPU sources share.
#pragma once

// One library for every x86-64: the loader picks the widest clone this processor has. They agree bit
// for bit, because contraction into FMA is off. (A sanitiser is not yet up when the loader picks.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GI_SANITIZED)
#define GI_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GI_CLONES
#endif

// A clone vectorises only what is inlined into it.
#define GI_INLINE inline __attribute__((always_inline))
