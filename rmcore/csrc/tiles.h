// Register tiles and packing for the ragged attention: all arithmetic runs on packed fp32 (or fp64) rows.
//
// One product is enough for the whole attention: C[M, N] (+)= A[M, K] * B[K, N] for a strip of M <= 6 rows (M, N and K
// as in every text on matrix products). A is read one scalar at a time through two strides, so it may be transposed.
// The rows of B and C are whole numbers of vectors long. Each element of C is one sum over k in rising order, so the
// result does not depend on how the strip is cut into tiles.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace rmcore {

using at::vec::Vectorized;

// Rows of a register tile: 6 x 4 accumulators, 4 vectors of B and 1 scalar of A take 29 registers.
constexpr int64_t kStrip = 6;

template <typename T>
constexpr int64_t lanes() {
  return Vectorized<T>::size();
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The element type of a product, and how a register tile of it is computed; pairs.h has the one for bf16.
template <typename T>
struct Arithmetic {
  using Sum = T;
  static constexpr int64_t kLanes = lanes<T>();
  static constexpr int64_t kPack = 1;  // steps of the inner dimension that one element holds
  static constexpr int kWide = sizeof(Vectorized<T>) == 64 ? 4 : 2;  // 32 registers with AVX-512, 16 with AVX2

  template <int MR, int NV>
  static void tile(int64_t K, const T* A, int64_t row_a, int64_t col_a, const T* B, int64_t ldb, T* C, int64_t ldc,
                   bool add);
};

template <typename T>
template <int MR, int NV>
inline void Arithmetic<T>::tile(int64_t K, const T* A, int64_t row_a, int64_t col_a, const T* B, int64_t ldb, T* C,
                                int64_t ldc, bool add) {
  using Vec = Vectorized<T>;
  Vec sum[MR][NV];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sum[i][j] = Vec(T(0));
  }
  for (int64_t k = 0; k < K; ++k) {
    Vec b[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) b[j] = Vec::loadu(B + k * ldb + j * lanes<T>());
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const Vec a(A[i * row_a + k * col_a]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] = at::vec::fmadd(a, b[j], sum[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      T* c = C + i * ldc + j * lanes<T>();
      (add ? Vec::loadu(c) + sum[i][j] : sum[i][j]).store(c);  // partial sums stay short: smaller rounding errors
    }
  }
}

template <typename T, int MR, typename Sum = typename Arithmetic<T>::Sum>
void strip_product(int64_t vectors, int64_t K, const T* A, int64_t row_a, int64_t col_a, const T* B, int64_t ldb,
                   Sum* C, int64_t ldc, bool add) {
  using With = Arithmetic<T>;
  constexpr int kWide = With::kWide;
  while (vectors > 0) {
    // 5 vectors are cut into 3 + 2, not 4 + 1: a tile of one vector would wait for its own multiplications.
    const int64_t take = vectors == kWide + 1 ? kWide - kWide / 4 : std::min<int64_t>(vectors, kWide);
    if (take == 4)
      With::template tile<MR, 4>(K, A, row_a, col_a, B, ldb, C, ldc, add);
    else if (take == 3)
      With::template tile<MR, 3>(K, A, row_a, col_a, B, ldb, C, ldc, add);
    else if (take == 2)
      With::template tile<MR, 2>(K, A, row_a, col_a, B, ldb, C, ldc, add);
    else
      With::template tile<MR, 1>(K, A, row_a, col_a, B, ldb, C, ldc, add);
    B += take * With::kLanes;
    C += take * With::kLanes;
    vectors -= take;
  }
}

// C[M, columns] (+)= A * B for M <= kStrip. Writes up to the next whole vector of columns.
template <typename T, typename Sum = typename Arithmetic<T>::Sum>
void product(int64_t M, int64_t columns, int64_t K, const T* A, int64_t row_a, int64_t col_a, const T* B, int64_t ldb,
             Sum* C, int64_t ldc, bool add) {
  const int64_t vectors = (columns + Arithmetic<T>::kLanes - 1) / Arithmetic<T>::kLanes;
  switch (M) {
    case 6:
      return strip_product<T, 6>(vectors, K, A, row_a, col_a, B, ldb, C, ldc, add);
    case 5:
      return strip_product<T, 5>(vectors, K, A, row_a, col_a, B, ldb, C, ldc, add);
    case 4:
      return strip_product<T, 4>(vectors, K, A, row_a, col_a, B, ldb, C, ldc, add);
    case 3:
      return strip_product<T, 3>(vectors, K, A, row_a, col_a, B, ldb, C, ldc, add);
    case 2:
      return strip_product<T, 2>(vectors, K, A, row_a, col_a, B, ldb, C, ldc, add);
    case 1:
      return strip_product<T, 1>(vectors, K, A, row_a, col_a, B, ldb, C, ldc, add);
    default:
      return;
  }
}

// e^x to about 1 ulp, 0 for very low x, NaN for NaN. torch's exp_u20 is off by several ulp and makes NaN a number.
// Cody-Waite reduction x = n ln2 + r, then the polynomial of Cephes' expf.
inline Vectorized<float> exponential(const Vectorized<float>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 low = _mm512_max_ps(_mm512_set1_ps(-106.0f), x);  // in this order of arguments a NaN stays a NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(low, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), low);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
  return _mm512_scalef_ps(_mm512_add_ps(p, _mm512_set1_ps(1.0f)), n);
#else
  return x.exp();
#endif
}
inline Vectorized<double> exponential(const Vectorized<double>& x) { return x.exp(); }

template <typename Fn>
void by_dtype(at::ScalarType dtype, const Fn& fn) {
  switch (dtype) {
    case at::kFloat:
      return fn(float());
    case at::kBFloat16:
      return fn(at::BFloat16());
    case at::kHalf:
      return fn(at::Half());
    case at::kDouble:
      return fn(double());
    default:
      TORCH_CHECK(false, "ragged_attention: expected floating input, got ", dtype);
  }
}

// One head of a [T, heads, hd] tensor whose last dimension is contiguous.
struct HeadView {
  char* data;
  int64_t row_bytes;
  at::ScalarType dtype;

  HeadView(const at::Tensor& tensor, int64_t head)
      : data(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())) +
             head * tensor.stride(1) * tensor.element_size()),
        row_bytes(tensor.stride(0) * tensor.element_size()),
        dtype(tensor.scalar_type()) {}

  // rows [first, first + count) * alpha -> packed[count, ld]; columns hd .. ld become 0.
  template <typename T>
  void load(int64_t first, int64_t count, int64_t hd, T alpha, T* packed, int64_t ld) const {
    by_dtype(dtype, [&](auto kind) {
      using Src = decltype(kind);
      for (int64_t r = 0; r < count; ++r, packed += ld) {
        const Src* __restrict__ src = reinterpret_cast<const Src*>(data + (first + r) * row_bytes);
        T* __restrict__ dst = packed;
        for (int64_t line = 0; line < hd * int64_t(sizeof(Src)); line += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(src) + 8 * row_bytes + line);
        for (int64_t d = 0; d < hd; ++d) dst[d] = static_cast<T>(src[d]) * alpha;
        for (int64_t d = hd; d < ld; ++d) packed[d] = T(0);
      }
    });
  }

  // packed[count, ld] * alpha -> rows [first, first + count).
  template <typename T>
  void store(int64_t first, int64_t count, int64_t hd, T alpha, const T* packed, int64_t ld) const {
    by_dtype(dtype, [&](auto kind) {
      using Dst = decltype(kind);
      for (int64_t r = 0; r < count; ++r, packed += ld) {
        Dst* __restrict__ dst = reinterpret_cast<Dst*>(data + (first + r) * row_bytes);
        const T* __restrict__ src = packed;
        for (int64_t d = 0; d < hd; ++d) dst[d] = static_cast<Dst>(src[d] * alpha);
      }
    });
  }
};

// rows[count, ld] -> columns[hd, ldt]; columns count .. ldt become 0.
template <typename T>
void transpose(const T* rows, int64_t count, int64_t ld, int64_t hd, T* columns, int64_t ldt) {
  for (int64_t first = 0; first < count; first += 16) {
    const int64_t last = std::min(first + 16, count);
    for (int64_t d = 0; d < hd; ++d) {
      for (int64_t r = first; r < last; ++r) columns[d * ldt + r] = rows[r * ld + d];
    }
  }
  for (int64_t d = 0; d < hd; ++d) std::fill(columns + d * ldt + count, columns + (d + 1) * ldt, T(0));
}

}  // namespace rmcore
