// Random words of a tile: Philox 4x32-10, kLanes / 2 counters side by side in 64-bit lanes.
#pragma once

#include "../../common/philox.h"
#include "load-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

constexpr int kWide = kLanes / 2;  // counters side by side: 2 kLanes elements
constexpr int kGroups = 2;

// The four words of kWide counters into two vectors, in block order.
MF_INLINE void store_words(vq c0, vq c1, vq c2, vq c3, uint32_t* out) {
  [[maybe_unused]] constexpr uint64_t kLow = 0xffffffffull;
#if defined(MF_USE_AVX512)
  const __m512i a = (__m512i)((c0 & kLow) | (c1 << 32)), b = (__m512i)((c2 & kLow) | (c3 << 32));
  store_u(out, (vu)_mm512_unpacklo_epi64(a, b));
  store_u(out + kLanes, (vu)_mm512_unpackhi_epi64(a, b));
#elif defined(MF_USE_AVX2)
  store_u(out, (vu)_mm256_blend_epi32((__m256i)c0, (__m256i)(c2 << 32), 0xaa));
  store_u(out + kLanes, (vu)_mm256_blend_epi32((__m256i)c1, (__m256i)(c3 << 32), 0xaa));
#else
  store_u(out, (vu)((c0 & kLow) | (c2 << 32)));
  store_u(out + kLanes, (vu)((c1 & kLow) | (c3 << 32)));
#endif
}

// Words of elements [4 first, 4 first + n), n rounded up to whole groups. out: [n + 64].
static void philox_blocks(uint64_t first, int n, uint64_t stream, uint64_t seed, uint32_t* out) {
  const uint64_t high = first >> 32;
  const uint32_t s0 = (uint32_t)stream, s1 = (uint32_t)(stream >> 32);
  uint32_t k0[10], k1[10];
  vq key0[10], key1[10];
  for (int r = 0; r < 10; ++r) {
    k0[r] = (uint32_t)seed + (uint32_t)r * kPhiloxW0;
    k1[r] = (uint32_t)(seed >> 32) + (uint32_t)r * kPhiloxW1;
    key0[r] = (vq){} + (uint64_t)k0[r], key1[r] = (vq){} + (uint64_t)k1[r];
  }
  // What does not depend on the low half of the counter: half of the first two rounds.
  const uint64_t q1 = (uint64_t)s0 * kPhiloxM1;
  const uint32_t a0 = (uint32_t)(q1 >> 32) ^ (uint32_t)high ^ k0[0];
  const uint64_t q0 = (uint64_t)a0 * kPhiloxM0;
  const vq first_c2 = (vq){} + (uint64_t)(s1 ^ k1[0]);
  const vq second_c0 = (vq){} + (uint64_t)((uint32_t)q1 ^ k0[1]);
  const vq second_c2 = (vq){} + (uint64_t)((uint32_t)(q0 >> 32) ^ k1[1]);
  const vq third_c2 = (vq){} + (uint64_t)((uint32_t)q0 ^ k1[2]);
  // Two groups of counters at a time: the rounds of one wait for each other.
  vq counter[kGroups];
  for (int g = 0; g < kGroups; ++g)
    for (int i = 0; i < kWide; ++i) {
#if defined(MF_USE_AVX512)  // so that the two halves of the result come out in order
      const int at = i / 2 + (i % 2) * (kWide / 2);
#else
      const int at = i;
#endif
      counter[g][i] = first + (uint64_t)(g * kWide + at);
    }
  for (int done = 0; done < n; done += kGroups * 2 * kLanes) {
    vq c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups], p0[kGroups], p1[kGroups];
    for (int g = 0; g < kGroups; ++g) {  // only the low halves of the lanes count
      p0[g] = multiply_wide(counter[g], kPhiloxM0);
      p1[g] = multiply_wide((p0[g] >> 32) ^ first_c2, kPhiloxM1);
      c0[g] = (p1[g] >> 32) ^ second_c0, c1[g] = p1[g], c2[g] = p0[g] ^ second_c2;
      counter[g] += kGroups * kWide;
    }
    for (int g = 0; g < kGroups; ++g) {
      p0[g] = multiply_wide(c0[g], kPhiloxM0), p1[g] = multiply_wide(c2[g], kPhiloxM1);
      c0[g] = (p1[g] >> 32) ^ (c1[g] ^ key0[2]), c2[g] = (p0[g] >> 32) ^ third_c2;
      c1[g] = p1[g], c3[g] = p0[g];
    }
#pragma GCC unroll 7
    for (int r = 3; r < 10; ++r)
      for (int g = 0; g < kGroups; ++g) {
        p0[g] = multiply_wide(c0[g], kPhiloxM0), p1[g] = multiply_wide(c2[g], kPhiloxM1);
        c0[g] = (p1[g] >> 32) ^ (c1[g] ^ key0[r]), c2[g] = (p0[g] >> 32) ^ (c3[g] ^ key1[r]);
        c1[g] = p1[g], c3[g] = p0[g];
      }
    for (int g = 0; g < kGroups; ++g)
      store_words(c0[g], c1[g], c2[g], c3[g], out + done + g * 2 * kLanes);
  }
}

// Words of elements [flat, flat + n) in block order, n <= kTile, 0xffffffff (never kept) up to the
// padding. buffer: [2 (kTile + 64)].
static const uint32_t* draw_words(uint64_t flat, int n, uint64_t stream, uint64_t seed,
                                  uint32_t* buffer) {
  constexpr int kRoom = kTile + 64;
  const uint64_t first = flat / 4, last = (flat + (uint64_t)n) / 4;
  const int skip = (int)(flat % 4);
  if (first >> 32 != last >> 32) {  // the counter's halves carry into each other
    for (int i = 0; i < n; ++i) {
      uint32_t words[4];
      philox((flat + (uint64_t)i) / 4, stream, seed, words);
      buffer[place(i)] = words[(flat + (uint64_t)i) % 4];
    }
  } else if (skip == 0) {
    philox_blocks(first, n, stream, seed, buffer);
  } else {  // a row that begins within a counter: into memory order, and from there into blocks
    float* in_order = (float*)(void*)(buffer + kRoom);
    philox_blocks(first, skip + n, stream, seed, buffer);
    in_memory_order((const float*)(const void*)buffer, (int)padded(skip + n), in_order);
    for (int i = 0; i < n; i += kSumLanes)
      each_part([&](auto part) MF_LAMBDA {
        constexpr int H = decltype(part)::value;
        store_u(buffer + i + H * kLanes, (vu)part_of<H>(in_order + skip + i));
      });
  }
  for (int i = n; i < padded(n); ++i) buffer[place(i)] = 0xffffffffu;
  return buffer;
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
