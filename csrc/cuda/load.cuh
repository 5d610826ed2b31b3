// Eight neighbouring elements a thread: one 16-byte access in 16-bit dtypes, two in float32. The
// loads of all inputs are issued before the first of them is used.
#pragma once

#include "../common/philox.h"
#include "../common/rules.h"
#include "magic_fast_cuda.h"
#include "platform.cuh"

namespace mf {
namespace cuda {

constexpr int kVec = 8;
constexpr int64_t kNoIndex = INT64_MAX;

// Eight elements of memory: what they are made of depends on the dtype.
struct Raw {
  Word4 first, second;
};

struct Eight {
  float v[kVec];
};

// Where a thread works: elements [at, at + count) of the arrays, `whole` a full aligned vector.
struct Place {
  int64_t at, flat;
  int count;
  bool whole;
};

// One tensor, as the threads see it: the kernel's parameters, and what a table puts in their place.
struct Job {
  const mf_gpu_job* all;
  const int64_t* row;  // of a table, or null
  const void* base;
  void* out;
  const int64_t* integers;
  const float* numbers;
  int64_t* report;
  int64_t* kept;
  int64_t offset;
  int k;

  MF_DEVICE_METHOD const void* expert(int i) const {
    return row ? (const void*)row[2 + i] : all->experts[i];
  }
  MF_DEVICE_METHOD int dtype(int i) const { return all->dtypes[i]; }
  MF_DEVICE_METHOD int kind(int i) const { return all->kinds[i]; }
};

MF_DEVICE Job job_of(const mf_gpu_job& all) {
  return {&all,        nullptr,    all.base, all.out,    all.integers,
          all.numbers, all.report, all.kept, all.offset, all.k};
}

// Job `n` of a table.
MF_DEVICE Job job_of(const mf_gpu_job& all, const mf_gpu_table& table, int64_t n) {
  const int k = all.k;
  const int64_t* row = table.rows + n * (k + 4);
  return {&all,
          row,
          (const void*)(all.base ? row[0] : 0),
          (void*)row[1],
          all.integers + n * (6 * k + 2),
          all.numbers + n * (6 * k + 4),
          all.report + n * (k + 3),
          all.kept + n * k,
          row[k + 3],
          k};
}

MF_DEVICE float element_of(const void* data, int dtype, int64_t i) {
  if (dtype == MF_F32) return ((const float*)data)[i];
  const uint16_t h = ((const uint16_t*)data)[i];
  return dtype == MF_BF16 ? bf16_to_float(h) : f16_to_float(h);
}

// Four words one by one: the end of a row, or memory that is not aligned. Zeros behind the end.
MF_APART Word4 load_slowly(const void* data, bool wide, int64_t at, int count) {
  Word4 x;
  MF_UNROLL for (int e = 0; e < 4; ++e) {
    if (wide) {
      x.w[e] = e < count ? ((const uint32_t*)data)[at + e] : 0u;
    } else {
      const uint16_t* from = (const uint16_t*)data + at;
      const uint32_t low = 2 * e < count ? from[2 * e] : 0u;
      const uint32_t high = 2 * e + 1 < count ? from[2 * e + 1] : 0u;
      x.w[e] = low | high << 16;
    }
  }
  return x;
}

template <bool STREAMING>
MF_DEVICE Word4 load_word(const void* p) {
  return STREAMING ? load_streaming(p) : load_kept(p);
}

MF_DEVICE void load_parts(const void* data, int dtype, const Place& p, Raw* raw) {
  const bool wide = dtype == MF_F32;
  raw->first = load_slowly(data, wide, p.at, p.count);
  if (wide) raw->second = load_slowly(data, wide, p.at + 4, p.count - 4);
}

template <bool STREAMING>
MF_DEVICE void load_whole(const void* data, int dtype, const Place& p, Raw* raw) {
  if (dtype == MF_F32) {
    const float* from = (const float*)data + p.at;
    raw->first = load_word<STREAMING>(from);
    raw->second = load_word<STREAMING>(from + 4);
  } else {
    raw->first = load_word<STREAMING>((const uint16_t*)data + p.at);
  }
}

template <bool STREAMING>
MF_DEVICE void load_raw(const void* data, int dtype, const Place& p, Raw* raw) {
  if (p.whole) {
    load_whole<STREAMING>(data, dtype, p, raw);
  } else {
    load_parts(data, dtype, p, raw);
  }
}

MF_DEVICE float half_to_float(uint32_t h) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((uint16_t)h));
  return x;
#else
  return f16_to_float((uint16_t)h);
#endif
}

MF_DEVICE void widen(const Raw& raw, int dtype, Eight* x) {
  if (dtype == MF_BF16) {
    MF_UNROLL for (int e = 0; e < 4; ++e) {
      x->v[2 * e] = float_of(raw.first.w[e] << 16);
      x->v[2 * e + 1] = float_of(raw.first.w[e] & 0xffff0000u);
    }
  } else if (dtype == MF_F16) {
    MF_UNROLL for (int e = 0; e < 4; ++e) {
      x->v[2 * e] = half_to_float(raw.first.w[e] & 0xffffu);
      x->v[2 * e + 1] = half_to_float(raw.first.w[e] >> 16);
    }
  } else {
    MF_UNROLL for (int e = 0; e < 4; ++e) {
      x->v[e] = float_of(raw.first.w[e]);
      x->v[e + 4] = float_of(raw.second.w[e]);
    }
  }
}

template <bool STREAMING>
MF_DEVICE void load_eight(const void* data, int dtype, const Place& p, Eight* x) {
  Raw raw;
  load_raw<STREAMING>(data, dtype, p, &raw);
  widen(raw, dtype, x);
}

// Zeros where there is no base.
MF_DEVICE void load_base(const Job& job, const Place& p, Eight* b) {
  if (job.base) {
    load_eight<false>(job.base, job.all->base_dtype, p, b);
    return;
  }
  MF_UNROLL for (int e = 0; e < kVec; ++e) b->v[e] = 0;
}

// x - base where there is a base: without one even 0 - 0 would lose the sign of -0.
MF_DEVICE float less_base(const Job& job, float x, float b) { return job.base ? x - b : x; }

MF_DEVICE void load_tau(const Job& job, int k, const Place& p, const Eight& b, Eight* tau) {
  load_eight<true>(job.expert(k), job.dtype(k), p, tau);
  if (!job.base) return;
  MF_UNROLL for (int e = 0; e < kVec; ++e) tau->v[e] -= b.v[e];
}

MF_DEVICE uint16_t narrow(float x, int dtype) {
  return dtype == MF_BF16 ? float_to_bf16(x) : float_to_f16(x);
}

MF_DEVICE void store_slowly(void* out, int dtype, const Place& p, const Eight& x) {
  MF_UNROLL for (int e = 0; e < kVec; ++e) {
    if (e >= p.count) continue;
    if (dtype == MF_F32) {
      ((float*)out)[p.at + e] = x.v[e];
    } else {
      ((uint16_t*)out)[p.at + e] = narrow(x.v[e], dtype);
    }
  }
}

MF_DEVICE void store_eight(void* out, int dtype, const Place& p, const Eight& x) {
  if (!p.whole) {
    store_slowly(out, dtype, p, x);
    return;
  }
  Word4 word;
  if (dtype == MF_F32) {
    float* to = (float*)out + p.at;
    MF_UNROLL for (int e = 0; e < 4; ++e) word.w[e] = bits_of(x.v[e]);
    store_streaming(to, word);
    MF_UNROLL for (int e = 0; e < 4; ++e) word.w[e] = bits_of(x.v[e + 4]);
    store_streaming(to + 4, word);
    return;
  }
  MF_UNROLL for (int e = 0; e < 4; ++e) word.w[e] =
      (uint32_t)narrow(x.v[2 * e], dtype) | (uint32_t)narrow(x.v[2 * e + 1], dtype) << 16;
  store_streaming((uint16_t*)out + p.at, word);
}

MF_DEVICE bool finite_bits(uint32_t bits) { return (bits & kAbsMask) < kInfBits; }

MF_DEVICE uint32_t overflow_bits(int dtype) {
  return dtype == MF_BF16 ? kBf16OverflowBits : dtype == MF_F16 ? kF16OverflowBits : kInfBits;
}

}  // namespace cuda
}  // namespace mf
