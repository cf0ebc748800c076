// The geometry of the ragged attention: segments in groups, strips of queries over key columns, scratch memory; and the
// three products between a strip of queries and its keys.
//
// Example: segments (0, 4, 0, 0) and (4, 5, 0, 2) are one group of rows 0 .. 5; the strip of the second has the key
// columns 0 .. 3: the prefix piece {column 0, row 0, 2 long}, then its own {column 2, row 4, 1 long}.
#pragma once

#include "tiles.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

namespace rmcore {

struct Segment {
  int64_t query_start, query_end, prefix_start, prefix_end;
  int64_t prefix() const { return prefix_end - prefix_start; }
};

struct Group {
  std::vector<Segment> segments;
  int64_t start, end;  // its rows of the packed row
  int64_t cost;        // the number of scores that it computes
};

// Columns [column, column + count) of a segment's key sequence are the group's rows [row, row + count).
struct Piece {
  int64_t column, row, count;
};

inline std::vector<Group> read_groups(const at::Tensor& segments, int64_t tokens) {
  TORCH_CHECK_VALUE(
      segments.dim() == 2 && segments.size(1) == 4 && segments.scalar_type() == at::kInt && segments.device().is_cpu(),
      "ragged_attention: segments must be an int32 CPU tensor [S, 4]");
  const at::Tensor table = segments.contiguous();
  const int32_t* row = table.const_data_ptr<int32_t>();
  std::vector<Group> groups;
  int64_t at = 0;
  for (int64_t i = 0; i < table.size(0); ++i, row += 4) {
    const Segment s{row[0], row[1], row[2], row[3]};
    TORCH_CHECK_VALUE(s.query_start == at && s.query_end >= s.query_start && s.query_end <= tokens,
                      "ragged_attention: segment ", i, " covers rows ", s.query_start, " to ", s.query_end,
                      ", but must begin at row ", at, " and end within ", tokens);
    TORCH_CHECK_VALUE(
        s.prefix_start >= 0 && s.prefix_start <= s.prefix_end && (s.prefix() == 0 || s.prefix_end <= s.query_start),
        "ragged_attention: the prefix ", s.prefix_start, " to ", s.prefix_end, " of segment ", i,
        " must lie before the segment");
    Group group{{s}, s.prefix() > 0 ? s.prefix_start : s.query_start, s.query_end, 0};
    while (s.prefix() > 0 && !groups.empty() && groups.back().end > group.start) {
      Group& last = groups.back();
      group.start = std::min(group.start, last.start);
      group.segments.insert(group.segments.begin(), last.segments.begin(), last.segments.end());
      groups.pop_back();
    }
    groups.push_back(std::move(group));
    at = s.query_end;
  }
  TORCH_CHECK_VALUE(at == tokens, "ragged_attention: segments end at row ", at, ", but there are ", tokens, " rows");
  for (Group& group : groups) {
    for (const Segment& s : group.segments)
      group.cost += (s.query_end - s.query_start) * (2 * s.prefix() + s.query_end - s.query_start);
  }
  return groups;
}

// Zeroed scratch memory of one task. Each piece is an allocation of its own, so that sanitizers see a write beyond it.
template <typename T>
class Scratch {
 public:
  T* take(int64_t count) {
    memory_.push_back(c10::GetCPUAllocator()->allocate(std::max<int64_t>(count, 1) * sizeof(T)));
    T* piece = static_cast<T*>(memory_.back().get());
    std::fill(piece, piece + count, T(0));
    return piece;
  }

 private:
  std::vector<c10::DataPtr> memory_;
};

struct Shape {
  int64_t hd, ld;      // size of a query and key head, and the same rounded up to whole vectors
  int64_t hd_v, ld_v;  // the same of a value head
  int64_t rows, ldt;  // rows of the group, and the row length of a transposed [hd, rows] with room to read past its end
  int64_t width;      // row length of the scores: the longest key sequence with room for whole vectors and a strip
};

template <typename T>
Shape shape_of(const Group& group, int64_t hd, int64_t hd_v) {
  const int64_t rows = group.end - group.start;
  int64_t ldt = round_up(rows, lanes<T>()) + lanes<T>();
  if (ldt % 256 == 0) ldt += lanes<T>();  // rows a page apart would share the same cache sets
  return {hd, round_up(hd, lanes<T>()), hd_v, round_up(hd_v, lanes<T>()),
          rows, ldt, round_up(rows, lanes<T>()) + 2 * lanes<T>()};
}

// A strip: `count` queries of a segment from `first` on, and the key columns [begin, end) that any of them sees.
struct Strip {
  int64_t count, first, begin, end;
  Piece pieces[2];

  Strip(const Segment& s, const Group& group, int64_t query, int64_t count_, int64_t window)
      : count(count_), first(query) {
    end = s.prefix() + query + count;
    begin = window > 0 ? std::max<int64_t>(0, s.prefix() + query - window + 1) : 0;
    const int64_t from_prefix = std::max<int64_t>(0, s.prefix() - begin);
    const int64_t own = std::max(begin, s.prefix());
    pieces[0] = {begin, s.prefix_start + begin - group.start, from_prefix};
    pieces[1] = {own, s.query_start - group.start + own - s.prefix(), end - own};
  }
};

constexpr int64_t kBlock = 8 * kStrip;  // queries whose P and dS are kept for one product into dK and dV
constexpr int64_t kChunk = 128;         // keys per running sum: short sums have smaller rounding errors

// scores[count, begin .. end) = A[count, depth] * columns[depth, rows]; then up to a vector of columns past the end.
// The prefix goes first: what it writes past its end is then overwritten by the segment's own keys.
template <typename T, typename Sum = typename Arithmetic<T>::Sum>
void against_keys(const Strip& strip, int64_t depth, const T* A, int64_t lda, const T* columns, int64_t ldt,
                  Sum* scores, int64_t width) {
  for (const Piece& p : strip.pieces) {
    if (p.count > 0)
      product<T>(strip.count, p.count, depth, A, lda, 1, columns + p.row, ldt, scores + p.column, width, false);
  }
}

// out[count, hd] = scores[count, begin .. end) * rows[rows, hd]; an element of either holds kPack keys.
template <typename T, typename Sum = typename Arithmetic<T>::Sum>
void times_rows(const Strip& strip, int64_t hd, const T* scores, int64_t width, const T* rows, int64_t ld, Sum* out) {
  constexpr int64_t pack = Arithmetic<T>::kPack;
  bool add = false;
  for (const Piece& p : strip.pieces) {
    for (int64_t c = 0; c < p.count; c += kChunk, add = true) {
      product<T>(strip.count, hd, (std::min(kChunk, p.count - c) + pack - 1) / pack, scores + (p.column + c) / pack,
                 width, 1, rows + (p.row + c) / pack * ld, ld, out, ld, add);
    }
  }
}

// grads[key rows] += weights[queries, columns]^T * rows[queries, ld] for the queries of one block from `first` on; an
// element of `weights` and of `rows` holds kPack queries.
template <typename T, typename Sum = typename Arithmetic<T>::Sum>
void add_to_keys(const Strip& block, int64_t hd, int64_t prefix, int64_t window, const T* weights, int64_t width,
                 const T* rows, int64_t ld, Sum* grads) {
  constexpr int64_t pack = Arithmetic<T>::kPack;
  for (const Piece& p : block.pieces) {
    for (int64_t c = 0; c < p.count; c += kStrip) {
      const int64_t take = std::min(kStrip, p.count - c), column = p.column + c;
      // Query r of the block has the position prefix + first + r. `from` is the first query that sees the strip of
      // keys, `to` is one past the last query that has it within its window.
      const int64_t from = std::max<int64_t>(0, column - prefix - block.first) / pack;
      const int64_t to =
          window > 0 ? std::min(block.count, column + take - 1 + window - prefix - block.first) : block.count;
      const int64_t steps = (to + pack - 1) / pack - from;
      if (steps > 0) {
        product<T>(take, hd, steps, weights + from * width + column, 1, width, rows + from * ld, ld,
                   grads + (p.row + c) * ld, ld, true);
      }
    }
  }
}

// Sets the columns that row r of a strip may not see to a number whose exponential is 0.
template <typename T>
void hide(const Strip& strip, int64_t prefix, int64_t window, int64_t r, int64_t end, T* row) {
  const int64_t position = prefix + strip.first + r;
  std::fill(row + position + 1, row + end, T(-1e30));
  if (window > 0) std::fill(row + strip.begin, row + std::max(strip.begin, position - window + 1), T(-1e30));
}

// Runs task(group, head) for all groups and heads, the costliest first, on all threads.
template <typename Task>
void for_each_task(const std::vector<Group>& groups, int64_t heads, const Task& task) {
  std::vector<int64_t> order(groups.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return groups[a].cost > groups[b].cost; });
  const int64_t count = static_cast<int64_t>(order.size()) * heads;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) {
      const Group& group = groups[order[i / heads]];
      if (group.end > group.start) task(group, i % heads);
    }
  });
}

}  // namespace rmcore
