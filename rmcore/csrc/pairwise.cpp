// rmcore::pairwise_forward and rmcore::pairwise_backward on the CPU. The contract is rmcore/ops/pairwise.py.
//
// Input: hidden [T, D], the score weight [D], the row of each answer's last token, the pairs.
// Output: the summed loss, the rewards and d loss / d rewards; in the backward, d hidden [T, D] (each row is written
// once) and d weight.
// Example: see the contract.
//
// Rewards are dot products in fp32 (fp64 for fp64 input); one thread computes an answer. Pairs are few, and one thread
// sums them in their order. Each column of d weight is a sum over the answers in their order. So no result depends on
// the number of threads.
#include "kernels.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace rmcore {
namespace {

using at::vec::Vectorized;

// One vector: Vectorized<T>::size() elements of Src, widened to T.
template <typename T, typename Src>
Vectorized<T> load_as(const Src* src) {
  if constexpr (std::is_same_v<T, Src>) {
    return Vectorized<T>::loadu(src);
  } else {
    alignas(64) T wide[Vectorized<T>::size()];
    for (int i = 0; i < Vectorized<T>::size(); ++i) wide[i] = static_cast<T>(src[i]);
    return Vectorized<T>::loadu(wide);
  }
}

template <typename T, typename Src>
T dot(const Src* a, const T* b, int64_t n) {
  using Vec = Vectorized<T>;
  constexpr int64_t lanes = Vec::size();
  Vec sum[4] = {Vec(T(0)), Vec(T(0)), Vec(T(0)), Vec(T(0))};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    for (int j = 0; j < 4; ++j) {
      sum[j] = at::vec::fmadd(load_as<T>(a + i + j * lanes), Vec::loadu(b + i + j * lanes), sum[j]);
    }
  }
  for (; i + lanes <= n; i += lanes) sum[0] = at::vec::fmadd(load_as<T>(a + i), Vec::loadu(b + i), sum[0]);
  const Vec total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  T result = at::vec::vec_reduce_all<T>([](Vec& x, Vec& y) { return x + y; }, total);
  for (; i < n; ++i) result += static_cast<T>(a[i]) * b[i];
  return result;
}

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
      TORCH_CHECK_VALUE(false, "pairwise_loss: fp32, bf16, fp16 or fp64 expected, got ", dtype);
  }
}

// fn(T(), Src()): the type of the sums, and the type of the tensor's elements.
template <typename Fn>
void by_precision(at::ScalarType dtype, const Fn& fn) {
  by_dtype(dtype, [&](auto kind) {
    using Src = decltype(kind);
    if constexpr (std::is_same_v<Src, double>)
      fn(double(), Src());
    else
      fn(float(), Src());
  });
}

at::ScalarType accumulate_dtype(const at::Tensor& hidden) {
  return hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_index(const at::Tensor& index, int64_t bound, const char* name) {
  TORCH_CHECK_VALUE(index.device().is_cpu() && index.dim() == 1 && index.scalar_type() == at::kLong,
                    "pairwise_loss: ", name, " must be one int64 row on the CPU, got ", index.scalar_type(), " ",
                    index.sizes(), " on ", index.device());
  const int64_t* p = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    TORCH_CHECK_INDEX(p[i] >= 0 && p[i] < bound, "pairwise_loss: ", name, "[", i, "] is ", p[i], ", outside 0 .. ",
                      bound - 1);
  }
}

at::Tensor row_of(const at::Tensor& t, at::ScalarType dtype, int64_t length, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.dim() == 1 && t.size(0) == length && t.is_floating_point(),
                    "pairwise_loss: ", name, " must be ", length, " floating numbers on the CPU, got ", t.scalar_type(),
                    " ", t.sizes(), " on ", t.device());
  return t.to(dtype).contiguous();
}

template <typename T>
T softplus(T x) {  // -logsigmoid(-x) = log(1 + e^x), without overflow
  return std::max(x, T(0)) + std::log1p(std::exp(-std::abs(x)));
}

template <typename T>
T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

template <typename T>
void score_pairs(const at::Tensor& rewards, const at::Tensor& winner, const at::Tensor& loser, const at::Tensor& margin,
                 const at::Tensor& weight, double label_smoothing, double centering, const at::Tensor& loss,
                 const at::Tensor& reward_grad) {
  const T* r = rewards.const_data_ptr<T>();
  const int64_t* w = winner.const_data_ptr<int64_t>();
  const int64_t* l = loser.const_data_ptr<int64_t>();
  const T* m = margin.const_data_ptr<T>();
  const T* pair_weight = weight.const_data_ptr<T>();
  T* grad = reward_grad.mutable_data_ptr<T>();
  std::fill(grad, grad + reward_grad.numel(), T(0));
  // As in the reference: d enters a pair's loss through r_winner - r_loser, `total` through r_winner + r_loser.
  const T eps = static_cast<T>(label_smoothing), keep = static_cast<T>(1 - label_smoothing),
          c = static_cast<T>(centering);
  double sum = 0;
  for (int64_t p = 0; p < winner.numel(); ++p) {
    const T d = r[w[p]] - r[l[p]] - m[p];
    const T total = r[w[p]] + r[l[p]];
    const T trouble = T(0) * d;  // NaN for an infinite reward, which the loss would hide; otherwise 0
    sum += pair_weight[p] * (keep * softplus(-d) + eps * softplus(d) + c * total * total) + trouble;
    const T slope = pair_weight[p] * (eps * sigmoid(d) - keep * sigmoid(-d)) + trouble;
    const T pull = pair_weight[p] * 2 * c * total;
    grad[w[p]] += pull + slope;
    grad[l[p]] += pull - slope;
  }
  *loss.mutable_data_ptr<T>() = static_cast<T>(sum);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> pairwise_forward(
    const at::Tensor& hidden, const at::Tensor& score_weight, const at::Tensor& last_token_index,
    const at::Tensor& winner, const at::Tensor& loser, const at::Tensor& margin, const at::Tensor& weight,
    double label_smoothing, double centering) {
  TORCH_CHECK_VALUE(hidden.dim() == 2 && hidden.device().is_cpu(),
                    "pairwise_loss: hidden must be [T, D] on the CPU, got ", hidden.sizes());
  const at::ScalarType dtype = accumulate_dtype(hidden);
  const at::Tensor rows = hidden.stride(1) == 1 ? hidden : hidden.contiguous();
  const at::Tensor head = row_of(score_weight, dtype, hidden.size(1), "score_weight");
  const at::Tensor index = last_token_index.contiguous(), winners = winner.contiguous(), losers = loser.contiguous();
  const int64_t answers = index.numel(), size = hidden.size(1);
  check_index(index, hidden.size(0), "last_token_index");
  check_index(winners, answers, "winner");
  check_index(losers, answers, "loser");
  TORCH_CHECK_VALUE(winners.numel() == losers.numel(), "pairwise_loss: ", winners.numel(), " winners but ",
                    losers.numel(), " losers");
  const at::Tensor margins = row_of(margin, dtype, winners.numel(), "margin");
  const at::Tensor weights = row_of(weight, dtype, winners.numel(), "weight");
  const at::Tensor rewards = hidden.new_empty({answers}, hidden.options().dtype(dtype));
  const at::Tensor reward_grad = rewards.new_empty({answers});
  const at::Tensor loss = rewards.new_empty(at::IntArrayRef());
  by_precision(hidden.scalar_type(), [&](auto wide, auto kind) {
    using T = decltype(wide);
    using Src = decltype(kind);
    const int64_t* row = index.const_data_ptr<int64_t>();
    at::parallel_for(0, answers, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, size)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t a = begin; a < end; ++a) {
                         rewards.mutable_data_ptr<T>()[a] =
                             dot(rows.const_data_ptr<Src>() + row[a] * rows.stride(0), head.const_data_ptr<T>(), size);
                       }
                     });
    score_pairs<T>(rewards, winners, losers, margins, weights, label_smoothing, centering, loss, reward_grad);
  });
  return {loss, rewards, reward_grad};
}

namespace {

// d weight [D] = sum over answers of grad[a] * scored[a, D]
template <typename T, typename Src>
void weight_gradient(const at::Tensor& grad_reward, const at::Tensor& scored, const at::Tensor& result) {
  const T* grad = grad_reward.const_data_ptr<T>();
  const int64_t answers = scored.size(0), stride = scored.stride(0);
  const int64_t grain = std::max<int64_t>(64, 32768 / std::max<int64_t>(1, answers));
  at::parallel_for(0, scored.size(1), grain, [&](int64_t begin, int64_t end) {
    T* sum = result.mutable_data_ptr<T>();
    std::fill(sum + begin, sum + end, T(0));
    for (int64_t a = 0; a < answers; ++a) {
      const Src* row = scored.const_data_ptr<Src>() + a * stride;
      for (int64_t d = begin; d < end; ++d) sum[d] += grad[a] * static_cast<T>(row[d]);
    }
  });
}

// Row t of d hidden is (the sum of the gradients of the answers scored at row t) * weight, or 0 without such an answer.
// Answers are added in their order. memset clears memory that the process has used before at up to three times the rate
// of vector stores (168 MB, AMD EPYC, glibc 2.36, one thread), because it does not read what it overwrites.
template <typename T, typename Src>
void hidden_gradient(const at::Tensor& grad_reward, const at::Tensor& head, const at::Tensor& index,
                     const at::Tensor& result) {
  const int64_t tokens = result.size(0), size = result.size(1);
  std::vector<T> row_grad(tokens, T(0));
  std::vector<char> scored(tokens, 0);
  for (int64_t a = 0; a < index.numel(); ++a) {
    const int64_t row = index.const_data_ptr<int64_t>()[a];
    row_grad[row] += grad_reward.const_data_ptr<T>()[a];
    scored[row] = 1;
  }
  const T* weight = head.const_data_ptr<T>();
  at::parallel_for(0, tokens, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, size)),
                   [&](int64_t begin, int64_t end) {
                     Src* out = result.mutable_data_ptr<Src>();
                     std::memset(static_cast<void*>(out + begin * size), 0, (end - begin) * size * sizeof(Src));
                     for (int64_t t = begin; t < end; ++t) {
                       if (!scored[t]) continue;
                       for (int64_t d = 0; d < size; ++d) {
                         out[t * size + d] = static_cast<Src>(row_grad[t] * weight[d]);
                       }
                     }
                   });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> pairwise_backward(const at::Tensor& grad_reward, const at::Tensor& scored,
                                                     const at::Tensor& score_weight,
                                                     const at::Tensor& last_token_index, int64_t tokens) {
  TORCH_CHECK_VALUE(scored.dim() == 2 && scored.device().is_cpu() && tokens >= 0,
                    "pairwise_loss: scored must be [A, D] on the CPU");
  const at::ScalarType dtype = accumulate_dtype(scored);
  const at::Tensor rows = scored.stride(1) == 1 ? scored : scored.contiguous();
  const at::Tensor grad = row_of(grad_reward, dtype, scored.size(0), "grad_reward");
  const at::Tensor head = row_of(score_weight, dtype, scored.size(1), "score_weight");
  const at::Tensor index = last_token_index.contiguous();
  check_index(index, tokens, "last_token_index");
  TORCH_CHECK_VALUE(index.numel() == scored.size(0), "pairwise_loss: expected one scored row per index");
  const at::Tensor grad_hidden = scored.new_empty({tokens, scored.size(1)});
  const at::Tensor grad_weight = scored.new_empty({scored.size(1)}, scored.options().dtype(dtype));
  by_precision(scored.scalar_type(), [&](auto wide, auto kind) {
    using T = decltype(wide);
    using Src = decltype(kind);
    weight_gradient<T, Src>(grad, rows, grad_weight);
    hidden_gradient<T, Src>(grad, head, index, grad_hidden);
  });
  return {grad_hidden, grad_weight.to(score_weight.scalar_type())};
}

}  // namespace rmcore
