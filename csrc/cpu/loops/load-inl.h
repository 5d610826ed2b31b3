// A tile of one tensor into float32, in blocks; what is not finite is traced to its source.
#pragma once

#include "../work.h"
#include "block-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

MF_INLINE int64_t padded(int64_t n) { return (n + kTilePad - 1) & -(int64_t)kTilePad; }
MF_INLINE int imin(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

// Bytes ahead of the element at hand. K + 1 streams, a tile of each in turn, are too many for the
// hardware's prefetchers: without this, most of the time goes into waiting for lines (AMD Zen 3,
// 2026).
constexpr int64_t kPrefetch = 1024;

template <int N>
struct Int {
  static constexpr int value = N;
};
#define MF_LAMBDA __attribute__((always_inline))

// body(Int<part>) for the parts of a block.
template <class Body>
MF_INLINE void each_part(Body&& body) {
  body(Int<0>());
  if constexpr (kParts > 1) body(Int<1>());
  if constexpr (kParts > 2) body(Int<2>()), body(Int<3>());
}

// body(16 elements of `source`, index of the first): the last ones padded with zeros.
template <class E, class Body>
MF_INLINE void each_block(const E* source, int64_t n, Body&& body) {
  constexpr int kLine = 64 / (int)sizeof(E);  // elements per cache line
  const int64_t full = n & -(int64_t)kSumLanes;
  int64_t i = 0;
  for (; i + kLine <= full; i += kLine) {
    __builtin_prefetch((const char*)(source + i) + kPrefetch);
    for (int j = 0; j < kLine; j += kSumLanes) body(source + i + j, i + j);
  }
  for (; i < full; i += kSumLanes) body(source + i, i);
  if (full < n) {
    E rest[kSumLanes] = {};
    __builtin_memcpy(rest, source + full, (size_t)(n - full) * sizeof(E));
    body(rest, full);
  }
}

// out = source - base. True where some of it is not finite, if CHECK.
template <class T, bool HAS_BASE, bool CHECK>
static bool load_as(const typename T::type* source, const float* base, int64_t n, float* out) {
  vi top = splat_i(0);
  each_block(source, n, [&](const typename T::type* p, int64_t i) MF_LAMBDA {
    each_part([&](auto part) MF_LAMBDA {
      constexpr int H = decltype(part)::value;
      vf x = T::template part<H>(p);
      if (HAS_BASE) x -= load(base + i + H * kLanes);
      if (CHECK) top = max_i(top, abs_bits(x));
      store(out + i + H * kLanes, x);
    });
  });
  return CHECK && any(top >= (int32_t)kInfBits);
}

template <class T, bool CHECK>
static bool load_of(const void* data, const float* base, int64_t start, int n, float* out) {
  const typename T::type* p = (const typename T::type*)data + start;
  return base ? load_as<T, true, CHECK>(p, base, n, out)
              : load_as<T, false, CHECK>(p, base, n, out);
}

template <bool CHECK>
static bool load_tile(const void* data, int dtype, const float* base, int64_t start, int n,
                      float* out) {
  if (dtype == MF_BF16) return load_of<Bf16, CHECK>(data, base, start, n, out);
  if (dtype == MF_F16) return load_of<F16, CHECK>(data, base, start, n, out);
  return load_of<F32, CHECK>(data, base, start, n, out);
}

MF_INLINE float element(const void* data, int dtype, int64_t i) {
  if (dtype == MF_F32) return ((const float*)data)[i];
  const uint16_t h = ((const uint16_t*)data)[i];
  return dtype == MF_BF16 ? bf16_to_float(h) : f16_to_float(h);
}

// First NaN or infinity of [start, start + n) into *first, if it comes before what is there.
static void note_nonfinite(const void* data, int dtype, int64_t start, int n, int64_t* first) {
  for (int64_t i = start; i < start + n && i < *first; ++i)
    if ((bits_of(element(data, dtype, i)) & kAbsMask) >= kInfBits) *first = i;
}

// The base of the tile into s.base; null where there is none.
MF_INLINE const float* load_base(const Work& w, Scratch& s, int64_t start, int n) {
  if (!w.job->base) return nullptr;
  load_tile<false>(w.job->base, w.job->base_dtype, nullptr, start, n, s.base);
  return s.base;
}

// A tile of expert k is not finite: is it the expert, or the base?
static void trace_expert(const Work& w, Scratch& s, int k, int64_t start, int n) {
  const mf_expert& e = w.experts[k];
  note_nonfinite(e.data, e.dtype, start, n, &s.nonfinite[k]);
  if (w.job->base) note_nonfinite(w.job->base, w.job->base_dtype, start, n, &s.base_nonfinite);
}

static void trace_experts(const Work& w, Scratch& s, int64_t start, int n) {
  for (int k = 0; k < w.k; ++k) trace_expert(w, s, k, start, n);
}

// Raw task vector of expert k. One that is not finite is traced to its source, here or, where row
// statistics are taken, by its norm.
MF_INLINE void load_tau(const Work& w, Scratch& s, int k, const float* base, int64_t start, int n,
                        float* tau) {
  const mf_expert& e = w.experts[k];
  if (w.m) {
    load_tile<false>(e.data, e.dtype, base, start, n, tau);
  } else if (load_tile<true>(e.data, e.dtype, base, start, n, tau)) {
    trace_expert(w, s, k, start, n);
  }
}

// A tile of blocks in memory order.
MF_INLINE void in_memory_order(const float* blocks, int n, float* out) {
  const int full = n & -kSumLanes;
  vf x[kParts];
  for (int i = 0; i < full; i += kSumLanes) {
    for (int h = 0; h < kParts; ++h) x[h] = load(blocks + i + h * kLanes);
    put_parts(out + i, x);
  }
  for (int i = full; i < n; ++i) out[i] = blocks[place(i)];
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
