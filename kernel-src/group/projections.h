// Projections that share an input: the forward and the backward of a group, from library products and
// the passes of lora_group.h. lora_group.cpp says what they compute.
#pragma once

#include "../common/kernels.h"
#include "products.h"

namespace lora_fused {

// What a gradient is wanted of, by member: bits of the ops' `needs`.
enum Need : int64_t { kNeedA = 1, kNeedB = 2, kNeedBias = 4, kNeedMagnitude = 8 };

// The lists that every op takes, one element a projection; biases, gains and dropouts are empty where none has one:
// each element costs the dispatcher's boxing.
struct Lists {
  const Tensors& weights;
  const Optionals &biases, &lora_a, &lora_b, &gains;
  const std::vector<double>& scalings;
  const std::optional<Tensor>& seeds;
  const std::vector<double>& dropouts;
  // Of weights in four bits: a PackedWeight a projection and the scales they point to; both are empty where no weight
  // is quantised.
  const Tensors& scales;
  const std::vector<int64_t>& quantized;
  // Adapters of float32 beside x in bfloat16, of DoRA without dropout: multiplied as two parts each.
  bool exact;

  // An error where `quantized` says what this library does not know, which would be taken for something else.
  void check() const;
};

// A weight of four bits a value, of the lists above: `numbers` are its own of `quantized`.
class FourBitWeight {
 public:
  FourBitWeight(const Tensor& packed, const Tensors& scales, const int64_t* numbers)
      : packed_(packed), scales_(scales.data() + numbers[PackedWeight::kFirstScale]), numbers_(numbers) {}

  int64_t rows() const { return numbers_[PackedWeight::kRows]; }
  int64_t cols() const { return numbers_[PackedWeight::kCols]; }
  ScalarType dtype() const {
    static_assert(kQuantizedDtypes == 3, "FourBitWeight: a dtype for each");
    const int64_t dtype = numbers_[PackedWeight::kDtype];
    return dtype == kFromBFloat16 ? ScalarType::BFloat16 : dtype == kFromFloat16 ? ScalarType::Half : ScalarType::Float;
  }
  // From element `first` of the flat weight on, as many as `out` has, in its dtype.
  void dequantize(int64_t first, const Tensor& out) const;

 private:
  const Tensor &packed_, *scales_;
  const int64_t* numbers_;
};

// What of the scaling s is left for the products that read t: float16 may not have the range for s·D(x) Aᵀ where it has
// it for D(x) Aᵀ, which PEFT multiplies by B first. So there t has a factor of at most 1, and what is beyond is a power
// of two, 1 elsewhere. projection.py, `split_scaling`, has the same rule.
double beyond_t(double scaling, ScalarType dtype);

// [first, first + count) of them, which share an input.
class Members {
 public:
  Members(const Lists& lists, size_t first, size_t count) : lists_(lists), first_(first), count_(count) {}

  size_t count() const { return count_; }
  size_t index(size_t i) const { return first_ + i; }
  // [N, K] in `dtype`; of a quantised weight a copy that lives as long as its caller keeps it.
  Tensor weight(size_t i, ScalarType dtype) const;
  // None of a weight in floating point.
  std::optional<FourBitWeight> packed(size_t i) const;
  int64_t outputs(size_t i) const {
    return is_packed(i) ? quantized(i)[PackedWeight::kRows] : lists_.weights[first_ + i].size(0);
  }
  const std::optional<Tensor>& bias(size_t i) const { return of(lists_.biases, i); }
  const std::optional<Tensor>& a(size_t i) const { return lists_.lora_a[first_ + i]; }
  const std::optional<Tensor>& b(size_t i) const { return lists_.lora_b[first_ + i]; }
  const std::optional<Tensor>& gain(size_t i) const { return of(lists_.gains, i); }
  double scaling(size_t i) const { return lists_.scalings[first_ + i]; }
  // The two factors of it where x is in `dtype`: t's own, and that of the products which read t.
  double down_scaling(size_t i, ScalarType dtype) const { return scaling(i) / up_scaling(i, dtype); }
  double up_scaling(size_t i, ScalarType dtype) const { return beyond_t(scaling(i), dtype); }
  bool masked(size_t i) const { return !lists_.dropouts.empty() && lists_.dropouts[first_ + i] != 0.0; }
  int64_t rank(size_t i) const { return a(i) ? a(i)->size(0) : 0; }
  std::optional<Dropped> mask(size_t i) const;

  // What DoRA's gain acts on: with a mask the bias stays outside.
  Gain gain_of(size_t i) const { return {gain(i), masked(i) ? std::nullopt : bias(i)}; }
  // DoRA whose output is the gain of what one product gives.
  bool scaled(size_t i) const { return gain(i) && !masked(i); }
  bool any_masked() const;
  bool exact() const { return lists_.exact; }
  // Of a list that may be empty.
  const std::optional<Tensor>& of(const Optionals& list, size_t i) const {
    static const std::optional<Tensor> none;
    return list.empty() ? none : list[first_ + i];
  }

 private:
  const int64_t* quantized(size_t i) const { return lists_.quantized.data() + PackedWeight::kFields * (first_ + i); }
  bool is_packed(size_t i) const { return !lists_.quantized.empty() && quantized(i)[PackedWeight::kFormat] != kFloating; }

  const Lists& lists_;
  size_t first_, count_;
};

// The members' adapters in x's dtype: all A's below each other [Σ R, K], and every B [N, R], as [R, N]
// in memory where asked for.
//
// Exact, a matrix is the sum of its value rounded and of the rest, which together hold 16 bits of
// float32's 24. Three products of such parts make one of rank 3R, all but the smallest: adapters as
// (high, rest, high) and t and dt as (high, high, rest), next to each other along the ranks. B and t keep the parts of each
// member; A and dt too, or where `together` each part of all members, for one product of x with all of them.
struct Adapters {
  enum Layout { kAsStored, kTransposed };
  Adapters(const View& x, const Members& members, bool need_a, bool need_b, Layout layout_of_b = kAsStored);

  int64_t ranks() const { return first.back(); }
  int64_t rank(size_t i) const { return first[i + 1] - first[i]; }
  // Columns of t and of dt [M, columns()].
  int64_t columns() const { return parts * ranks(); }
  // A member's rows of A, and columns of t and of dt; of A and of dt not where `together`.
  View a_of(size_t i) const { return a->rows(parts * first[i], parts * rank(i)); }
  View part(const View& t, size_t i) const { return t.columns(parts * first[i], parts * rank(i)); }
  // Where exact, of A and of dt: a member's first part, and from there to the next.
  int64_t at(size_t i) const { return together ? first[i] : parts * first[i]; }
  int64_t apart(size_t i) const { return together ? ranks() : rank(i); }

  int64_t parts;  // 3 where exact, else 1
  bool together;  // exact members without masks, of one rank and one scaling
  MaybeView a;
  std::vector<MaybeView> b;
  std::vector<int64_t> first;  // of each member's ranks, and their total at the end
};

struct Outputs {
  Tensors ys;    // shaped as asked; empty where `scaled_too` was false and the member is scaled
  Tensors us;    // [M, N] before the gain, of every member that has one
  Tensor t;      // [M, Σ R], three times as wide where exact
};

class Norms;  // dora_norms.h

// For x [M, K]; ys are shaped as `like` is but for the last dimension. Without `scaled_too` a scaled
// member's y is left out, and its place in ys holds u.
Outputs project(const View& x, const Tensor& like, const Members& members, const Norms& norms, bool scaled_too);

// u of member i alone, which has a gain and dropout, again; t of Outputs.
Tensor project_dropped(const View& x, const Members& members, size_t i, const Tensor& t);

// Outputs::t alone, of members without a gain.
Tensor project_down(const View& x, const Members& members);

// The backward of `project`, in the two steps that a gated MLP needs apart.
class Backward {
 public:
  struct Given {
    Optionals dys;  // [..., N], none where an output was not used
    Tensors us;
    const Optionals& norms;  // the op's list, for DoRA
    const std::vector<int64_t>& needs;
    bool need_dx;
    const Tensor& t;  // of Outputs
    bool own_dys = false;  // whether they may be written over
  };

  // `x` gives dtype and shape alone: it need not be filled before `parameters`.
  Backward(const Members& members, const View& x, const Given& given);

  // dx [M, K] of all members.
  void input(const View& dx) const;

  // Appends the gradients that are wanted: of each member in turn A, B, bias, magnitude. A and B in
  // their own dtype, the sums in float32 (float64 for float64).
  void parameters(const View& x, Tensors& grads) const;

 private:
  bool needs(size_t i, Need need) const { return dys_[i] && (needs_[members_.index(i)] & need) != 0; }
  TokenSums pass_over_dy(size_t i, const MaybeView& u, const MaybeTensor& norm, bool own_dy);
  void project_down();
  void project_down_exactly();
  void parameters_exactly(const View& x, Tensors& grads) const;
  std::vector<Term> dropped_terms(size_t i) const;
  void add_dropped(const View& dx, const std::vector<size_t>& which) const;

  const Members& members_;
  const std::vector<int64_t>& needs_;
  bool need_dx_;
  View x_, t_;
  std::vector<MaybeView> dys_, lora_dys_;  // by member, [M, N]
  Optionals dots_, sums_, dbs_;            // [N], [N], and where made with dt [N, R]
  Adapters adapters_;
  MaybeView dt_;
};

}  // namespace lora_fused
