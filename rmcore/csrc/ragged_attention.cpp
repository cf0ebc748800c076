// rmcore::ragged_attention on the CPU: exact softmax attention over packed comparisons that share their prompt.
// The contract is rmcore/ops/ragged_attention.py. In the comments below, hd is the head size (K in the legend of
// rmcore/__init__.py) and hd_v that of the values (V), and P, K, V and dS are the matrices of attention.
//
// Input: q [T, H, hd], k [T, G, hd], v [T, G, hd_v], segments [S, 4].
// Output: out [T, H, hd_v] and the log-sum-exp of each query's scores [T, H]; in the backward dq, dk and dv.
// Example: a prefix of 200 rows and a tail of 40. The strip of rows 12 .. 17 of the tail computes 200 + 18 columns, and
// sets the last 5, 4 .. 0 columns of its rows to zero.
//
// Segments that share rows form a group (a comparison). One task is one group and one key/value head: it packs the K
// and V of that head once, in fp32, and owns their gradients. So nothing is added across tasks, and reruns are bitwise
// equal. Threads take the tasks from a shared counter, the largest first. A task processes its queries in strips of 6
// rows; the keys of a strip are the columns of [prefix, own rows], cut at the diagonal. Where v is bf16 and the CPU has
// bf16 products, ragged_attention_bf16.cpp takes the place of this file.
#include "kernels.h"
#include "ragged_attention_bf16.h"
#include "segments.h"
#include "tiles.h"

#include <ATen/ops/logaddexp.h>

#include <cmath>
#include <vector>

namespace rmcore {
namespace {

// row[begin .. end) -> exp(row - max); returns max and the sum of the exponentials.
template <typename T>
std::pair<T, T> exponentials(T* row, int64_t begin, int64_t end) {
  using Vec = Vectorized<T>;
  Vec top(T(-1e30)), sum(T(0));
  for (int64_t c = begin; c < end; c += lanes<T>()) top = at::vec::maximum(top, Vec::loadu(row + c));
  const T highest = at::vec::vec_reduce_all<T>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
  const Vec shift(highest);
  for (int64_t c = begin; c < end; c += lanes<T>()) {
    const Vec e = exponential(Vec::loadu(row + c) - shift);
    sum = sum + e;
    e.store(row + c);
  }
  return {highest, at::vec::vec_reduce_all<T>([](Vec& a, Vec& b) { return a + b; }, sum)};
}

// One past the last column of whole vectors that begin at strip.begin.
template <typename T>
int64_t vector_end(const Strip& strip) {
  return strip.begin + round_up(strip.end - strip.begin, lanes<T>());
}

template <typename T>
struct Inputs {
  at::Tensor q, k, v, slopes;
  double scale, softcap;
  int64_t window, share;  // share: query heads per key/value head

  T slope(int64_t h) const { return slopes.defined() ? slopes.const_data_ptr<T>()[h] : T(0); }
};

// What a score becomes before the softmax: cap * tanh(score / cap), plus slope * (key - query) of their positions. The
// derivative of the first is written to `derivative` unless it is null.
template <typename T>
void adjust(const Inputs<T>& in, int64_t h, int64_t begin, int64_t end, int64_t position, T* row, T* derivative) {
  using Vec = Vectorized<T>;
  if (in.softcap > 0) {
    const Vec cap(T(in.softcap)), inverse(T(1 / in.softcap)), one(T(1));
    for (int64_t c = begin; c < end; c += lanes<T>()) {
      const Vec bent = (Vec::loadu(row + c) * inverse).tanh();
      (bent * cap).store(row + c);
      if (derivative != nullptr) (one - bent * bent).store(derivative + c);
    }
  }
  if (in.slopes.defined()) {
    const T slope = in.slope(h);
    for (int64_t c = begin; c < end; ++c) row[c] += slope * T(c - position);
  }
}

template <typename T>
void forward_task(const Inputs<T>& in, const Group& group, int64_t g, const at::Tensor& out,
                  const at::Tensor& log_sum) {
  const Shape shape = shape_of<T>(group, in.q.size(2), in.v.size(2));
  Scratch<T> scratch;
  T* rows = scratch.take(shape.rows * std::max(shape.ld, shape.ld_v));
  T* keys = scratch.take(shape.hd * shape.ldt + lanes<T>());
  T* scores = scratch.take(kStrip * shape.width);
  T* queries = scratch.take(kStrip * shape.ld);
  T* result = scratch.take(kStrip * shape.ld_v);
  HeadView(in.k, g).load(group.start, shape.rows, shape.hd, T(1), rows, shape.ld);
  transpose(rows, shape.rows, shape.ld, shape.hd, keys, shape.ldt);
  HeadView(in.v, g).load(group.start, shape.rows, shape.hd_v, T(1), rows, shape.ld_v);
  for (int64_t h = g * in.share; h < (g + 1) * in.share; ++h) {
    const HeadView q(in.q, h), o(out, h);
    T* sums = log_sum.mutable_data_ptr<T>() + h;
    for (const Segment& s : group.segments) {
      const int64_t length = s.query_end - s.query_start;
      for (int64_t first = 0; first < length; first += kStrip) {
        const Strip strip(s, group, first, std::min(kStrip, length - first), in.window);
        const int64_t end = vector_end<T>(strip);
        q.load(s.query_start + first, strip.count, shape.hd, T(in.scale), queries, shape.ld);
        against_keys(strip, shape.hd, queries, shape.ld, keys, shape.ldt, scores, shape.width);
        T inverse[kStrip];
        for (int64_t r = 0; r < strip.count; ++r) {
          adjust<T>(in, h, strip.begin, end, s.prefix() + first + r, scores + r * shape.width, nullptr);
          hide(strip, s.prefix(), in.window, r, end, scores + r * shape.width);
          const auto [top, sum] = exponentials(scores + r * shape.width, strip.begin, end);
          sums[(s.query_start + first + r) * in.q.size(1)] = top + std::log(sum);
          inverse[r] = T(1) / sum;
        }
        times_rows(strip, shape.hd_v, scores, shape.width, rows, shape.ld_v, result);
        for (int64_t r = 0; r < strip.count; ++r) {
          o.store(s.query_start + first + r, 1, shape.hd_v, inverse[r], result + r * shape.ld_v, shape.ld_v);
        }
      }
    }
  }
}

// P and dS of one row, in place: scores -> P = exp(scores - log_sum), grad -> dS = P * (grad - sum(P * grad)).
template <typename T>
void softmax_backward(T* scores, T* grad, int64_t begin, int64_t end, T log_sum) {
  using Vec = Vectorized<T>;
  Vec sum(T(0));
  const Vec shift(log_sum);
  for (int64_t c = begin; c < end; c += lanes<T>()) {
    const Vec p = exponential(Vec::loadu(scores + c) - shift);
    p.store(scores + c);
    sum = at::vec::fmadd(p, Vec::loadu(grad + c), sum);
  }
  const Vec delta(at::vec::vec_reduce_all<T>([](Vec& a, Vec& b) { return a + b; }, sum));
  for (int64_t c = begin; c < end; c += lanes<T>())
    (Vec::loadu(scores + c) * (Vec::loadu(grad + c) - delta)).store(grad + c);
}

template <typename T>
struct BackwardBuffers {
  T *keys, *values, *key_rows;     // K^T [hd, ldt], V^T [hd_v, ldt]; K [rows, ld] (first V [rows, ld_v])
  T *grad_k, *grad_v;              // [rows, ld], [rows, ld_v]
  T *chance, *grad_scores;         // P and dS of a block [kBlock, width]
  T *queries, *grad_out, *grad_q;  // of a block [kBlock, ld]; grad_out [kBlock, ld_v]
  T* derivative;                   // of the soft cap, for one row [width]

  BackwardBuffers(Scratch<T>& scratch, const Shape& s) {
    keys = scratch.take(s.hd * s.ldt + lanes<T>());
    values = scratch.take(s.hd_v * s.ldt + lanes<T>());
    key_rows = scratch.take(s.rows * std::max(s.ld, s.ld_v));
    grad_k = scratch.take(s.rows * s.ld);
    grad_v = scratch.take(s.rows * s.ld_v);
    for (T** p : {&chance, &grad_scores}) *p = scratch.take(kBlock * s.width);
    for (T** p : {&queries, &grad_q}) *p = scratch.take(kBlock * s.ld);
    grad_out = scratch.take(kBlock * s.ld_v);
    derivative = scratch.take(s.width);
  }
};

template <typename T>
void backward_block(const Inputs<T>& in, const Group& group, const Segment& s, int64_t h, int64_t first,
                    const T* log_sum, const Shape& shape, const BackwardBuffers<T>& b) {
  const Strip block(s, group, first, std::min(kBlock, s.query_end - s.query_start - first), in.window);
  for (int64_t r0 = 0; r0 < block.count; r0 += kStrip) {
    const Strip strip(s, group, first + r0, std::min(kStrip, block.count - r0), in.window);
    const int64_t end = vector_end<T>(strip);
    T* scores = b.chance + r0 * shape.width;
    T* grad = b.grad_scores + r0 * shape.width;
    against_keys(strip, shape.hd, b.queries + r0 * shape.ld, shape.ld, b.keys, shape.ldt, scores, shape.width);
    against_keys(strip, shape.hd_v, b.grad_out + r0 * shape.ld_v, shape.ld_v, b.values, shape.ldt, grad, shape.width);
    for (int64_t r = 0; r < strip.count; ++r, scores += shape.width, grad += shape.width) {
      adjust<T>(in, h, strip.begin, end, s.prefix() + strip.first + r, scores, b.derivative);
      hide(strip, s.prefix(), in.window, r, end, scores);
      softmax_backward(scores, grad, strip.begin, end, log_sum[(s.query_start + strip.first + r) * in.q.size(1)]);
      if (in.softcap > 0) {
        for (int64_t c = strip.begin; c < end; ++c) grad[c] *= b.derivative[c];
      }
      for (T* row : {scores, grad}) {  // add_to_keys reads the whole width of the block
        std::fill(row + block.begin, row + strip.begin, T(0));
        std::fill(row + end, row + std::max(end, block.end + kStrip), T(0));
      }
    }
    times_rows(strip, shape.hd, b.grad_scores + r0 * shape.width, shape.width, b.key_rows, shape.ld,
               b.grad_q + r0 * shape.ld);
  }
  add_to_keys(block, shape.hd_v, s.prefix(), in.window, b.chance, shape.width, b.grad_out, shape.ld_v, b.grad_v);
  add_to_keys(block, shape.hd, s.prefix(), in.window, b.grad_scores, shape.width, b.queries, shape.ld, b.grad_k);
}

template <typename T>
void backward_task(const Inputs<T>& in, const Group& group, int64_t g, const at::Tensor& grad_out,
                   const at::Tensor& log_sum, const at::Tensor& grad_q, const at::Tensor& grad_k,
                   const at::Tensor& grad_v) {
  const Shape shape = shape_of<T>(group, in.q.size(2), in.v.size(2));
  Scratch<T> scratch;
  const BackwardBuffers<T> b(scratch, shape);
  HeadView(in.v, g).load(group.start, shape.rows, shape.hd_v, T(1), b.key_rows, shape.ld_v);
  transpose(b.key_rows, shape.rows, shape.ld_v, shape.hd_v, b.values, shape.ldt);
  HeadView(in.k, g).load(group.start, shape.rows, shape.hd, T(1), b.key_rows, shape.ld);
  transpose(b.key_rows, shape.rows, shape.ld, shape.hd, b.keys, shape.ldt);
  for (int64_t h = g * in.share; h < (g + 1) * in.share; ++h) {
    const HeadView q(in.q, h), grad(grad_out, h), dq(grad_q, h);
    for (const Segment& s : group.segments) {
      const int64_t length = s.query_end - s.query_start;
      for (int64_t first = 0; first < length; first += kBlock) {
        const int64_t count = std::min(kBlock, length - first);
        q.load(s.query_start + first, count, shape.hd, T(in.scale), b.queries, shape.ld);
        grad.load(s.query_start + first, count, shape.hd_v, T(1), b.grad_out, shape.ld_v);
        backward_block(in, group, s, h, first, log_sum.const_data_ptr<T>() + h, shape, b);
        dq.store(s.query_start + first, count, shape.hd, T(in.scale), b.grad_q, shape.ld);
      }
    }
  }
  HeadView(grad_k, g).store(group.start, shape.rows, shape.hd, T(1), b.grad_k, shape.ld);
  HeadView(grad_v, g).store(group.start, shape.rows, shape.hd_v, T(1), b.grad_v, shape.ld_v);
}

void check_shapes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t window) {
  TORCH_CHECK_VALUE(q.device().is_cpu() && k.device().is_cpu() && v.device().is_cpu(),
                    "ragged_attention: q, k, v must be on one device");
  TORCH_CHECK_VALUE(
      q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && k.sizes().slice(0, 2) == v.sizes().slice(0, 2) &&
          q.size(0) == k.size(0) && q.size(2) == k.size(2),
      "ragged_attention: expected q [T, H, K], k [T, G, K] and v [T, G, V], got ", q.sizes(), ", ", k.sizes(), ", ",
      v.sizes());
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "ragged_attention: query heads must be a multiple of key heads");
  TORCH_CHECK_VALUE(window >= 0, "ragged_attention: window must be 0 (none) or positive");
}

at::Tensor unit_stride(const at::Tensor& t) { return t.stride(2) == 1 ? t : t.contiguous(); }

at::ScalarType accumulate_dtype(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const bool wide = q.scalar_type() == at::kDouble || k.scalar_type() == at::kDouble || v.scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

template <typename T>
Inputs<T> inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& slopes,
                 at::ScalarType dtype, double scale, double softcap, int64_t window) {
  const at::Tensor slope = slopes ? slopes->to(dtype).contiguous() : at::Tensor();
  return {unit_stride(q), unit_stride(k), unit_stride(v), slope, scale, softcap, window, q.size(1) / k.size(1)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                     const at::Tensor& segments, double scale, int64_t window,
                                                     double softcap, const std::optional<at::Tensor>& sinks,
                                                     const std::optional<at::Tensor>& slopes) {
  check_shapes(q, k, v, window);
  const std::vector<Group> groups = read_groups(segments, q.size(0));
  at::Tensor out = v.new_empty({q.size(0), q.size(1), v.size(2)});
  at::Tensor log_sum = q.new_empty({q.size(0), q.size(1)}, q.options().dtype(accumulate_dtype(q, k, v)));
  const bool plain = softcap == 0 && !slopes;
  if (!plain || !forward_bf16(unit_stride(q), unit_stride(k), unit_stride(v), groups, scale, window, out, log_sum)) {
    const auto run = [&](auto kind) {
      using T = decltype(kind);
      const Inputs<T> in = inputs<T>(q, k, v, slopes, log_sum.scalar_type(), scale, softcap, window);
      for_each_task(groups, k.size(1),
                    [&](const Group& group, int64_t g) { forward_task<T>(in, group, g, out, log_sum); });
    };
    log_sum.scalar_type() == at::kDouble ? run(double()) : run(float());
  }
  if (sinks) {  // one more key with the score of the sink and a value of zero
    const at::Tensor total = at::logaddexp(log_sum, sinks->to(log_sum.scalar_type()));
    out.mul_(log_sum.sub(total).exp().unsqueeze(-1));
    log_sum = total;
  }
  return {out, log_sum};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad_out, const at::Tensor& q,
                                                                  const at::Tensor& k, const at::Tensor& v,
                                                                  const at::Tensor& log_sum,
                                                                  const at::Tensor& segments, double scale,
                                                                  int64_t window, double softcap,
                                                                  const std::optional<at::Tensor>& slopes) {
  check_shapes(q, k, v, window);
  TORCH_CHECK_VALUE(grad_out.dim() == 3 && grad_out.size(0) == q.size(0) && grad_out.size(1) == q.size(1) &&
                        grad_out.size(2) == v.size(2) && grad_out.device().is_cpu(),
                    "ragged_attention: grad_out must be on the CPU and like the output, got ", grad_out.sizes());
  TORCH_CHECK_VALUE(log_sum.sizes() == q.sizes().slice(0, 2) && log_sum.is_contiguous() && log_sum.device().is_cpu() &&
                        log_sum.scalar_type() == accumulate_dtype(q, k, v),
                    "ragged_attention: log_sum must be what the forward returned");
  const std::vector<Group> groups = read_groups(segments, q.size(0));
  at::Tensor grad_q = q.new_empty(q.sizes());
  at::Tensor grad_k = k.new_empty(k.sizes());
  at::Tensor grad_v = v.new_empty(v.sizes());
  const at::Tensor grad = unit_stride(grad_out);
  const bool plain = softcap == 0 && !slopes;
  if (plain &&
      backward_bf16(grad, unit_stride(q), unit_stride(k), unit_stride(v), log_sum, groups, scale, window, grad_q,
                    grad_k, grad_v))
    return {grad_q, grad_k, grad_v};
  const auto run = [&](auto kind) {
    using T = decltype(kind);
    const Inputs<T> in = inputs<T>(q, k, v, slopes, log_sum.scalar_type(), scale, softcap, window);
    for_each_task(groups, k.size(1), [&](const Group& group, int64_t g) {
      backward_task<T>(in, group, g, grad, log_sum, grad_q, grad_k, grad_v);
    });
  };
  log_sum.scalar_type() == at::kDouble ? run(double()) : run(float());
  return {grad_q, grad_k, grad_v};
}

}  // namespace rmcore
