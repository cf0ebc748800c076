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
#include <optional>
#include <vector>

namespace rmcore {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Vec = Vectorized<float>;

constexpr int64_t kBlock = 1024;  // elements of a block, whose fp32 copies stay in the first-level cache
constexpr int64_t kRows = 64;     // rows whose sum is one term of a sum over rows

int64_t chunks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

// The first elements of a row in fp32: the row itself, or a copy in `buffer`.
inline const float* as_floats(const float* row, int64_t, float*) { return row; }
inline const float* as_floats(const at::BFloat16* row, int64_t count, float* buffer) {
  at::vec::convert(row, buffer, count);
  return buffer;
}
inline void put(const float* values, float* row, int64_t count) { std::copy(values, values + count, row); }
inline void put(const float* values, at::BFloat16* row, int64_t count) { at::vec::convert(values, row, count); }
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

// grad * slope(x) for both [rows, F], and, for each chunk of rows, the sum of the result in sums [chunks, F], if defined.
template <typename T>
void gelu_backward(const Tensor& x, const Tensor& grad, const Tensor& out, const Tensor& sums) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  const T *from = x.const_data_ptr<T>(), *up = grad.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  at::parallel_for(0, chunks_of(rows), 1, [&](int64_t begin, int64_t end) {
    alignas(64) float space[3][kBlock];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* total = sums.defined() ? sums.mutable_data_ptr<float>() + chunk * size : nullptr;
      if (total) std::fill(total, total + size, 0.0f);
      for (int64_t r = chunk * kRows; r < std::min(rows, (chunk + 1) * kRows); ++r) {
        for (int64_t block = 0; block < size; block += kBlock) {
          const int64_t at = r * size + block, count = std::min(kBlock, size - block);
          const float *values = as_floats(from + at, count, space[0]), *grads = as_floats(up + at, count, space[1]);
          float* results = result_buffer(to + at, space[2]);
          for (int64_t c = 0; c < count; c += Vec::size()) {
            const int64_t n = std::min<int64_t>(Vec::size(), count - c);
            const Vec v = Vec::loadu(values + c, n);
            const Normal of = normal(v);
            const Vec result = Vec::loadu(grads + c, n) * at::vec::fmadd(v, of.density, of.below);
            result.store(results + c, n);
            if (total) (Vec::loadu(total + block + c, n) + result).store(total + block + c, n);
          }
          keep_result(results, to + at, count);
        }
      }
    }
  });
}

// The gradient of a bias from the sums of its chunks, or nothing.
Tensor bias_gradient(const Tensor& sums, const Tensor& bias) {
  return sums.defined() ? at::sum(sums, {0}).to(bias.scalar_type()) : Tensor();
}

struct Gelu : public Function<Gelu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor rows = x.contiguous(), out = at::empty_like(rows);
    ctx->save_for_backward({rows, bias.value_or(Tensor())});
    by_type<1, 1>({rows}, {out}, [](const auto& in) { return std::array<Vec, 1>{in[0] * normal(in[0]).below}; });
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_once("gelu");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &bias = saved[1], grad = grads[0].contiguous(), out = at::empty_like(x);
    Tensor sums;
    if (bias.defined() && ctx->needs_input_grad(1))
      sums = at::empty({chunks_of(x.numel() / bias.numel()), bias.numel()}, x.options().dtype(at::kFloat));
    if (x.scalar_type() == at::kFloat)
      gelu_backward<float>(x, grad, out, sums);
    else
      gelu_backward<at::BFloat16>(x, grad, out, sums);
    return {out, bias_gradient(sums, bias)};
  }
};

Tensor gelu(const Tensor& x, const std::optional<Tensor>& bias) {
  check(x, "gelu");
  TORCH_CHECK_VALUE(x.dim() > 0 && (!bias || (bias->dim() == 1 && bias->size(0) == x.size(-1))),
                    "gelu: expected x [..., F] and its bias [F], got ", x.sizes());
  return Gelu::apply(x, bias);
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

// LayerNorm (Ba et al., arXiv 1607.06450): weight * (x - mean) / sqrt(variance + eps) + bias; and without a bias, RMSNorm
// (Zhang and Sennrich, arXiv 1910.07467), whose mean is taken to be 0. x is fp32, the result fp32 or bf16.
template <typename Fn>
Vec over_row(int64_t size, const Fn& fn) {  // the sum of fn(column, number of columns) over a row, in every lane
  Vec sum(0.0f);
  for (int64_t c = 0; c < size; c += Vec::size()) sum = sum + fn(c, std::min<int64_t>(Vec::size(), size - c));
  return Vec(at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum));
}

// The values of a vector at the end of a row that belong to it; 0 in the other lanes.
inline Vec first_lanes(const Vec& v, int64_t count) { return Vec::set(Vec(0.0f), v, count); }

template <typename T>
void norm_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, float eps, const Tensor& out,
                  const Tensor& moments) {
  const int64_t size = weight.numel(), rows = x.numel() / size;
  const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  const float* b = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  float* kept = moments.mutable_data_ptr<float>();
  T* to = out.mutable_data_ptr<T>();
  const Vec share(1.0f / float(size));
  at::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
    std::vector<float> space(size);
    for (int64_t r = first; r < last; ++r) {
      const float* row = from + r * size;
      Vec mean(0.0f);
      if (b) mean = over_row(size, [&](int64_t c, int64_t n) { return Vec::loadu(row + c, n); }) * share;
      const Vec variance = over_row(size, [&](int64_t c, int64_t n) {
        const Vec v = first_lanes(Vec::loadu(row + c, n) - mean, n);
        return v * v;
      });
      const Vec inverse = Vec(1.0f) / (variance * share + Vec(eps)).sqrt();
      float* line = result_buffer(to + r * size, space.data());
      for (int64_t c = 0; c < size; c += Vec::size()) {
        const int64_t n = std::min<int64_t>(Vec::size(), size - c);
        const Vec scaled = Vec::loadu(w + c, n) * ((Vec::loadu(row + c, n) - mean) * inverse);
        (b ? scaled + Vec::loadu(b + c, n) : scaled).store(line + c, n);
      }
      keep_result(line, to + r * size, size);
      alignas(64) float both[2][Vec::size()];
      mean.store(both[0]);
      inverse.store(both[1]);
      kept[2 * r] = both[0][0];
      kept[2 * r + 1] = both[1][0];
    }
  });
}

// The gradient of x; and for each chunk of rows those of the weight and, if there is one, of the bias [chunks, 1 or 2, D].
template <typename T>
void norm_backward(const Tensor& x, const Tensor& weight, const Tensor& moments, bool centred, const Tensor& grad,
                   const Tensor& out, const Tensor& sums) {
  const int64_t size = weight.numel(), rows = x.numel() / size, parts = centred ? 2 : 1;
  const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  const float* kept = moments.const_data_ptr<float>();
  const T* up = grad.const_data_ptr<T>();
  float *to = out.mutable_data_ptr<float>(), *totals = sums.mutable_data_ptr<float>();
  const Vec share(1.0f / float(size));
  at::parallel_for(0, sums.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> space(size);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float *of_weight = totals + chunk * parts * size, *of_bias = centred ? of_weight + size : nullptr;
      std::fill(of_weight, of_weight + parts * size, 0.0f);
      for (int64_t r = chunk * kRows; r < std::min(rows, (chunk + 1) * kRows); ++r) {
        const float *row = from + r * size, *g = as_floats(up + r * size, size, space.data());
        const Vec mean(kept[2 * r]), inverse(kept[2 * r + 1]);
        const auto scaled = [&](int64_t c, int64_t n) { return Vec::loadu(g + c, n) * Vec::loadu(w + c, n); };
        const Vec along = inverse * inverse * share * over_row(size, [&](int64_t c, int64_t n) {
          return scaled(c, n) * (Vec::loadu(row + c, n) - mean);
        });
        const Vec level = centred ? over_row(size, scaled) * share : Vec(0.0f);
        for (int64_t c = 0; c < size; c += Vec::size()) {
          const int64_t n = std::min<int64_t>(Vec::size(), size - c);
          const Vec v = Vec::loadu(row + c, n) - mean, gradient = Vec::loadu(g + c, n);
          ((scaled(c, n) - level - v * along) * inverse).store(to + r * size + c, n);
          (Vec::loadu(of_weight + c, n) + gradient * v * inverse).store(of_weight + c, n);
          if (centred) (Vec::loadu(of_bias + c, n) + gradient).store(of_bias + c, n);
        }
      }
    }
  });
}

struct Norm : public Function<Norm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& scale, const std::optional<Tensor>& shift,
                        double eps, bool half) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor x = input.contiguous(), weight = scale.contiguous(), bias = shift ? shift->contiguous() : Tensor();
    const Tensor out = at::empty_like(x, x.options().dtype(half ? at::kBFloat16 : at::kFloat));
    const Tensor moments = at::empty({x.numel() / weight.numel(), 2}, x.options());  // mean, 1 / sqrt(variance + eps)
    if (half)
      norm_forward<at::BFloat16>(x, weight, bias, float(eps), out, moments);
    else
      norm_forward<float>(x, weight, bias, float(eps), out, moments);
    ctx->save_for_backward({x, weight, moments});
    ctx->saved_data["centred"] = bias.defined();
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_once("norm");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], grad = grads[0].contiguous(), out = at::empty_like(x);
    const bool centred = ctx->saved_data["centred"].toBool();
    const int64_t size = weight.numel();
    const Tensor sums = at::empty({chunks_of(x.numel() / size), centred ? 2 : 1, size}, x.options());
    if (grad.scalar_type() == at::kFloat)
      norm_backward<float>(x, weight, saved[2], centred, grad, out, sums);
    else
      norm_backward<at::BFloat16>(x, weight, saved[2], centred, grad, out, sums);
    const bool trained = ctx->needs_input_grad(1) || (centred && ctx->needs_input_grad(2));
    const Tensor of_both = trained ? at::sum(sums, {0}) : Tensor();
    return {out, trained ? of_both[0] : Tensor(), trained && centred ? of_both[1] : Tensor(), Tensor(), Tensor()};
  }
};

void check_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const char* op) {
  const auto fp32 = [](const Tensor& t) { return t.device().is_cpu() && t.scalar_type() == at::kFloat; };
  TORCH_CHECK_VALUE(fp32(x) && fp32(weight) && (!bias || fp32(*bias)), op, ": expected fp32 on the CPU");
  TORCH_CHECK_VALUE(weight.dim() == 1 && x.dim() > 0 && x.size(-1) == weight.size(0) &&
                        (!bias || bias->sizes() == weight.sizes()),
                    op, ": expected x [..., D] and weight [D], got ", x.sizes(), " and ", weight.sizes());
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool half) {
  check_norm(x, weight, bias, "layer_norm");
  return Norm::apply(x, weight, std::optional<Tensor>(bias), eps, half);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, bool half) {
  check_norm(x, weight, std::nullopt, "rms_norm");
  return Norm::apply(x, weight, std::optional<Tensor>(), eps, half);
}

// Rotary embeddings (Su et al., arXiv 2104.09864) of the first columns of each head; the others are copied. The second
// half of these columns is the partner of the first. `back` rotates a gradient back.
inline void rotate_head(const float* __restrict__ in, const float* cos, const float* sin, int64_t turned, int64_t size,
                        bool back, float* __restrict__ out) {
  const int64_t half = turned / 2;
  if (back) {
    for (int64_t d = 0; d < half; ++d) out[d] = in[d] * cos[d] + in[d + half] * sin[d + half];
    for (int64_t d = half; d < turned; ++d) out[d] = in[d] * cos[d] - in[d - half] * sin[d - half];
  } else {
    for (int64_t d = 0; d < half; ++d) out[d] = in[d] * cos[d] - in[d + half] * sin[d];
    for (int64_t d = half; d < turned; ++d) out[d] = in[d] * cos[d] + in[d - half] * sin[d];
  }
  for (int64_t d = turned; d < size; ++d) out[d] = in[d];
}

template <typename T>
void rotate_rows(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& out, bool back) {
  const int64_t heads = x.size(1), tokens = x.size(2), size = x.size(3), turned = cos.size(-1);
  at::parallel_for(0, tokens, 64, [&](int64_t first, int64_t last) {
    std::vector<float> given(size), result(size);
    for (int64_t t = first; t < last; ++t) {
      const float *c = cos.const_data_ptr<float>() + t * turned, *s = sin.const_data_ptr<float>() + t * turned;
      const T* row = x.const_data_ptr<T>() + t * x.stride(2);
      T* to = out.mutable_data_ptr<T>() + t * heads * size;
      for (int64_t h = 0; h < heads; ++h, row += x.stride(1), to += size) {
        rotate_head(as_floats(row, size, given.data()), c, s, turned, size, back, result.data());
        put(result.data(), to, size);
      }
    }
  });
}

Tensor rotated(const Tensor& input, const Tensor& cos, const Tensor& sin, bool back) {
  const Tensor x = input.stride(3) == 1 ? input : input.contiguous();
  const Tensor out = at::empty({1, x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
  if (x.scalar_type() == at::kFloat)
    rotate_rows<float>(x, cos, sin, out, back);
  else
    rotate_rows<at::BFloat16>(x, cos, sin, out, back);
  return out;
}

struct Rotate : public Function<Rotate> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cosine, const Tensor& sine) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor cos = cosine.contiguous(), sin = sine.contiguous();
    ctx->save_for_backward({cos, sin});
    return rotated(x, cos, sin, false);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_once("rotate");
    const variable_list saved = ctx->get_saved_variables();
    return {rotated(grads[0], saved[0], saved[1], true), Tensor(), Tensor()};
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

// GPT-NeoX's joined projection: each head of a row of qkv holds its query, key and value side by side.
template <typename T>
void split_rotated(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const std::array<Tensor, 3>& outs) {
  const int64_t heads = outs[0].size(1), size = outs[0].size(2), turned = cos.size(1), width = heads * size;
  at::parallel_for(0, qkv.size(0), 16, [&](int64_t first, int64_t last) {
    std::vector<float> joined(3 * width), parts(3 * width);
    for (int64_t t = first; t < last; ++t) {
      const float* in = as_floats(qkv.const_data_ptr<T>() + t * 3 * width, 3 * width, joined.data());
      const float *c = cos.const_data_ptr<float>() + t * turned, *s = sin.const_data_ptr<float>() + t * turned;
      for (int64_t h = 0; h < heads; ++h, in += 3 * size) {
        float* out = parts.data() + h * size;
        rotate_head(in, c, s, turned, size, false, out);
        rotate_head(in + size, c, s, turned, size, false, out + width);
        std::copy(in + 2 * size, in + 3 * size, out + 2 * width);
      }
      for (int64_t i = 0; i < 3; ++i)
        put(parts.data() + i * width, outs[i].template mutable_data_ptr<T>() + t * width, width);
    }
  });
}

template <typename T>
void join_gradients(const std::array<Tensor, 3>& grads, const Tensor& cos, const Tensor& sin, const Tensor& out,
                    const Tensor& sums) {
  const int64_t heads = grads[0].size(1), size = grads[0].size(2), turned = cos.size(1), width = heads * size;
  const int64_t rows = out.size(0);
  at::parallel_for(0, chunks_of(rows), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> space(3 * width), joined(3 * width);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* total = sums.defined() ? sums.mutable_data_ptr<float>() + chunk * 3 * width : nullptr;
      if (total) std::fill(total, total + 3 * width, 0.0f);
      for (int64_t t = chunk * kRows; t < std::min(rows, (chunk + 1) * kRows); ++t) {
        const float *c = cos.const_data_ptr<float>() + t * turned, *s = sin.const_data_ptr<float>() + t * turned;
        std::array<const float*, 3> in;
        for (int64_t i = 0; i < 3; ++i)
          in[i] = as_floats(grads[i].template const_data_ptr<T>() + t * width, width, space.data() + i * width);
        for (int64_t h = 0; h < heads; ++h) {
          float* to = joined.data() + 3 * h * size;
          rotate_head(in[0] + h * size, c, s, turned, size, true, to);
          rotate_head(in[1] + h * size, c, s, turned, size, true, to + size);
          std::copy(in[2] + h * size, in[2] + (h + 1) * size, to + 2 * size);
        }
        if (total) {
          for (int64_t d = 0; d < 3 * width; ++d) total[d] += joined[d];
        }
        put(joined.data(), out.mutable_data_ptr<T>() + t * 3 * width, 3 * width);
      }
    }
  });
}

struct RotateQkv : public Function<RotateQkv> {
  static variable_list forward(AutogradContext* ctx, const Tensor& joined, const std::optional<Tensor>& bias,
                               const Tensor& cosine, const Tensor& sine, int64_t heads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor qkv = joined.contiguous(), cos = cosine.contiguous(), sin = sine.contiguous();
    const std::array<int64_t, 3> shape{qkv.size(0), heads, qkv.size(1) / (3 * heads)};
    const std::array<Tensor, 3> outs{at::empty(shape, qkv.options()), at::empty(shape, qkv.options()),
                                     at::empty(shape, qkv.options())};
    if (qkv.scalar_type() == at::kFloat)
      split_rotated<float>(qkv, cos, sin, outs);
    else
      split_rotated<at::BFloat16>(qkv, cos, sin, outs);
    ctx->save_for_backward({cos, sin, bias.value_or(Tensor())});
    return {outs[0], outs[1], outs[2]};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_once("rotate_qkv");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& bias = saved[2];
    const std::array<Tensor, 3> given{grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()};
    const int64_t rows = given[0].size(0), width = 3 * given[0].size(1) * given[0].size(2);
    const Tensor out = at::empty({rows, width}, given[0].options());
    Tensor sums;
    if (bias.defined() && ctx->needs_input_grad(1))
      sums = at::empty({chunks_of(rows), width}, out.options().dtype(at::kFloat));
    if (out.scalar_type() == at::kFloat)
      join_gradients<float>(given, saved[0], saved[1], out, sums);
    else
      join_gradients<at::BFloat16>(given, saved[0], saved[1], out, sums);
    return {out, bias_gradient(sums, bias), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> rotate_qkv(const Tensor& qkv, const std::optional<Tensor>& bias, const Tensor& cos,
                                              const Tensor& sin, int64_t heads) {
  check(qkv, "rotate_qkv");
  TORCH_CHECK_VALUE(qkv.dim() == 2 && heads > 0 && qkv.size(1) % (3 * heads) == 0 && cos.dim() == 2 &&
                        cos.size(0) == qkv.size(0) && cos.size(1) <= qkv.size(1) / (3 * heads) &&
                        cos.size(1) % 2 == 0 && cos.sizes() == sin.sizes() && cos.scalar_type() == at::kFloat &&
                        sin.scalar_type() == at::kFloat && (!bias || bias->numel() == qkv.size(1)),
                    "rotate_qkv: expected qkv [T, 3 H K] with its bias and fp32 cos and sin [T, R], got ", qkv.sizes(),
                    ", ", cos.sizes(), ", ", sin.sizes());
  const variable_list found = RotateQkv::apply(qkv, bias, cos, sin, heads);
  return {found[0], found[1], found[2]};
}

}  // namespace
}  // namespace rmcore

TORCH_LIBRARY_FRAGMENT(rmcore, m) {
  m.def("gelu(Tensor x, Tensor? bias) -> Tensor", TORCH_FN(rmcore::gelu));
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor", TORCH_FN(rmcore::swiglu));
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, bool half) -> Tensor",
        TORCH_FN(rmcore::layer_norm));
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool half) -> Tensor", TORCH_FN(rmcore::rms_norm));
  m.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor", TORCH_FN(rmcore::rotate));
  m.def("rotate_qkv(Tensor qkv, Tensor? bias, Tensor cos, Tensor sin, int heads) -> (Tensor, Tensor, Tensor)",
        TORCH_FN(rmcore::rotate_qkv));
}
