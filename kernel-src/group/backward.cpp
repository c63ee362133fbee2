// The backward of projections that share an input, see backward.h.
#include "backward.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "../dispatch/table.h"
#include "passes.h"
#include "skinny.h"

namespace lora_fused {

namespace {

void zero(const MatrixView& m) {
  Tensor whole = m.tensor();
  torch::stable::zero_(whole);
}

void multiply_shrinks(const std::vector<Shrink>& products) {
  SkinnyBatch<Shrink> batch;
  for (const Shrink& product : products)
    if (!batch.add(product)) multiply(product.t, product.x, product.a.transposed(), product.scaling, /*add=*/false);
  batch.run();
}

// Whether one launch for dx and dt is wanted: no mask is over a part of dx, everything is in x's dtype, and the launch
// supports the ranks.
bool is_one_launch(const MatrixView& x, const Members& members) {
  if (!x.is_cuda() || members.bf16x3() || members.any_masked()) return false;
  int64_t most = 0;
  for (size_t i = 0; i < members.count(); ++i) {
    if (members.rank(i) % 8 != 0) return false;
    most = std::max(most, members.rank(i));
  }
  return most > 0 &&
         dispatch::gemm_group_is_faster(x, x.size(0), x.size(1), static_cast<int64_t>(members.count()), most);
}

}  // namespace

bool needs_any_a(const std::vector<int64_t>& needs, size_t count) {
  return std::any_of(needs.begin(), needs.begin() + count, [](int64_t need) { return (need & kNeedA) != 0; });
}

Adapters Backward::adapters(const MatrixView& x, const Members& members, std::vector<Cast>& casts, bool need_dx) {
  const int64_t counters = need_dx && is_one_launch(x, members) ? group_counters(x.size(0)) : 0;
  return {x, members, casts, need_dx, /*need_b=*/true, layout_of_b(x), counters};
}

OutputGrads::OutputGrads(const Members& members, const Optionals& given, const Tensors& unscaled,
                         const std::vector<int64_t>& needs, bool own_dys)
    : dunscaled(members.count()), dmagnitudes(members.count()), dbiases(members.count()), passes(members.count()) {
  size_t next_unscaled = 0;
  for (size_t i = 0; i < members.count(); ++i) {
    dys.push_back(given[i] ? MaybeMatrixView(matrix(*given[i])) : std::nullopt);
    const MaybeMatrixView u = members.mag_norm_scale(i) ? MaybeMatrixView(unscaled[next_unscaled++]) : std::nullopt;
    if (!dys[i]) continue;
    const MatrixView& dy = *dys[i];
    const auto vector = [&] {
      return empty(dy.base(), {dy.size(1)},
                   dy.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    };
    const int64_t wanted = needs[members.index(i)];
    dunscaled[i] = !u || (own_dys && members.scales_output(i)) ? dy : MatrixView(fresh_like(dy));
    ScaleOutputBackward pass{dy};
    pass.scale = members.scale_around_bias(i);
    if (wanted & kNeedBias) pass.dbias = dbiases[i] = vector();
    if (u) pass.dunscaled = dunscaled[i];
    if (u && (wanted & kNeedMagnitude)) {
      pass.unscaled = u;
      pass.norm = members.norm(i);
      pass.dmagnitude = dmagnitudes[i] = vector();
    }
    if (pass.dbias || pass.dunscaled) passes[i] = pass;
  }
}

void OutputGrads::run() {
  std::vector<ScaleOutputBackward> left;
  for (auto& pass : std::exchange(passes, {}))
    if (pass) left.push_back(*pass);
  scale_outputs_backward(left);
}

Backward::Backward(const Members& members, const MatrixView& x, Adapters adapters, OutputGrads outputs,
                   const Given& given)
    : members_(members),
      needs_(given.needs),
      need_dx_(given.need_dx),
      x_(x),
      t_(given.t),
      at_once_(need_dx_ && is_one_launch(x, members)),
      dbs_(members.count()),
      adapters_(std::move(adapters)) {
  outputs.run();
  dys_ = std::move(outputs.dys), dunscaled_ = std::move(outputs.dunscaled);
  dmagnitudes_ = std::move(outputs.dmagnitudes), dbiases_ = std::move(outputs.dbiases);
  bool any_dt = need_dx_;
  for (size_t i = 0; i < members.count(); ++i) any_dt = any_dt || needs(i, kNeedA);
  if (adapters_.ranks() > 0 && any_dt) members.bf16x3() ? shrink_dy_bf16x3() : shrink_dy();
}

// dt = s·dy' B of all members, dy' the gradient of the unscaled output; what dx's launch makes of it is left waiting.
void Backward::shrink_dy() {
  const Tensor whole = empty(x_.base(), {x_.size(0), adapters_.ranks()}, x_.scalar_type());
  dt_ = whole;
  FusedDtDb fused(dunscaled_);
  for (size_t i = 0; i < members_.count(); ++i) {
    if (!members_.a(i)) continue;
    const MatrixView dt = adapters_.columns_of(*dt_, i);
    if (!dys_[i]) {
      zero(dt);
      continue;
    }
    const MatrixView &dy = *dunscaled_[i], &b = *adapters_.b[i];
    if (needs(i, kNeedB))
      dbs_[i] = fused.add(dy, b, adapters_.columns_of(t_, i), dt, members_.scaling(i), members_.b(i)->scalar_type(),
                          std::nullopt, members_.expand_scaling(i, x_.scalar_type()));
    if (!dbs_[i]) waiting_.push_back({dy, b.transposed(), dt, members_.scaling(i), std::nullopt});
  }
  fused.run();
  if (!at_once_) {
    multiply_shrinks(waiting_);
    waiting_.clear();
  }
  for (size_t i = 0; i < members_.count(); ++i)
    if (dbs_[i] && members_.mag_norm_scale(i) && members_.masked(i)) dunscaled_[i].reset();  // has served
}

// The same, each member's dt as hi, hi, lo.
void Backward::shrink_dy_bf16x3() {
  dt_ = empty(x_.base(), {x_.size(0), adapters_.columns()}, x_.scalar_type());
  std::vector<HiLoSum> sums;
  SkinnyBatch<Shrink> batch;
  FusedDtDb fused(dunscaled_);
  for (size_t i = 0; i < members_.count(); ++i) {
    if (!members_.a(i)) continue;
    const int64_t rank = adapters_.rank(i), first = adapters_.first_column(i), stride = adapters_.split_stride(i);
    if (!dys_[i]) {
      for (int64_t at = 0; at < adapters_.splits; ++at) zero(dt_->columns(first + at * stride, rank));
      continue;
    }
    const MatrixView &dy = *dunscaled_[i], out = dt_->columns(first, rank);
    const MatrixView b = adapters_.b[i]->columns(0, 2 * rank), t = adapters_.columns_of(t_, i).columns(rank, 2 * rank);
    const double scaling = members_.scaling(i);
    const SplitLayout split{rank, stride};
    if (needs(i, kNeedB)) dbs_[i] = fused.add(dy, b, t, out, scaling, members_.b(i)->scalar_type(), split);
    const MatrixView hi = b.columns(0, rank).transposed(), lo = b.columns(rank, rank).transposed();
    if (dbs_[i] || batch.add({dy, hi, out, scaling, std::nullopt, lo, split})) continue;
    const MatrixView wide = empty(x_.base(), {x_.size(0), 2 * rank}, ScalarType::Float);
    multiply(wide, dy, b, 1.0, /*add=*/false);
    sums.push_back({wide.columns(0, rank), wide.columns(rank, rank), out, scaling, split});
  }
  fused.run();
  batch.run();
  sum_hi_lo(sums);
}

void Backward::input(const MatrixView& dx, SideStream* side) const {
  std::vector<Term> terms;
  std::vector<size_t> masked;
  const bool share = !members_.any_masked();
  for (size_t i = 0; i < members_.count(); ++i) {
    if (!dys_[i]) continue;
    terms.push_back({members_.scales_output(i) ? *dunscaled_[i] : *dys_[i], members_.weight(i, x_.scalar_type())});
    if (!members_.a(i) || share) continue;
    if (members_.masked(i))
      masked.push_back(i);
    else
      terms.push_back({adapters_.columns_of(*dt_, i), adapters_.a_of(i)});
  }
  if (dt_ && share) terms.push_back({*dt_, *adapters_.a});
  if (!waiting_.empty() && multiply_group(waiting_, {{dx, terms, /*made=*/1, std::nullopt}}, adapters_.zeros, side))
    return;
  multiply_shrinks(waiting_);
  // The mask of one member goes into the product.
  if (!masked.empty() && multiply_dropped(dx, dropped_terms(masked[0]), *members_.mask(masked[0]), terms, side))
    masked.erase(masked.begin());
  else
    multiply(dx, terms, std::nullopt, side);
  if (!masked.empty()) add_dropped(dx, masked);
}

// Of dx, what member i's mask is over.
std::vector<Term> Backward::dropped_terms(size_t i) const {
  std::vector<Term> terms;
  if (members_.mag_norm_scale(i)) {
    const MatrixView excess = fresh_like(*dys_[i]);
    scale_output({*dys_[i], excess, {members_.mag_norm_scale(i), std::nullopt}, ScaleOutput::kExcess});
    terms.push_back({excess, members_.weight(i, x_.scalar_type())});
  }
  terms.push_back({adapters_.columns_of(*dt_, i), adapters_.a_of(i)});
  return terms;
}

void Backward::add_dropped(const MatrixView& dx, const std::vector<size_t>& which) const {
  std::vector<DroppedExpand> fused;
  for (const size_t i : which) {
    const MatrixView dt = adapters_.columns_of(*dt_, i), a = adapters_.a_of(i);
    const Dropped mask = *members_.mask(i);
    if (!members_.mag_norm_scale(i) && is_skinny({&dx, &dt, &a})) {
      fused.push_back({dt, a, mask});
      continue;
    }
    const MatrixView delta = fresh_like(dx);
    multiply(delta, dropped_terms(i), std::nullopt);
    drop(delta, mask, dx, /*accumulate=*/true);
  }
#if defined(CUDA_KERNEL)
  if (!fused.empty()) dropped_expand_add_cuda(dx, fused);
#endif
}

// dA of member i; `all` is that of all members where one product gives it.
Tensor Backward::grad_a(size_t i, const MatrixView& x, AdapterGrads& products, MaybeTensor& all) const {
  const ScalarType dtype = members_.a(i)->scalar_type();
  const int64_t rank = adapters_.rank(i), ranks = adapters_.ranks(), first = adapters_.first[i];
  if (!members_.bf16x3()) {
    if (members_.any_masked())
      return products.product(adapters_.columns_of(*dt_, i), x, dtype, /*transposed=*/false, members_.mask(i));
    if (!all || all->scalar_type() != dtype) all = products.product(*dt_, x, dtype, /*transposed=*/false, std::nullopt);
    return rank == all->size(0) ? *all : MatrixView(*all).rows(first, rank).tensor();
  }
  if (!adapters_.merged) {
    const MatrixView both = adapters_.columns_of(*dt_, i).columns(rank, 2 * rank);
    return products.converted(products.product_bf16x3(both, x, /*transposed=*/false, members_.mask(i)), dtype);
  }
  if (!all) all = products.product_bf16x3(dt_->columns(ranks, 2 * ranks), x, /*transposed=*/false, std::nullopt);
  return products.converted(MatrixView(*all).rows(first, rank), dtype);
}

// dB of member i, where the constructor has not made it.
Tensor Backward::grad_b(size_t i, AdapterGrads& products) const {
  const MatrixView t = adapters_.columns_of(t_, i);
  const ScalarType dtype = members_.b(i)->scalar_type();
  if (!members_.bf16x3())
    return products.product(t, *dunscaled_[i], dtype, /*transposed=*/true, std::nullopt,
                            members_.expand_scaling(i, x_.scalar_type()));
  const int64_t rank = adapters_.rank(i);
  const MatrixView both = t.columns(rank, 2 * rank);
  return products.converted(products.product_bf16x3(both, *dunscaled_[i], /*transposed=*/true, std::nullopt), dtype);
}

void Backward::parameters(const MatrixView& x, Tensors& grads, AdapterGrads& products) const {
  MaybeTensor all;
  for (size_t i = 0; i < members_.count(); ++i) {
    if (needs(i, kNeedA)) grads.push_back(grad_a(i, x, products, all));
    if (dbs_[i])
      grads.push_back(*dbs_[i]);
    else if (needs(i, kNeedB))
      grads.push_back(grad_b(i, products));
    if (needs(i, kNeedBias)) grads.push_back(*dbiases_[i]);
    if (needs(i, kNeedMagnitude)) grads.push_back(*dmagnitudes_[i]);
  }
}

void Backward::gradients(const Tensor& x, const MatrixView& rows, bool beside, AdapterGrads& products,
                         Tensors& grads) const {
  const bool alone = beside && makes_dx_alone();
  SideStream side(rows);
  MaybeTensor dx;
  if (need_dx_) grads.push_back(*(dx = empty_as(x, rows.size(1))));
  // Beside dx, what the products write is allocated before its launch (side_stream.h).
  if (alone) parameters(rows, grads, products);
  if (dx) input(matrix(*dx), alone ? &side : nullptr);
  if (!alone) parameters(rows, grads, products);
  products.run(&side);
}

}  // namespace lora_fused
