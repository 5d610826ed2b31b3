// One pass of a search: how many magnitudes lie above a bracket, and which lie inside it.
#pragma once

#include "kth-inl.h"
#include "load-inl.h"

namespace mf {
namespace MF_ISA_NAMESPACE {
namespace {

// Writes the magnitudes in [low, high] of an expert's tile one after another, but for the heaviest,
// and counts those above and the heaviest. Returns how many were written. out: [n + 16].
template <class T, bool HAS_BASE>
static int compress_loop(const typename T::type* source, const float* base, int n, const Bracket& b,
                         uint32_t* out, BracketCounts& c) {
  const vi under = splat_i((int32_t)b.low - 1), top = splat_i((int32_t)b.high);
  const vi heaviest = splat_i((int32_t)b.heavy[0]);
  vi above = splat_i(0), equal = splat_i(0);
  uint32_t* p = out;
  const int full = n & -kSumLanes;
  each_block(source, full, [&](const typename T::type* x16, int64_t i) MF_LAMBDA {
    each_part([&](auto part) MF_LAMBDA {
      constexpr int H = decltype(part)::value;
      vf x = T::template part<H>(x16);
      if (HAS_BASE) x -= load(base + i + H * kLanes);
      const vi a = abs_bits(x);
      const vi over = a > top, same = a == heaviest;
      above -= over;
      equal -= same;
      p = append(p, (a > under) ^ over ^ same, a);  // over and same are within what is not under
    });
  });
  for (int i = full; i < n; ++i) {
    const float x = T::one(source[i]);
    const uint32_t a = bits_of(HAS_BASE ? x - base[place(i)] : x) & kAbsMask;
    c.above += a > b.high;
    c.bins[kBins] += a == b.heavy[0];
    *p = a;
    p += a >= b.low && a <= b.high && a != b.heavy[0];
  }
  c.above += lane_sum(above);
  c.bins[kBins] += lane_sum(equal);
  return (int)(p - out);
}

static int compress_tile(const mf_expert& e, int64_t start, const float* base, int n,
                         const Bracket& b, uint32_t* out, BracketCounts& c) {
  const uint16_t* half = (const uint16_t*)e.data + start;
  const float* full = (const float*)e.data + start;
  if (e.dtype == MF_BF16)
    return base ? compress_loop<Bf16, true>(half, base, n, b, out, c)
                : compress_loop<Bf16, false>(half, base, n, b, out, c);
  if (e.dtype == MF_F16)
    return base ? compress_loop<F16, true>(half, base, n, b, out, c)
                : compress_loop<F16, false>(half, base, n, b, out, c);
  return base ? compress_loop<F32, true>(full, base, n, b, out, c)
              : compress_loop<F32, false>(full, base, n, b, out, c);
}

// Counts magnitudes of the bracket by bin or by heavy value, without a branch: which of them comes
// is anybody's guess. bits: overwritten.
static void sort_into_bins(const Bracket& b, uint32_t* bits, int n, BracketCounts& c) {
  const bool room = c.capacity - c.listed >= n;
  uint32_t* const first = room ? c.list + c.listed : bits;
  uint32_t* list = first;
  for (int i = 0; i < n; ++i) {
    const uint32_t a = bits[i], bin = (a - b.low) >> b.shift, owner = b.owner[bin];
    const uint32_t heavy = b.heavy[owner] == a;
    ++c.bins[bin +
             heavy * (kBins + owner - bin)];  // a product: compilers make a branch of a choice
    *list = a;
    list += heavy ^ 1;
  }
  if (room) {
    c.listed += list - first;
  } else {
    c.overflowed |= list > first;
  }
}

static void scan(const Work& w, Scratch& s, int64_t start, int64_t n, const Bracket* brackets,
                 int count, BracketCounts* counts) {
  for (int64_t done = 0; done < n; done += kTile) {
    const int64_t at = start + done;
    const int len = imin(kTile, n - done);
    const float* base = load_base(w, s, at, len);
    for (int b = 0; b < count; ++b) {
      const Bracket& bracket = brackets[b];
      const int inside =
          compress_tile(w.experts[bracket.expert], at, base, len, bracket, s.bits, counts[b]);
      sort_into_bins(bracket, s.bits, inside, counts[b]);
    }
  }
}

static void magnitudes(const Work& w, Scratch& s, int expert, int64_t start, int64_t n,
                       uint32_t* bits) {
  const mf_expert& e = w.experts[expert];
  for (int64_t done = 0; done < n; done += kTile) {
    const int len = imin(kTile, n - done);
    const float* base = load_base(w, s, start + done, len);
    load_tile<false>(e.data, e.dtype, base, start + done, len, s.tau);
    for (int i = 0; i < padded(len); i += kLanes) store(s.tau + i, abs_of(load(s.tau + i)));
    in_memory_order(s.tau, len, (float*)(void*)(bits + done));
  }
}

}  // namespace
}  // namespace MF_ISA_NAMESPACE
}  // namespace mf
