// The ragged attention with bf16 products. Input and output: see ragged_attention_bf16.h. It follows the plan of
// ragged_attention.cpp: one task is one group and one key/value head, with strips of 6 queries, and blocks of 48
// queries for the gradients of keys and values.
//
// The factors of all products are bf16, as in PyTorch's own attention at that precision and under autocast: q, k, v,
// the probabilities P and their gradients dS. fp32 q and k, which the rotary embedding returns under autocast, are
// rounded when they are read. Sums, the softmax and the gradients of keys and values stay in fp32.
//
// A 32-bit word holds two numbers of the inner dimension. Therefore each segment begins at an even row of its group's
// packed rows, and its own keys begin at an even column. Example: a prefix of 5 and answers of 3 and 4 rows have the
// packed rows 0 .. 8 and 8 .. 12; the columns of the second answer are 0 .. 5, a hidden one, and 6 .. 10.
#include "ragged_attention_bf16.h"

#include "pairs.h"

#include <array>
#include <optional>

namespace rmcore {
#ifdef RMCORE_HAS_BF16
namespace {

// `packed`: the places of the segments among the packed rows, with prefixes rounded up to whole pairs; `given`: their
// places in the packed row of the batch.
struct PackedGroup {
  Group packed;
  std::vector<Segment> given;
};

std::optional<PackedGroup> pack(const Group& group) {
  PackedGroup found{{{}, 0, 0, group.cost}, group.segments};
  for (const Segment& s : group.segments) {
    Segment p{found.packed.end, found.packed.end + s.query_end - s.query_start, 0, 0};
    if (s.prefix() > 0) {
      size_t in = 0;
      while (in < found.packed.segments.size() && found.given[in].query_end < s.prefix_end) ++in;
      const int64_t offset = in < found.packed.segments.size() ? s.prefix_start - found.given[in].query_start : -1;
      if (offset < 0 || offset % 2 != 0) return std::nullopt;
      p.prefix_start = found.packed.segments[in].query_start + offset;
      p.prefix_end = p.prefix_start + round_up(s.prefix(), 2);
    }
    found.packed.segments.push_back(p);
    found.packed.end += round_up(p.query_end - p.query_start, 2);
  }
  return found;
}

std::vector<PackedGroup> pack(const std::vector<Group>& groups, std::vector<Group>& tasks) {
  std::vector<PackedGroup> packed;
  for (const Group& group : groups) {
    std::optional<PackedGroup> one = pack(group);
    if (!one) return {};
    tasks.push_back({{}, static_cast<int64_t>(packed.size()), static_cast<int64_t>(packed.size()) + 1, group.cost});
    packed.push_back(std::move(*one));
  }
  return packed;
}

bool serves(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale, int64_t window) {
  const auto fits = [](const at::Tensor& t) { return t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kFloat; };
  return v.scalar_type() == at::kBFloat16 && fits(q) && fits(k) && window == 0 && scale > 0 && has_bf16();
}

struct PairShape {
  int64_t hd, depth, ld;           // head size; words per row; and words per row that is paired with the next row
  int64_t rows, ldt, width, wide;  // packed rows; row lengths of [depth, rows], of scores, and of scores as pairs

  PairShape(const Group& packed, int64_t head)
      : hd(head), depth((head + 1) / 2), ld(round_up(head, 16)), rows(packed.end), ldt(round_up(rows, 16) + 16) {
    if (ldt % 256 == 0) ldt += 16;  // rows a page apart would share the same cache sets
    width = round_up(rows, 16) + 32;
    wide = width / 2;
  }
};

// The rows of one head in both layouts: paired along the head, transposed [depth, ldt]; paired along the rows
// [rows / 2, ld].
struct PackedHead {
  Pair *columns, *rows;

  PackedHead(Scratch<Pair>& scratch, const HeadView& head, const PackedGroup& group, const PairShape& shape,
             bool with_rows) {
    Pair* lines = scratch.take(shape.rows * shape.depth);
    for (size_t i = 0; i < group.given.size(); ++i) {
      const Segment& s = group.given[i];
      load_pairs(head, s.query_start, s.query_end - s.query_start, shape.hd,
                 lines + group.packed.segments[i].query_start * shape.depth, shape.depth);
    }
    columns = scratch.take(shape.depth * shape.ldt + 16);
    transpose(lines, shape.rows, shape.depth, shape.depth, columns, shape.ldt);
    rows = with_rows ? scratch.take(shape.rows / 2 * shape.ld) : nullptr;
    if (with_rows) pair_rows(lines, shape.rows, shape.depth, rows, shape.ld);
  }
};

// scores[count, ..] of a strip, hidden where a query may not see the key. Returns the end of their last vector.
int64_t visible_scores(const Strip& strip, const Segment& given, const Segment& packed, const PairShape& shape,
                       const Pair* queries, const Pair* keys, float* scores) {
  against_keys(strip, shape.depth, queries, shape.depth, keys, shape.ldt, scores, shape.width);
  const int64_t end = round_up(strip.end, 16);
  for (int64_t r = 0; r < strip.count; ++r, scores += shape.width) {
    hide(strip, packed.prefix(), 0, r, end, scores);
    if (given.prefix() % 2 != 0) scores[given.prefix()] = -1e30f;  // the unused half of the prefix's last pair
  }
  return end;
}

struct Call {
  at::Tensor q, k, v;
  float scale;
  int64_t share;  // query heads per key/value head
};

void forward_task(const Call& call, const PackedGroup& group, int64_t g, const at::Tensor& out,
                  const at::Tensor& log_sum) {
  const PairShape shape(group.packed, call.q.size(2)), shape_v(group.packed, call.v.size(2));
  Scratch<Pair> words;
  Scratch<float> numbers;
  const PackedHead keys(words, HeadView(call.k, g), group, shape, false);
  const PackedHead values(words, HeadView(call.v, g), group, shape_v, true);
  Pair* queries = words.take(kStrip * shape.depth);
  Pair* chance = words.take(kStrip * shape.wide);
  float* scores = numbers.take(kStrip * shape.width);
  float* result = numbers.take(kStrip * shape_v.ld);
  for (int64_t h = g * call.share; h < (g + 1) * call.share; ++h) {
    const HeadView q(call.q, h), o(out, h);
    float* sums = log_sum.mutable_data_ptr<float>() + h;
    for (size_t i = 0; i < group.given.size(); ++i) {
      const Segment &given = group.given[i], &packed = group.packed.segments[i];
      const int64_t length = given.query_end - given.query_start;
      for (int64_t first = 0; first < length; first += kStrip) {
        const Strip strip(packed, group.packed, first, std::min(kStrip, length - first), 0);
        const int64_t row = given.query_start + first;
        load_pairs(q, row, strip.count, shape.hd, queries, shape.depth);
        const int64_t end = visible_scores(strip, given, packed, shape, queries, keys.columns, scores);
        float inverse[kStrip];
        for (int64_t r = 0; r < strip.count; ++r) {
          const auto [top, sum] = exponentials(scores + r * shape.width, end, call.scale, chance + r * shape.wide);
          sums[(row + r) * call.q.size(1)] = top + std::log(sum);
          inverse[r] = 1.0f / sum;
        }
        times_rows(strip, shape_v.hd, chance, shape.wide, values.rows, shape_v.ld, result);
        for (int64_t r = 0; r < strip.count; ++r)
          store_rows(o, row + r, 1, shape_v.hd, inverse[r], result + r * shape_v.ld, shape_v.ld);
      }
    }
  }
}

struct Buffers {
  float *scores, *grad, *grad_q;             // of a strip [kStrip, width] and [kStrip, ld]
  float *grad_k, *grad_v;                    // [rows, ld] of keys and of values
  Pair *lines_q, *lines_out;                 // of a block [kBlock, depth], along the head
  Pair *rows_q, *rows_out;                   // the same along the rows [kBlock / 2, ld]
  Pair *chance, *grad_scores, *strip_scores; // P and dS along the queries [kBlock / 2, width], dS of a strip along keys

  Buffers(Scratch<float>& numbers, Scratch<Pair>& words, const PairShape& s, const PairShape& s_v) {
    for (float** p : {&scores, &grad}) *p = numbers.take(kStrip * s.width);
    grad_q = numbers.take(kStrip * s.ld);
    grad_k = numbers.take(s.rows * s.ld);
    grad_v = numbers.take(s.rows * s_v.ld);
    lines_q = words.take(kBlock * s.depth);
    lines_out = words.take(kBlock * s_v.depth);
    rows_q = words.take(kBlock / 2 * s.ld);
    rows_out = words.take(kBlock / 2 * s_v.ld);
    for (Pair** p : {&chance, &grad_scores}) *p = words.take(kBlock / 2 * s.width);
    strip_scores = words.take(kStrip * s.wide);
  }
};

// The gradients of one block of queries: dq is written to the result, dK and dV are added to the buffers.
void backward_block(const Call& call, const Strip& block, const Group& packed_group, const Segment& given,
                    const Segment& packed, const PairShape& shape, const PairShape& shape_v, const PackedHead& keys,
                    const PackedHead& values, const float* log_sum, const HeadView& dq, const Buffers& b) {
  for (int64_t r0 = 0; r0 < block.count; r0 += kStrip) {
    const Strip strip(packed, packed_group, block.first + r0, std::min(kStrip, block.count - r0), 0);
    const int64_t row = given.query_start + strip.first;
    const Pair* queries = b.lines_q + r0 * shape.depth;
    against_keys(strip, shape_v.depth, b.lines_out + r0 * shape_v.depth, shape_v.depth, values.columns, shape.ldt,
                 b.grad, shape.width);
    const int64_t end = visible_scores(strip, given, packed, shape, queries, keys.columns, b.scores);
    for (int64_t r = 0; r < strip.count; ++r) {
      softmax_backward(b.scores + r * shape.width, b.grad + r * shape.width, end, call.scale,
                       log_sum[(row + r) * call.q.size(1)], b.strip_scores + r * shape.wide);
    }
    for (int64_t r = 0; r < strip.count; r += 2) {
      const bool both = r + 1 < strip.count;
      const int64_t place = (r0 + r) / 2 * shape.width;
      for (auto [numbers, pairs] : {std::pair(b.scores, b.chance), std::pair(b.grad, b.grad_scores)}) {
        const float* even = numbers + r * shape.width;
        pair_columns(even, both ? even + shape.width : nullptr, end, pairs + place);
        // add_to_keys reads the whole width of the block.
        std::fill(pairs + place + end, pairs + place + std::max(end, block.end + kStrip), Pair(0));
      }
    }
    times_rows(strip, shape.hd, b.strip_scores, shape.wide, keys.rows, shape.ld, b.grad_q);
    store_rows(dq, row, strip.count, shape.hd, call.scale, b.grad_q, shape.ld);
  }
  add_to_keys(block, shape_v.hd, packed.prefix(), 0, b.chance, shape.width, b.rows_out, shape_v.ld, b.grad_v);
  add_to_keys(block, shape.hd, packed.prefix(), 0, b.grad_scores, shape.width, b.rows_q, shape.ld, b.grad_k);
}

void backward_task(const Call& call, const PackedGroup& group, int64_t g, const at::Tensor& grad_out,
                   const at::Tensor& log_sum, const std::array<at::Tensor, 3>& grads) {
  const PairShape shape(group.packed, call.q.size(2)), shape_v(group.packed, call.v.size(2));
  Scratch<Pair> words;
  Scratch<float> numbers;
  const PackedHead keys(words, HeadView(call.k, g), group, shape, true);
  const PackedHead values(words, HeadView(call.v, g), group, shape_v, false);
  const Buffers b(numbers, words, shape, shape_v);
  for (int64_t h = g * call.share; h < (g + 1) * call.share; ++h) {
    const HeadView q(call.q, h), grad(grad_out, h), dq(grads[0], h);
    for (size_t i = 0; i < group.given.size(); ++i) {
      const Segment &given = group.given[i], &packed = group.packed.segments[i];
      const int64_t length = given.query_end - given.query_start;
      for (int64_t first = 0; first < length; first += kBlock) {
        const Strip block(packed, group.packed, first, std::min(kBlock, length - first), 0);
        load_pairs(q, given.query_start + first, block.count, shape.hd, b.lines_q, shape.depth);
        load_pairs(grad, given.query_start + first, block.count, shape_v.hd, b.lines_out, shape_v.depth);
        pair_rows(b.lines_q, block.count, shape.depth, b.rows_q, shape.ld);
        pair_rows(b.lines_out, block.count, shape_v.depth, b.rows_out, shape_v.ld);
        backward_block(call, block, group.packed, given, packed, shape, shape_v, keys, values,
                       log_sum.const_data_ptr<float>() + h, dq, b);
      }
    }
  }
  for (size_t i = 0; i < group.given.size(); ++i) {
    const int64_t row = group.given[i].query_start, count = group.given[i].query_end - row;
    const int64_t from = group.packed.segments[i].query_start;
    store_rows(HeadView(grads[1], g), row, count, shape.hd, call.scale, b.grad_k + from * shape.ld, shape.ld);
    store_rows(HeadView(grads[2], g), row, count, shape_v.hd, 1.0f, b.grad_v + from * shape_v.ld, shape_v.ld);
  }
}

}  // namespace

bool forward_bf16(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::vector<Group>& groups,
                  double scale, int64_t window, const at::Tensor& out, const at::Tensor& log_sum) {
  if (!serves(q, k, v, scale, window)) return false;
  std::vector<Group> tasks;
  const std::vector<PackedGroup> packed = pack(groups, tasks);
  if (packed.size() != groups.size()) return false;
  const Call call{q, k, v, static_cast<float>(scale), q.size(1) / k.size(1)};
  for_each_task(tasks, k.size(1),
                [&](const Group& task, int64_t g) { forward_task(call, packed[task.start], g, out, log_sum); });
  return true;
}

bool backward_bf16(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& log_sum, const std::vector<Group>& groups, double scale, int64_t window,
                   const at::Tensor& grad_q, const at::Tensor& grad_k, const at::Tensor& grad_v) {
  if (grad_out.scalar_type() != at::kBFloat16 || !serves(q, k, v, scale, window)) return false;
  std::vector<Group> tasks;
  const std::vector<PackedGroup> packed = pack(groups, tasks);
  if (packed.size() != groups.size()) return false;
  const Call call{q, k, v, static_cast<float>(scale), q.size(1) / k.size(1)};
  for_each_task(tasks, k.size(1), [&](const Group& task, int64_t g) {
    backward_task(call, packed[task.start], g, grad_out, log_sum, {grad_q, grad_k, grad_v});
  });
  return true;
}

#else

bool forward_bf16(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::vector<Group>&, double, int64_t,
                  const at::Tensor&, const at::Tensor&) {
  return false;
}

bool backward_bf16(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   const std::vector<Group>&, double, int64_t, const at::Tensor&, const at::Tensor&,
                   const at::Tensor&) {
  return false;
}

#endif
}  // namespace rmcore
