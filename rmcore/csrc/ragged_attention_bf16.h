// The ragged attention with bf16 products, on CPUs that have them.
//
// Input: arguments that ragged_attention.cpp has checked, and the tensors for the results.
// Output: true, and the results of the contract. Or false, and nothing done: v is not bf16, q or k is neither bf16 nor
// fp32, there is a window, the scale is not positive, a prefix does not begin at an even row of one segment, or the CPU
// is without AVX512-BF16.
#pragma once

#include "segments.h"

#include <ATen/core/Tensor.h>

#include <vector>

namespace rmcore {

bool forward_bf16(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::vector<Group>& groups,
                  double scale, int64_t window, const at::Tensor& out, const at::Tensor& log_sum);

bool backward_bf16(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& log_sum, const std::vector<Group>& groups, double scale, int64_t window,
                   const at::Tensor& grad_q, const at::Tensor& grad_k, const at::Tensor& grad_v);

}  // namespace rmcore
