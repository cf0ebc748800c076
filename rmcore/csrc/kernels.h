// The kernels that register.cpp registers. Only that file includes <torch/library.h>, which takes the compiler longer
// to read than most kernels take to compile.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace rmcore {

// pairwise.cpp; the contract is rmcore/ops/pairwise.py
std::tuple<at::Tensor, at::Tensor, at::Tensor> pairwise_forward(
    const at::Tensor& hidden, const at::Tensor& score_weight, const at::Tensor& last_token_index,
    const at::Tensor& winner, const at::Tensor& loser, const at::Tensor& margin, const at::Tensor& weight,
    double label_smoothing, double centering);
std::tuple<at::Tensor, at::Tensor> pairwise_backward(const at::Tensor& grad_reward, const at::Tensor& scored,
                                                     const at::Tensor& score_weight,
                                                     const at::Tensor& last_token_index, int64_t tokens);

// ragged_attention.cpp; the contract is rmcore/ops/ragged_attention.py
std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                     const at::Tensor& segments, double scale, int64_t window,
                                                     double softcap, const std::optional<at::Tensor>& sinks,
                                                     const std::optional<at::Tensor>& slopes);
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad_out, const at::Tensor& q,
                                                                  const at::Tensor& k, const at::Tensor& v,
                                                                  const at::Tensor& log_sum,
                                                                  const at::Tensor& segments, double scale,
                                                                  int64_t window, double softcap,
                                                                  const std::optional<at::Tensor>& slopes);

}  // namespace rmcore
