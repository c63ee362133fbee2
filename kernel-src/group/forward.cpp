// The forward of projections that share an input, see forward.h.
#include "forward.h"

#include "../dispatch/table.h"
#include "adapters.h"
#include "passes.h"
#include "products.h"
#include "skinny.h"

namespace lora_fused {

namespace {

// Every member's t as hi, hi, lo; where the adapters are merged, one product is that of all.
void shrink_bf16x3(const MatrixView& t, const MatrixView& x, const Members& members, const Adapters& adapters) {
  SkinnyBatch<Shrink> batch;
  std::vector<HiLoSum> sums;
  for (size_t i = 0; i < members.count(); ++i) {
    if (!members.a(i) || (adapters.merged && adapters.first[i] > 0)) continue;
    const int64_t rank = adapters.rank(i), ranks = adapters.merged ? adapters.ranks() : rank;
    const MatrixView a = adapters.a->rows(adapters.first_column(i), 2 * ranks),
                     out = t.columns(adapters.first_column(i), ranks);
    const std::optional<Dropped> mask = members.mask(i);
    const double scaling = members.scaling(i);
    const SplitLayout split{rank, rank};  // t keeps those of each member together
    if (batch.add({x, a.rows(0, ranks), out, scaling, mask, a.rows(ranks, ranks), split})) continue;
    const MatrixView wide = empty(x.base(), {x.size(0), 2 * ranks}, ScalarType::Float);
    multiply(wide, kept(x, mask), a.transposed(), 1.0, /*add=*/false);
    sums.push_back({wide.columns(0, ranks), wide.columns(ranks, ranks), out, scaling * scale_of(mask), split});
  }
  batch.run();
  sum_hi_lo(sums);
}

// t of all members, and D(x) of those whose base product takes it as well.
Tensor shrink(const MatrixView& x, const Members& members, const Adapters& adapters,
              std::vector<MaybeMatrixView>& drops) {
  const Tensor whole = empty(x.base(), {x.size(0), adapters.columns()}, x.scalar_type());
  const MatrixView t = whole;
  if (adapters.ranks() == 0) return whole;
  if (members.bf16x3()) {
    shrink_bf16x3(t, x, members, adapters);
    return whole;
  }
  // On the CPU a member's t is that of the member alone, bit for bit: a group changes no result.
  const ScalarType dtype = x.scalar_type();
  const std::optional<double> shared = members.common_shrink_scaling(dtype);
  if (shared && x.is_cuda() && !members.any_masked()) {
    multiply_shrink(t, x, *adapters.a, *shared);
    return whole;
  }
  SkinnyBatch<Shrink> batch;
  for (size_t i = 0; i < members.count(); ++i) {
    if (!members.a(i)) continue;
    const MatrixView own = adapters.columns_of(t, i), a = adapters.a_of(i);
    const double scaling = members.shrink_scaling(i, dtype);
    if (members.masked(i) && !members.mag_norm_scale(i) && batch.add({x, a, own, scaling, members.mask(i)})) continue;
    if (members.masked(i)) drops[i] = dropped(x, *members.mask(i));
    multiply_shrink(own, drops[i] ? *drops[i] : x, a, scaling);
  }
  batch.run();
  return whole;
}

// Whether one launch for t and all outputs is wanted: the members share t's scaling and have no masks and ranks that it
// supports, everything is in x's dtype, and no weight has to be made for its product.
bool is_one_launch(const MatrixView& x, const Members& members) {
  const ScalarType dtype = x.scalar_type();
  if (!x.is_cuda() || members.bf16x3() || members.any_masked() || !members.common_shrink_scaling(dtype)) return false;
  int64_t columns = 0, ranks = 0;
  for (size_t i = 0; i < members.count(); ++i) {
    if (members.packed(i) || members.expand_scaling(i, dtype) != 1.0 || members.rank(i) % 8 != 0) return false;
    columns += members.outputs(i), ranks += members.rank(i);
  }
  return dispatch::gemm_group_is_faster(x, x.size(0), columns, /*shrinks=*/1, ranks);
}

// `project` as one launch, where its operands allow it.
std::optional<Outputs> project_at_once(const MatrixView& x, const Tensor& like, const Members& members,
                                       const Adapters& adapters, bool with_scaled) {
  Outputs out{{}, {}, empty(x.base(), {x.size(0), adapters.columns()}, x.scalar_type())};
  std::vector<Sum> sums;
  std::vector<ScaleOutput> scales;
  for (size_t i = 0; i < members.count(); ++i) {
    std::vector<Term> terms{{x, MatrixView(members.weight(i, x.scalar_type())).transposed()}};
    if (members.b(i)) terms.push_back({adapters.columns_of(out.t, i), adapters.b[i]->transposed()});
    const size_t made = terms.size() - 1;
    out.ys.push_back(empty_as(like, members.outputs(i)));
    const MatrixView y = matrix(out.ys.back());
    if (!members.mag_norm_scale(i)) {
      sums.push_back({y, terms, made, members.bias(i)});
      continue;
    }
    const Tensor unscaled = with_scaled ? fresh_like(y) : y.tensor();
    out.unscaled.push_back(unscaled);
    if (with_scaled && !members.bias(i)) {
      sums.push_back({y, terms, made, std::nullopt, unscaled, members.mag_norm_scale(i)});
      continue;
    }
    sums.push_back({unscaled, terms, made, members.bias(i)});
    if (with_scaled) scales.push_back({unscaled, y, members.scale_around_bias(i), ScaleOutput::kScale});
  }
  const double scaling = *members.common_shrink_scaling(x.scalar_type());
  if (!multiply_group({{x, *adapters.a, out.t, scaling, std::nullopt}}, sums, adapters.zeros)) return std::nullopt;
  for (const ScaleOutput& scale : scales) scale_output(scale);
  return out;
}

}  // namespace

Adapters forward_adapters(const MatrixView& x, const Members& members, std::vector<Cast>& casts, bool need_b) {
  const int64_t counters = need_b && is_one_launch(x, members) ? group_counters(x.size(0)) : 0;
  return {x, members, casts, /*need_a=*/true, need_b, Adapters::kAsStored, counters};
}

Tensor shrink(const MatrixView& x, const Members& members, const Adapters& adapters) {
  std::vector<MaybeMatrixView> drops(members.count());
  return shrink(x, members, adapters, drops);
}

Outputs project(const MatrixView& x, const Tensor& like, const Members& members, const Adapters& adapters,
                const Norms& norms, bool with_scaled) {
  if (is_one_launch(x, members))
    if (std::optional<Outputs> out = project_at_once(x, like, members, adapters, with_scaled)) return *std::move(out);
  std::vector<MaybeMatrixView> drops(members.count());
  Outputs out{{}, {}, shrink(x, members, adapters, drops)};
  for (size_t i = 0; i < members.count(); ++i) {
    const int64_t n = members.outputs(i);
    const Tensor weight = members.weight(i, x.scalar_type());
    norms.from_weight(members.index(i), weight);
    const auto terms = [&](const MatrixView& input) {
      std::vector<Term> sum{{input, MatrixView(weight).transposed()}};
      if (members.b(i))
        sum.push_back(
            {adapters.columns_of(out.t, i), adapters.b[i]->transposed(), members.expand_scaling(i, x.scalar_type())});
      return sum;
    };
    out.ys.push_back(empty_as(like, n));
    const MatrixView y = matrix(out.ys.back());
    if (!members.mag_norm_scale(i)) {
      multiply(y, terms(x), members.bias(i));
    } else if (members.masked(i)) {
      const Tensor unscaled = fresh_like(y);
      out.unscaled.push_back(unscaled);
      if (multiply_excess(y, unscaled, terms(*drops[i]), terms(x), *members.mag_norm_scale(i), members.bias(i)))
        continue;
      multiply(y, terms(x), members.bias(i));
      multiply(unscaled, terms(*drops[i]), std::nullopt);
      scale_output({unscaled, y, members.scale_around_bias(i), ScaleOutput::kAddExcess});
    } else {
      const Tensor unscaled = with_scaled ? fresh_like(y) : y.tensor();
      out.unscaled.push_back(unscaled);
      if (with_scaled && !members.bias(i) && multiply_scaled(y, unscaled, terms(x), *members.mag_norm_scale(i)))
        continue;
      multiply(unscaled, terms(x), members.bias(i));
      if (with_scaled) scale_output({unscaled, y, members.scale_around_bias(i), ScaleOutput::kScale});
    }
  }
  return out;
}

Tensor project_dropped(const MatrixView& x, const Members& members, size_t i, const Tensor& t) {
  std::vector<Cast> casts;
  const Adapters adapters(x, members, casts, /*need_a=*/false, /*need_b=*/true);
  cast_all(casts);
  const Tensor weight = members.weight(i, x.scalar_type());
  const Tensor unscaled = empty(x.base(), {x.size(0), members.outputs(i)}, x.scalar_type());
  const Term base{dropped(x, *members.mask(i)), MatrixView(weight).transposed()};
  const double scaling = members.expand_scaling(i, x.scalar_type());
  multiply(unscaled, {base, {adapters.columns_of(t, i), adapters.b[i]->transposed(), scaling}}, std::nullopt);
  return unscaled;
}

}  // namespace lora_fused
