// The parts of a decoder layer that PyTorch computes in many passes over memory, each in one pass on the CPU, with
// their autograd formulas. The contract is rmcore/ops/layers.py; rmcore/model/cpu_layers.py puts them into a model.
//
// Input: fp32 or bf16 tensors; all arithmetic is fp32. Output: the result of each op, rounded once.
// Example: the rotation of q reads q once and writes it once. Composed of PyTorch calls it also writes the two products,
// the half that changes its sign and the result of each cat, and its backward fills a tensor with zeros per slice.
//
// Results do not depend on the number of threads: threads divide rows, and sums over rows add up chunks of a fixed size.
#include "tiles.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <cmath>

namespace rmcore {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Vec = Vectorized<float>;

constexpr int64_t kBlock = 1024;  // elements of a block, whose fp32 copies stay in the first-level cache
constexpr int64_t kRows = 64;     // rows whose sum is one term of a sum over rows

// The first elements of a row in fp32: the row itself, or a copy in `buffer`.
inline const float* as_floats(const float* row, int64_t, float*) { return row; }
inline const float* as_floats(const at::BFloat16* row, int64_t count, float* buffer) {
  at::vec::convert(row, buffer, count);
  return buffer;
}
inline float* result_buffer(float* row, float*) { return row; }
inline float* result_buffer(at::BFloat16*, float* buffer) { return buffer; }
inline void keep_result(const float*, float*, int64_t) {}
inline void keep_result(const float* buffer, at::BFloat16* row, int64_t count) { at::vec::convert(buffer, row, count); }

// out[i] = fn(in[i]) for tensors of equal shapes, in blocks on all threads. `fn` takes and returns arrays of vectors.
template <typename T, int Ins, int Outs, typename Fn>
void elementwise(const std::array<Tensor, Ins>& in, const std::array<Tensor, Outs>& out, const Fn& fn) {
  const int64_t count = out[0].numel();
  at::parallel_for(0, (count + kBlock - 1) / kBlock, 8, [&](int64_t first, int64_t last) {
    alignas(64) float space[Ins + Outs][kBlock];
    for (int64_t block = first; block < last; ++block) {
      const int64_t at = block * kBlock, size = std::min(kBlock, count - at);
      std::array<const float*, Ins> from;
      std::array<float*, Outs> to;
      for (int i = 0; i < Ins; ++i) from[i] = as_floats(in[i].template const_data_ptr<T>() + at, size, space[i]);
      for (int i = 0; i < Outs; ++i) to[i] = result_buffer(out[i].template mutable_data_ptr<T>() + at, space[Ins + i]);
      for (int64_t c = 0; c < size; c += Vec::size()) {
        const int64_t left = std::min<int64_t>(Vec::size(), size - c);
        std::array<Vec, Ins> values;
        for (int i = 0; i < Ins; ++i) values[i] = Vec::loadu(from[i] + c, left);
        const std::array<Vec, Outs> results = fn(values);
        for (int i = 0; i < Outs; ++i) results[i].store(to[i] + c, left);
      }
      for (int i = 0; i < Outs; ++i) keep_result(to[i], out[i].template mutable_data_ptr<T>() + at, size);
    }
  });
}

template <int Ins, int Outs, typename Fn>
void by_type(const std::array<Tensor, Ins>& in, const std::array<Tensor, Outs>& out, const Fn& fn) {
  if (out[0].scalar_type() == at::kFloat)
    elementwise<float, Ins, Outs>(in, out, fn);
  else
    elementwise<at::BFloat16, Ins, Outs>(in, out, fn);
}

// A backward that autograd records would need a formula for its own derivative.
void check_once(const char* op) {
  TORCH_CHECK(!at::GradMode::is_enabled(), op, ": differentiable once; create_graph=True is not supported");
}

void check(const Tensor& x, const char* op) {
  const bool known = x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
  TORCH_CHECK_VALUE(x.device().is_cpu() && known, op, ": expected fp32 or bf16 on the CPU, got ", x.scalar_type());
}

// GELU, exact. The share Phi(x) of the normal distribution below x, and the density: both from one exponential, by
// formula 7.1.26 of Abramowitz and Stegun, whose error is below 7.5e-8, about one rounding of Phi.
struct Normal {
  Vec below, density;
};

inline Normal normal(const Vec& x) {
  const Vec one(1.0f), size = x.abs();
  const Vec e = exponential(x * x * Vec(-0.5f));
  const Vec t = one / at::vec::fmadd(size, Vec(0.3275911f * 0.70710678f), one);
  Vec p(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = at::vec::fmadd(p, t, Vec(c));
  const Vec above = p * t * e * Vec(0.5f);  // of |x|
  return {Vec::blendv(above, one - above, x >= Vec(0.0f)), e * Vec(0.39894228f)};
}

Tensor gelu_forward(const Tensor& x) {
  const Tensor out = at::empty_like(x);
  by_type<1, 1>({x}, {out}, [](const auto& in) { return std::array<Vec, 1>{in[0] * normal(in[0]).below}; });
  return out;
}

struct Gelu : public Function<Gelu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor rows = x.contiguous();
    ctx->save_for_backward({rows});
    return gelu_forward(rows);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_once("gelu");
    const Tensor x = ctx->get_saved_variables()[0], out = at::empty_like(x);
    by_type<2, 1>({x, grads[0].contiguous()}, {out}, [](const auto& in) {
      const Normal of = normal(in[0]);
      return std::array<Vec, 1>{in[1] * at::vec::fmadd(in[0], of.density, of.below)};
    });
    return {out};
  }
};

Tensor gelu(const Tensor& x) {
  check(x, "gelu");
  return Gelu::apply(x);
}

// SwiGLU without its products: silu(gate) * up (Shazeer, arXiv 2002.05202).
inline Vec sigmoid(const Vec& x) { return Vec(1.0f) / (Vec(1.0f) + exponential(x.neg())); }

struct Swiglu : public Function<Swiglu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate, const Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor a = gate.contiguous(), b = up.contiguous(), out = at::empty_like(a);
    ctx->save_for_backward({a, b});
    by_type<2, 1>({a, b}, {out}, [](const auto& in) { return std::array<Vec, 1>{in[0] * sigmoid(in[0]) * in[1]}; });
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_once("swiglu");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor grad_gate = at::empty_like(saved[0]), grad_up = at::empty_like(saved[1]);
    by_type<3, 2>({saved[0], saved[1], grads[0].contiguous()}, {grad_gate, grad_up}, [](const auto& in) {
      const Vec share = sigmoid(in[0]), one(1.0f);
      const Vec slope = share * at::vec::fmadd(in[0], one - share, one);
      return std::array<Vec, 2>{in[2] * in[1] * slope, in[2] * in[0] * share};
    });
    return {grad_gate, grad_up};
  }
};

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check(gate, "swiglu");
  TORCH_CHECK_VALUE(gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type(), "swiglu: unequal inputs");
  return Swiglu::apply(gate, up);
}

// RMSNorm (Zhang and Sennrich, arXiv 1910.07467) in fp32: weight * x / sqrt(mean(x^2) + eps).
template <typename Fn>
Vec over_row(int64_t size, const Fn& fn) {  // the sum of fn(column, number of columns) over a row, in its first lane
  Vec sum(0.0f);
  for (int64_t c = 0; c < size; c += Vec::size()) sum = sum + fn(c, std::min<int64_t>(Vec::size(), size - c));
  return Vec(at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum));
}

struct RmsNorm : public Function<RmsNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& scale, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor x = input.contiguous(), weight = scale.contiguous(), out = at::empty_like(x);
    const int64_t size = weight.numel(), rows = x.numel() / size;
    const Tensor inverse = at::empty({rows}, x.options());
    const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
    float *to = out.mutable_data_ptr<float>(), *root = inverse.mutable_data_ptr<float>();
    at::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const float* row = from + r * size;
        const Vec squares = over_row(size, [&](int64_t c, int64_t n) {
          const Vec v = Vec::loadu(row + c, n);
          return v * v;
        });
        alignas(64) float sum[Vec::size()];
        squares.store(sum);
        root[r] = 1.0f / std::sqrt(sum[0] / float(size) + float(eps));
        for (int64_t c = 0; c < size; c += Vec::size()) {
          const int64_t n = std::min<int64_t>(Vec::size(), size - c);
          (Vec::loadu(w + c, n) * (Vec::loadu(row + c, n) * Vec(root[r]))).store(to + r * size + c, n);
        }
      }
    });
    ctx->save_for_backward({x, weight, inverse});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_once("rms_norm");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], grad = grads[0].contiguous(), out = at::empty_like(x);
    const int64_t size = weight.numel(), rows = x.numel() / size, chunks = (rows + kRows - 1) / kRows;
    const Tensor sums = at::empty({chunks, size}, x.options());
    const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
    const float *g = grad.const_data_ptr<float>(), *root = saved[2].const_data_ptr<float>();
    float *to = out.mutable_data_ptr<float>(), *totals = sums.mutable_data_ptr<float>();
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        float* total = totals + chunk * size;
        std::fill(total, total + size, 0.0f);
        for (int64_t r = chunk * kRows; r < std::min(rows, (chunk + 1) * kRows); ++r) {
          const int64_t at = r * size;
          const Vec inverse(root[r]);
          const Vec along = over_row(size, [&](int64_t c, int64_t n) {
            return Vec::loadu(g + at + c, n) * Vec::loadu(w + c, n) * Vec::loadu(from + at + c, n);
          });
          const Vec pull = along * inverse * inverse * inverse * Vec(1.0f / float(size));
          for (int64_t c = 0; c < size; c += Vec::size()) {
            const int64_t n = std::min<int64_t>(Vec::size(), size - c);
            const Vec v = Vec::loadu(from + at + c, n), up = Vec::loadu(g + at + c, n);
            (up * Vec::loadu(w + c, n) * inverse - v * pull).store(to + at + c, n);
            (Vec::loadu(total + c, n) + up * v * inverse).store(total + c, n);
          }
        }
      }
    });
    return {out, ctx->needs_input_grad(1) ? at::sum(sums, {0}) : Tensor(), Tensor()};
  }
};

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat,
                    "rms_norm: expected fp32 on the CPU");
  TORCH_CHECK_VALUE(weight.dim() == 1 && x.dim() > 0 && x.size(-1) == weight.size(0),
                    "rms_norm: expected x [..., D] and weight [D], got ", x.sizes(), " and ", weight.sizes());
  return RmsNorm::apply(x, weight, eps);
}

// Rotary embeddings (Su et al., arXiv 2104.09864) of the first columns of each head; the others are copied. The second
// half of these columns is the partner of the first.
template <typename From, typename To>
void rotate_rows(const Tensor& x, const Tensor& cosine, const Tensor& sine, const Tensor& out, bool back) {
  const int64_t heads = x.size(1), tokens = x.size(2), size = x.size(3), turned = cosine.size(-1), half = turned / 2;
  const From* from = x.const_data_ptr<From>();
  To* to = out.mutable_data_ptr<To>();
  const float *cos = cosine.const_data_ptr<float>(), *sin = sine.const_data_ptr<float>();
  const int64_t head_stride = x.stride(1), token_stride = x.stride(2);
  at::parallel_for(0, tokens, 64, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const float *__restrict__ c = cos + t * turned, *__restrict__ s = sin + t * turned;
      for (int64_t h = 0; h < heads; ++h) {
        const From* __restrict__ a = from + t * token_stride + h * head_stride;
        To* __restrict__ b = to + (t * heads + h) * size;
        if (back) {
          for (int64_t d = 0; d < half; ++d) b[d] = To(float(a[d]) * c[d] + float(a[d + half]) * s[d + half]);
          for (int64_t d = half; d < turned; ++d) b[d] = To(float(a[d]) * c[d] - float(a[d - half]) * s[d - half]);
        } else {
          for (int64_t d = 0; d < half; ++d) b[d] = To(float(a[d]) * c[d] - float(a[d + half]) * s[d]);
          for (int64_t d = half; d < turned; ++d) b[d] = To(float(a[d]) * c[d] + float(a[d - half]) * s[d]);
        }
        for (int64_t d = turned; d < size; ++d) b[d] = To(float(a[d]));
      }
    }
  });
}

Tensor rotated(const Tensor& input, const Tensor& cos, const Tensor& sin, at::ScalarType dtype, bool back) {
  const Tensor x = input.stride(3) == 1 ? input : input.contiguous();
  const Tensor out = at::empty({1, x.size(2), x.size(1), x.size(3)}, x.options().dtype(dtype)).transpose(1, 2);
  const auto run = [&](auto from) {
    if (dtype == at::kFloat)
      rotate_rows<decltype(from), float>(x, cos, sin, out, back);
    else
      rotate_rows<decltype(from), at::BFloat16>(x, cos, sin, out, back);
  };
  x.scalar_type() == at::kFloat ? run(float()) : run(at::BFloat16());
  return out;
}

struct Rotate : public Function<Rotate> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cosine, const Tensor& sine) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor cos = cosine.contiguous(), sin = sine.contiguous();
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["dtype"] = static_cast<int64_t>(x.scalar_type());
    return rotated(x, cos, sin, at::kFloat, false);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_once("rotate");
    const variable_list saved = ctx->get_saved_variables();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    return {rotated(grads[0], saved[0], saved[1], dtype, true), Tensor(), Tensor()};
  }
};

Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  check(x, "rotate");
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(0) == 1 && cos.dim() == 3 && cos.size(0) == 1 && cos.size(1) == x.size(2) &&
                        cos.size(2) <= x.size(3) && cos.size(2) % 2 == 0 && cos.sizes() == sin.sizes() &&
                        cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat,
                    "rotate: expected x [1, H, T, K] and fp32 cos and sin [1, T, R], got ", x.sizes(), ", ",
                    cos.sizes(), ", ", sin.sizes());
  return Rotate::apply(x, cos, sin);
}

}  // namespace
}  // namespace rmcore

TORCH_LIBRARY_FRAGMENT(rmcore, m) {
  m.def("gelu(Tensor x) -> Tensor", TORCH_FN(rmcore::gelu));
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor", TORCH_FN(rmcore::swiglu));
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", TORCH_FN(rmcore::rms_norm));
  m.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor", TORCH_FN(rmcore::rotate));
}
