// The bf16 arithmetic of the ragged attention: a 32-bit word holds two numbers of the inner dimension. The instruction
// vdpbf16ps of AVX512-BF16 multiplies them and adds in fp32, with twice the products per instruction of fp32.
//
// Example: the rows [1 2 3 4] and [5 6 7 8] of K are, paired along the head, [(1,2) (3,4)] and [(5,6) (7,8)]; paired
// along the rows, [(1,5) (2,6) (3,7) (4,8)].
//
// Only functions marked RMCORE_BF16 use these instructions, and only if has_bf16() is true.
#pragma once

#include "tiles.h"

#if defined(CPU_CAPABILITY_AVX512) && (defined(__clang__) || __GNUC__ >= 10)
#define RMCORE_HAS_BF16
#define RMCORE_BF16 __attribute__((target("avx512bf16")))

#include <algorithm>
#include <cmath>
#include <utility>

namespace rmcore {

using Pair = uint32_t;  // the bf16 number of an even place in the low half, the next one in the high half

inline bool has_bf16() { return __builtin_cpu_supports("avx512bf16"); }

template <>
struct Arithmetic<Pair> {
  using Sum = float;
  static constexpr int64_t kLanes = 16;
  static constexpr int64_t kPack = 2;
  static constexpr int kWide = 4;

  template <int MR, int NV>
  RMCORE_BF16 static void tile(int64_t K, const Pair* A, int64_t row_a, int64_t col_a, const Pair* B, int64_t ldb,
                               float* C, int64_t ldc, bool add) {
    __m512 sum[MR][NV];
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < K; ++k) {
      __m512bh b[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) b[j] = (__m512bh)_mm512_loadu_si512(B + k * ldb + j * kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < MR; ++i) {
        const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(A[i * row_a + k * col_a]));
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], a, b[j]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* c = C + i * ldc + j * kLanes;
        _mm512_storeu_ps(c, add ? _mm512_add_ps(_mm512_loadu_ps(c), sum[i][j]) : sum[i][j]);
      }
    }
  }
};

// The lanes [0, count) of a vector of 16 or 32.
inline __mmask16 lanes16(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1); }
inline __mmask32 lanes32(int64_t count) {
  return static_cast<__mmask32>((uint64_t(1) << std::clamp<int64_t>(count, 0, 32)) - 1);
}

// Reads rows [first, first + count) of a bf16 or fp32 head, rounded to bf16 and paired along the head, into
// pairs[count, ld], with zeros beyond hd.
RMCORE_BF16 inline void load_pairs(const HeadView& head, int64_t first, int64_t count, int64_t hd, Pair* pairs,
                                   int64_t ld) {
  const bool is_bf16 = head.dtype == at::kBFloat16;
  for (int64_t r = 0; r < count; ++r, pairs += ld) {
    const char* row = head.data + (first + r) * head.row_bytes;
    for (int64_t line = 0; line < (is_bf16 ? hd * 2 : hd * 4); line += 64)
      __builtin_prefetch(row + 8 * head.row_bytes + line);
    for (int64_t word = 0; word < ld; word += 16) {
      const int64_t left = hd - 2 * word;
      __m512i both;
      if (is_bf16) {
        both = _mm512_maskz_loadu_epi16(lanes32(left), row + 4 * word);
      } else {
        const __m512 low = _mm512_maskz_loadu_ps(lanes16(left), row + 8 * word);
        const __m512 high = _mm512_maskz_loadu_ps(lanes16(left - 16), row + 8 * word + 64);
        both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      }
      _mm512_mask_storeu_epi32(pairs + word, lanes16(ld - word), both);
    }
  }
}

// packed[count, ld] * alpha -> rows [first, first + count) of a bf16 or fp32 head.
RMCORE_BF16 inline void store_rows(const HeadView& head, int64_t first, int64_t count, int64_t hd, float alpha,
                                   const float* packed, int64_t ld) {
  const __m512 factor = _mm512_set1_ps(alpha);
  for (int64_t r = 0; r < count; ++r, packed += ld) {
    char* row = head.data + (first + r) * head.row_bytes;
    for (int64_t d = 0; d < hd; d += 16) {
      const __mmask16 these = lanes16(hd - d);
      const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(packed + d), factor);
      if (head.dtype == at::kBFloat16)
        _mm256_mask_storeu_epi16(row + d * 2, these, (__m256i)_mm512_cvtneps_pbh(values));
      else
        _mm512_mask_storeu_ps(row + d * 4, these, values);
    }
  }
}

// pairs[count, depth] along the head -> rows[ceil(count / 2), ld] along the rows; an odd last row is paired with zeros.
inline void pair_rows(const Pair* pairs, int64_t count, int64_t depth, Pair* rows, int64_t ld) {
  for (int64_t r = 0; r < count; r += 2, rows += ld) {
    const Pair* __restrict__ even = pairs + r * depth;
    const bool both = r + 1 < count;
    const Pair* __restrict__ odd = both ? even + depth : even;
    const Pair keep = both ? ~Pair(0) : Pair(0);
    Pair* __restrict__ out = rows;
    for (int64_t d = 0; d < depth; ++d) {
      const Pair low = even[d], high = odd[d] & keep;
      out[2 * d] = (low & 0xffffu) | (high << 16);
      out[2 * d + 1] = (low >> 16) | (high & 0xffff0000u);
    }
  }
}

// scores[0 .. end) -> chance = exp(scale * score - largest) in bf16; returns (largest, sum of the exponentials).
RMCORE_BF16 inline std::pair<float, float> exponentials(const float* scores, int64_t end, float scale, Pair* chance) {
  __m512 top = _mm512_set1_ps(-1e30f), sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < end; c += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(scores + c));
  const float highest = _mm512_reduce_max_ps(top) * scale;
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(highest);
  for (int64_t c = 0; c < end; c += 16) {
    const __m512 e = exponential(Vectorized<float>(_mm512_fmsub_ps(_mm512_loadu_ps(scores + c), factor, shift)));
    sum = _mm512_add_ps(sum, e);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(chance + c / 2), (__m256i)_mm512_cvtneps_pbh(e));
  }
  return {highest, _mm512_reduce_add_ps(sum)};
}

// One row, in place: scores -> P = exp(scale * score - log_sum), grad -> dS = P * (grad - sum(P * grad)). dS is also
// written to `pairs` in bf16, paired along the row.
RMCORE_BF16 inline void softmax_backward(float* scores, float* grad, int64_t end, float scale, float log_sum,
                                         Pair* pairs) {
  __m512 total = _mm512_setzero_ps();
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(log_sum);
  for (int64_t c = 0; c < end; c += 16) {
    const __m512 p = exponential(Vectorized<float>(_mm512_fmsub_ps(_mm512_loadu_ps(scores + c), factor, shift)));
    _mm512_storeu_ps(scores + c, p);
    total = _mm512_fmadd_ps(p, _mm512_loadu_ps(grad + c), total);
  }
  const __m512 delta = _mm512_set1_ps(_mm512_reduce_add_ps(total));
  for (int64_t c = 0; c < end; c += 16) {
    const __m512 ds = _mm512_mul_ps(_mm512_loadu_ps(scores + c), _mm512_sub_ps(_mm512_loadu_ps(grad + c), delta));
    _mm512_storeu_ps(grad + c, ds);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + c / 2), (__m256i)_mm512_cvtneps_pbh(ds));
  }
}

// Two fp32 rows -> pairs[0 .. end) of their bf16 numbers; without a second row the high halves are zeros.
RMCORE_BF16 inline void pair_columns(const float* even, const float* odd, int64_t end, Pair* pairs) {
  for (int64_t c = 0; c < end; c += 16) {
    __m512i both = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(even + c)));
    if (odd != nullptr) {
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(odd + c)));
      both = _mm512_or_si512(both, _mm512_slli_epi32(high, 16));
    }
    _mm512_storeu_si512(pairs + c, both);
  }
}

}  // namespace rmcore
#endif
