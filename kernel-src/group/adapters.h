// A and B of a group as its products read them.
#pragma once

#include <vector>

#include "members.h"

namespace lora_fused {

// The members' adapters in x's dtype: all A's below each other [Σ R, K], and every B [N, R], as [R, N] in memory where
// asked for.
//
// bf16x3 (XLA's and cuBLAS's name for it): a float32 matrix is the sum of hi, its values rounded to bfloat16, and of
// lo, what the rounding leaves out; both together hold 16 bits of float32's 24. A product is then hi·hi + hi·lo +
// lo·hi, all but the smallest term, which is one product of rank 3R: adapters as (hi, lo, hi) and t and dt as (hi, hi,
// lo), next to each other along the ranks. B and t keep the three of each member together. A and dt do too, or hold all
// members' hi, all lo, all hi where `merged`, for one product of x with all members.
struct Adapters {
  enum Layout { kAsStored, kTransposed };
  // Of x's dtype, columns and device. What has to be converted for it goes to `casts`, which the caller runs before
  // anything is read. `counters`: how many `zeros` are wanted.
  Adapters(const MatrixView& x, const Members& members, std::vector<Cast>& casts, bool need_a, bool need_b,
           Layout layout_of_b = kAsStored, int64_t counters = 0);

  int64_t ranks() const { return first.back(); }
  int64_t rank(size_t i) const { return first[i + 1] - first[i]; }
  // Columns of t and of dt [M, columns()].
  int64_t columns() const { return splits * ranks(); }
  // A member's rows of A, and columns of t and of dt; of A and of dt not where `merged`.
  MatrixView a_of(size_t i) const { return a->rows(splits * first[i], splits * rank(i)); }
  MatrixView columns_of(const MatrixView& t, size_t i) const { return t.columns(splits * first[i], splits * rank(i)); }
  // bf16x3, of A and of dt: where a member's hi begins, and from there to its lo.
  int64_t first_column(size_t i) const { return merged ? first[i] : splits * first[i]; }
  int64_t split_stride(size_t i) const { return merged ? ranks() : rank(i); }

  int64_t splits;  // matrices for one of float32: 3 where bf16x3, else 1
  bool merged;     // bf16x3 of members without masks, of one rank and one scaling
  MaybeMatrixView a;
  std::vector<MaybeMatrixView> b;
  std::vector<int64_t> first;  // of each member's ranks, and their total at the end
  MaybeMatrixView zeros;       // of four bytes, on a GPU, where the launch of a conversion can write them too

 private:
  void split(const MatrixView& x, const Members& members, std::vector<Cast>& casts, bool need_a);
  void convert(const MatrixView& x, const Members& members, std::vector<Cast>& casts, bool need_a, bool need_b,
               Layout layout_of_b, int64_t counters);
};

}  // namespace lora_fused
