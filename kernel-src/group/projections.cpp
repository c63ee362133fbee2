// The forward and the backward of projections that share an input, see projections.h.
#include "projections.h"

#include <cmath>

#include <torch/csrc/stable/ops.h>

#include "dora_norms.h"
#include "../common/dropout.h"
#include "../../torch-ext/torch_binding.h"

namespace lora_fused {

namespace {

// float64 has no conversion kernel of ours: it is there to check results.
void cast_all(const std::vector<Cast>& casts) {
  std::vector<Cast> fused;
  for (const auto& cast : casts) {
    const bool exact = cast.from.scalar_type() == ScalarType::Double ||
                       cast.to.scalar_type() == ScalarType::Double;
    if (cast.to.is_cuda() && !exact)
      fused.push_back(cast);
    else if (cast.rest)
      rest_cpu(cast);
    else
      TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(cast.to.tensor().get(), cast.from.tensor().get(), 0));
  }
#if defined(CUDA_KERNEL)
  if (!fused.empty()) cast_all_cuda(fused);
#endif
}

void sum_parts(const std::vector<PartSum>& sums) {
  if (sums.empty()) return;
#if defined(CUDA_KERNEL)
  if (sums[0].out.is_cuda()) return part_sums_cuda(sums);
#endif
  part_sums_cpu(sums);
}

void drop(const View& x, const Dropped& mask, const View& out, bool accumulate, bool scaled = true) {
#if defined(CUDA_KERNEL)
  if (x.is_cuda()) return dropout_cuda(x.tensor(), mask.seed, mask.p, out.tensor(), accumulate, scaled);
#endif
  dropout_cpu(x.tensor(), mask.seed, mask.p, out.tensor(), accumulate, scaled);
}

void scale(const Scale& work) {
#if defined(CUDA_KERNEL)
  if (work.y.is_cuda()) return scale_cuda(work);
#endif
  scale_cpu(work);
}

void sum_tokens(const std::vector<TokenSums>& works) {
  if (works.empty()) return;
#if defined(CUDA_KERNEL)
  if (works[0].dy.is_cuda()) return token_sums_cuda(works);
#endif
  for (const TokenSums& work : works) token_sums_cpu(work);
}

// Up to so many tokens a step waits for the host, and one launch for all skinny products of a group is
// worth more than the library's best product for each.
constexpr int64_t kOneLaunchTokens = 1024, kOneLaunchTokensOnHopper = 2048, kOneLaunchRank = 64;
// From so many tokens and elements of a group's dy on, one read of it for dt and dB is worth a launch more.
constexpr int64_t kOneReadTokens = 2048, kOneReadElements = int64_t(1) << 24;

bool waits_for_host(const View& x) {
  const auto dtype = x.scalar_type();
  return x.is_cuda() && (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) && x.size(0) <= kOneLaunchTokens;
}

// How the backward wants B: the skinny kernels read its columns, those for Hopper either way.
Adapters::Layout layout_of_b(const View& x) {
#if defined(CUDA_KERNEL)
  if (skinny_sm90_serves(x)) return Adapters::kAsStored;
#endif
  return waits_for_host(x) ? Adapters::kTransposed : Adapters::kAsStored;
}

// Whether the kernels of skinny products take these operands.
bool is_skinny(std::initializer_list<const View*> operands) {
#if defined(CUDA_KERNEL)
  for (const View* operand : operands)
    if (!operand->is_cuda() || !skinny_serves(*operand)) return false;
  return true;
#else
  return false;
#endif
}

const View& other_of(const SkinnyDown& product) { return product.a; }
const View& other_of(const SkinnyOuter& product) { return product.t; }
int64_t rank_of(const SkinnyDown& product) { return product.t.size(1); }
int64_t rank_of(const SkinnyOuter& product) { return product.t.size(1); }

#if defined(CUDA_KERNEL)
void run_skinny(const std::vector<SkinnyDown>& products) { skinny_down_cuda(products); }
void run_skinny(const std::vector<SkinnyOuter>& products) { skinny_outer_cuda(products); }
#endif

// Skinny products of one kind that go out together.
template <typename Product>
class Together {
 public:
  // False where the library's product is to be taken instead; so it is by `hopper_alone` on any other GPU.
  bool takes(const Product& product, bool hopper_alone = false) {
#if defined(CUDA_KERNEL)
    if (!product.x.is_cuda()) return false;
    if ((product.mask || product.x.size(0) <= kOneLaunchTokensOnHopper) && skinny_sm90_serves(product)) {
      on_hopper_.push_back(product);
      return true;
    }
    const bool pays = product.mask || (waits_for_host(product.x) && rank_of(product) <= kOneLaunchRank);
    if (hopper_alone || !pays || !is_skinny({&product.x, &other_of(product)})) return false;
    products_.push_back(product);
    return true;
#else
    return false;
#endif
  }

  void run() const {
#if defined(CUDA_KERNEL)
    if (!on_hopper_.empty()) skinny_sm90(on_hopper_);
    if (!products_.empty()) run_skinny(products_);
#endif
  }

 private:
  std::vector<Product> products_, on_hopper_;
};

// dt and dB of a group's members from one read of each dy, where that pays.
class OneRead {
 public:
  explicit OneRead(const std::vector<MaybeView>& dys) {
    int64_t tokens = 0, elements = 0;
    for (const MaybeView& dy : dys)
      if (dy) tokens = dy->size(0), elements += dy->numel();
    pays_ = tokens >= kOneReadTokens && elements >= kOneReadElements;
  }

  // dB [N, R] in `dtype`, to be filled with dt = scaling·dy b by `run`; none where other products are to be taken.
  MaybeTensor takes(const View& dy, const View& b, const View& t, const View& dt, double scaling, ScalarType dtype,
                    const std::optional<Parts>& parts = std::nullopt, double db_scaling = 1.0) {
#if defined(CUDA_KERNEL)
    if (!pays_ || !skinny_sm90_serves(dy)) return std::nullopt;
    const Tensor db = empty(dy.base(), {b.size(0), dt.size(1)}, dtype);
    const DyProducts products{dy, b, t, dt, db, scaling, parts, db_scaling};
    if (!dy_products_sm90_serves(products)) return std::nullopt;
    products_.push_back(products);
    return db;
#else
    return std::nullopt;
#endif
  }

  void run() const {
#if defined(CUDA_KERNEL)
    if (!products_.empty()) dy_products_sm90(products_);
#endif
  }

 private:
  bool pays_;
  std::vector<DyProducts> products_;
};

// out = scaling · x aᵀ by itself.
void multiply_down(const View& out, const View& x, const View& a, double scaling) {
  Together<SkinnyDown> down;
  if (down.takes({x, a, out, scaling, std::nullopt}, /*hopper_alone=*/true)) return down.run();
  multiply(out, x, a.transposed(), scaling, /*add=*/false);
}

View dropped(const View& x, const Dropped& mask) {
  const View d = fresh_like(x);
  drop(x, mask, d, /*accumulate=*/false);
  return d;
}

// x where the mask, if there is one, keeps it: exact, to be scaled with its product.
View kept(const View& x, const std::optional<Dropped>& mask) {
  if (!mask) return x;
  const View d = fresh_like(x);
  drop(x, *mask, d, /*accumulate=*/false, /*scaled=*/false);
  return d;
}

// What members with an adapter have in common, if all have the same.
template <typename Of>
auto common(const Members& members, Of of) -> std::optional<decltype(of(size_t{}))> {
  std::optional<decltype(of(size_t{}))> shared;
  for (size_t i = 0; i < members.count(); ++i) {
    if (!members.a(i)) continue;
    if (shared && *shared != of(i)) return std::nullopt;
    shared = of(i);
  }
  return shared;
}

std::optional<double> common_down_scaling(const Members& members, ScalarType dtype) {
  return common(members, [&](size_t i) { return members.down_scaling(i, dtype); });
}

}  // namespace

double beyond_t(double scaling, ScalarType dtype) {
  if (dtype != ScalarType::Half || !(std::abs(scaling) > 1.0)) return 1.0;
  int exponent = 0;  // 2^exponent is above |s|, and twice it where s is a power of two itself
  const bool is_power = std::frexp(std::abs(scaling), &exponent) == 0.5;
  return std::ldexp(1.0, is_power ? exponent - 1 : exponent);
}

void Lists::check() const {
  using P = PackedWeight;
  STD_TORCH_CHECK(quantized.empty() || quantized.size() == P::kFields * weights.size(), "quantized: ", quantized.size(),
                  " numbers for ", weights.size(), " weights, expected ", int64_t{P::kFields}, " each");
  for (size_t at = 0; at < quantized.size(); at += P::kFields) {
    const int64_t* const q = quantized.data() + at;
    STD_TORCH_CHECK(q[P::kFormat] >= 0 && q[P::kFormat] < kFormats, "weight ", at / P::kFields, ": format ", q[P::kFormat],
                    " is unknown, expected one of ", names_of("formats"));
    STD_TORCH_CHECK(q[P::kDtype] >= 0 && q[P::kDtype] < kQuantizedDtypes, "weight ", at / P::kFields, ": dtype ", q[P::kDtype],
                    " is unknown, expected one of ", names_of("dtypes"));
    const size_t last = q[P::kFirstScale] + (q[P::kFormat] == kFloating ? 0 : q[P::kNestedBlocksize] > 0 ? 4 : 1);
    STD_TORCH_CHECK(q[P::kFirstScale] >= 0 && last <= scales.size(), "weight ", at / P::kFields, ": ", scales.size(),
                    " scales, expected at least ", last);
  }
}

void FourBitWeight::dequantize(int64_t first, const Tensor& out) const {
  using P = PackedWeight;
  static_assert(kFormats == 3, "FourBitWeight: NF4 or FP4");
  const int64_t *q = numbers_, blocksize = q[P::kBlocksize], nested_blocksize = q[P::kNestedBlocksize];
  const bool fp4 = q[P::kFormat] == kFp4;
  const auto nested = [&](int which) { return nested_blocksize > 0 ? MaybeTensor(scales_[which]) : std::nullopt; };
#if defined(CUDA_KERNEL)
  if (out.is_cuda())
    return dequantize_4bit_cuda(packed_, scales_[0], nested(1), nested(2), nested(3), blocksize, nested_blocksize, fp4,
                                first, out);
#endif
  dequantize_4bit_cpu(packed_, scales_[0], nested(1), nested(2), nested(3), blocksize, nested_blocksize, fp4, first, out);
}

std::optional<Dropped> Members::mask(size_t i) const {
  if (!masked(i)) return std::nullopt;
  const int64_t one = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(lists_.seeds->get(), 1, &one, &one,
                                                        static_cast<int64_t>(first_ + i), &handle));
  return Dropped{Tensor(handle), lists_.dropouts[first_ + i]};
}

Tensor Members::weight(size_t i, ScalarType dtype) const {
  const Tensor& stored = lists_.weights[first_ + i];
  const std::optional<FourBitWeight> packed = this->packed(i);
  if (!packed) return stored;
  const Tensor weight = empty(stored, {packed->rows(), packed->cols()}, dtype);
  packed->dequantize(0, weight);
  return weight;
}

std::optional<FourBitWeight> Members::packed(size_t i) const {
  if (!is_packed(i)) return std::nullopt;
  return FourBitWeight(lists_.weights[first_ + i], lists_.scales, quantized(i));
}

bool Members::any_masked() const {
  for (size_t i = 0; i < count_; ++i)
    if (masked(i)) return true;
  return false;
}

Adapters::Adapters(const View& x, const Members& members, bool need_a, bool need_b, Layout layout_of_b)
    : parts(members.exact() ? 3 : 1),
      together(members.exact() && !members.any_masked() && common_down_scaling(members, x.scalar_type()) &&
               common(members, [&](size_t i) { return members.rank(i); })) {
  const ScalarType dtype = x.scalar_type();
  std::vector<Cast> casts;
  first.push_back(0);
  for (size_t i = 0; i < members.count(); ++i) first.push_back(first.back() + members.rank(i));
  if (members.exact()) {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "exact: expected x in bfloat16");
    if (need_a && ranks() > 0) a = empty(x.base(), {columns(), x.size(1)}, dtype);
    for (size_t i = 0; i < members.count(); ++i) {
      b.push_back(members.b(i) ? MaybeView(empty(x.base(), {members.outputs(i), parts * rank(i)}, dtype)) : std::nullopt);
      if (!members.b(i)) continue;
      STD_TORCH_CHECK(!members.masked(i) || !members.gain(i), "exact: expected DoRA without dropout, member ", i);
      const Tensor of_a = in_rows(*members.a(i)), of_b = in_rows(*members.b(i));
      for (int64_t part = 0; part < parts; ++part) {
        const bool rest = part == 1;
        if (need_a) casts.push_back({of_a, a->rows(at(i) + part * apart(i), rank(i)), false, rest});
        casts.push_back({of_b, b[i]->columns(part * rank(i), rank(i)), false, rest});
      }
    }
    if (!casts.empty()) cast_all(casts);
    return;
  }
  // What is copied lies in one buffer: an allocation costs as much as a launch does.
  const auto padded = [](int64_t count) { return (count + 63) / 64 * 64; };
  const auto copies_b = [&](size_t i) {
    return need_b && members.b(i) && (members.b(i)->scalar_type() != dtype || layout_of_b != kAsStored);
  };
  for (size_t i = 0; need_a && i < members.count(); ++i)
    if (ranks() > 0 && members.rank(i) == ranks() && members.a(i)->scalar_type() == dtype) a = *members.a(i);
  const bool copies_a = need_a && ranks() > 0 && !a;
  int64_t total = copies_a ? padded(ranks() * x.size(1)) : 0, used = 0;
  for (size_t i = 0; i < members.count(); ++i)
    if (copies_b(i)) total += padded(members.b(i)->numel());
  const MaybeTensor buffer = total > 0 ? MaybeTensor(empty(x.base(), {total}, dtype)) : std::nullopt;
  const auto piece = [&](int64_t rows, int64_t cols) {
    const View view(*buffer, rows, cols, cols, 1, used);
    used += padded(rows * cols);
    return view;
  };
  if (copies_a) {
    a = piece(ranks(), x.size(1));
    for (size_t i = 0; i < members.count(); ++i)
      if (members.a(i)) casts.push_back({in_rows(*members.a(i)), a_of(i)});
  }
  for (size_t i = 0; i < members.count(); ++i) {
    b.push_back(members.b(i) ? MaybeView(*members.b(i)) : std::nullopt);
    if (!copies_b(i)) continue;
    const int64_t n = b[i]->size(0), r = b[i]->size(1);
    const bool turned = layout_of_b == kTransposed;
    const View copy = turned ? piece(r, n) : piece(n, r);
    casts.push_back({in_rows(*members.b(i)), copy, turned});
    b[i] = turned ? copy.transposed() : copy;
  }
  if (!casts.empty()) cast_all(casts);
}

namespace {

// The parts of every member's t; where those of A are together, one product is that of all.
void project_down_exactly(const View& t, const View& x, const Members& members, const Adapters& adapters) {
  Together<SkinnyDown> together;
  std::vector<PartSum> sums;
  for (size_t i = 0; i < members.count(); ++i) {
    if (!members.a(i) || (adapters.together && adapters.first[i] > 0)) continue;
    const int64_t rank = adapters.rank(i), ranks = adapters.together ? adapters.ranks() : rank;
    const View a = adapters.a->rows(adapters.at(i), 2 * ranks), out = t.columns(adapters.at(i), ranks);
    const std::optional<Dropped> mask = members.mask(i);
    const double scaling = members.scaling(i);
    const Parts parts{rank, rank};
    if (together.takes({x, a.rows(0, ranks), out, scaling, mask, a.rows(ranks, ranks), parts}, /*hopper_alone=*/true))
      continue;
    const View wide = empty(x.base(), {x.size(0), 2 * ranks}, ScalarType::Float);
    multiply(wide, kept(x, mask), a.transposed(), 1.0, /*add=*/false);
    sums.push_back({wide.columns(0, ranks), wide.columns(ranks, ranks), out, scaling * scale_of(mask), parts});
  }
  together.run();
  sum_parts(sums);
}

// t of all members, and D(x) of those whose base product takes it as well.
Tensor project_down(const View& x, const Members& members, const Adapters& adapters,
                    std::vector<MaybeView>& drops) {
  const Tensor whole = empty(x.base(), {x.size(0), adapters.columns()}, x.scalar_type());
  const View t = whole;
  if (adapters.ranks() == 0) return whole;
  if (members.exact()) {
    project_down_exactly(t, x, members, adapters);
    return whole;
  }
  // On the CPU a member's t is that of the member alone, bit for bit: a group changes no result.
  const ScalarType dtype = x.scalar_type();
  const std::optional<double> shared = common_down_scaling(members, dtype);
  if (shared && x.is_cuda() && !members.any_masked()) {
    multiply_down(t, x, *adapters.a, *shared);
    return whole;
  }
  Together<SkinnyDown> together;
  for (size_t i = 0; i < members.count(); ++i) {
    if (!members.a(i)) continue;
    const View part = adapters.part(t, i), a = adapters.a_of(i);
    const double scaling = members.down_scaling(i, dtype);
    if (members.masked(i) && !members.gain(i) && together.takes({x, a, part, scaling, members.mask(i)})) continue;
    if (members.masked(i)) drops[i] = dropped(x, *members.mask(i));
    multiply_down(part, drops[i] ? *drops[i] : x, a, scaling);
  }
  together.run();
  return whole;
}

}  // namespace

Tensor project_down(const View& x, const Members& members) {
  const Adapters adapters(x, members, /*need_a=*/true, /*need_b=*/false);
  std::vector<MaybeView> drops(members.count());
  return project_down(x, members, adapters, drops);
}

Outputs project(const View& x, const Tensor& like, const Members& members, const Norms& norms, bool scaled_too) {
  const Adapters adapters(x, members, true, true);
  std::vector<MaybeView> drops(members.count());
  Outputs out{{}, {}, project_down(x, members, adapters, drops)};
  for (size_t i = 0; i < members.count(); ++i) {
    const int64_t n = members.outputs(i);
    const Tensor weight = members.weight(i, x.scalar_type());
    norms.from_weight(members.index(i), weight);
    const auto terms = [&](const View& input) {
      std::vector<Term> sum{{input, View(weight).transposed()}};
      if (members.b(i))
        sum.push_back({adapters.part(out.t, i), adapters.b[i]->transposed(), members.up_scaling(i, x.scalar_type())});
      return sum;
    };
    const Tensor result = empty_as(like, n);
    const View y(result, x.size(0), n, n, 1);
    if (!members.scaled(i)) {
      out.ys.push_back(result);
      if (!members.gain(i)) {
        multiply(y, terms(x), members.bias(i));
        continue;
      }
      const Tensor u = fresh_like(y);
      out.us.push_back(u);
      if (multiply_excess(y, u, terms(*drops[i]), terms(x), *members.gain(i), members.bias(i))) continue;
      multiply(y, terms(x), members.bias(i));
      multiply(u, terms(*drops[i]), std::nullopt);
      scale({u, y, members.gain_of(i), Scale::kAddExcess});
      continue;
    }
    const Tensor u = scaled_too ? fresh_like(y) : y.tensor();
    out.us.push_back(u);
    out.ys.push_back(result);
    if (scaled_too && !members.bias(i) && multiply_scaled(y, u, terms(x), *members.gain(i))) continue;
    multiply(u, terms(x), members.bias(i));
    if (scaled_too) scale({u, y, members.gain_of(i), Scale::kGain});
  }
  return out;
}

Tensor project_dropped(const View& x, const Members& members, size_t i, const Tensor& t) {
  const Adapters adapters(x, members, /*need_a=*/false, /*need_b=*/true);
  const Tensor weight = members.weight(i, x.scalar_type());
  const Tensor u = empty(x.base(), {x.size(0), members.outputs(i)}, x.scalar_type());
  const Term base{dropped(x, *members.mask(i)), View(weight).transposed()};
  const double scaling = members.up_scaling(i, x.scalar_type());
  multiply(u, {base, {adapters.part(t, i), adapters.b[i]->transposed(), scaling}}, std::nullopt);
  return u;
}

Backward::Backward(const Members& members, const View& x, const Given& given)
    : members_(members),
      needs_(given.needs),
      need_dx_(given.need_dx),
      x_(x),
      t_(given.t),
      lora_dys_(members.count()),
      dots_(members.count()),
      sums_(members.count()),
      dbs_(members.count()),
      adapters_(x, members, given.need_dx, true, layout_of_b(x)) {
  size_t next_u = 0;
  bool any_dt = need_dx_;
  std::vector<TokenSums> passes;
  for (size_t i = 0; i < members.count(); ++i) {
    dys_.push_back(given.dys[i] ? MaybeView(matrix(*given.dys[i])) : std::nullopt);
    const MaybeView u = members.gain(i) ? MaybeView(given.us[next_u++]) : std::nullopt;
    if (dys_[i])
      if (const TokenSums pass = pass_over_dy(i, u, members.of(given.norms, i), given.own_dys); pass.sums || pass.scaled)
        passes.push_back(pass);
    any_dt = any_dt || needs(i, kNeedA);
  }
  sum_tokens(passes);
  if (adapters_.ranks() > 0 && any_dt) members.exact() ? project_down_exactly() : project_down();
}

void Backward::project_down_exactly() {
  dt_ = empty(x_.base(), {x_.size(0), adapters_.columns()}, x_.scalar_type());
  std::vector<PartSum> sums;
  Together<SkinnyDown> together;
  OneRead one_read(lora_dys_);
  for (size_t i = 0; i < members_.count(); ++i) {
    if (!members_.a(i)) continue;
    const int64_t rank = adapters_.rank(i), at = adapters_.at(i), apart = adapters_.apart(i);
    if (!dys_[i]) {
      for (int64_t part = 0; part < adapters_.parts; ++part) {
        Tensor unused = dt_->columns(at + part * apart, rank).tensor();
        torch::stable::zero_(unused);
      }
      continue;
    }
    const View &dy = *lora_dys_[i], out = dt_->columns(at, rank);
    const View b = adapters_.b[i]->columns(0, 2 * rank), t = adapters_.part(t_, i).columns(rank, 2 * rank);
    const double scaling = members_.scaling(i);
    const Parts parts{rank, apart};
    if (needs(i, kNeedB)) dbs_[i] = one_read.takes(dy, b, t, out, scaling, members_.b(i)->scalar_type(), parts);
    const View high = b.columns(0, rank).transposed(), rest = b.columns(rank, rank).transposed();
    if (dbs_[i] || together.takes({dy, high, out, scaling, std::nullopt, rest, parts}, /*hopper_alone=*/true)) continue;
    const View wide = empty(x_.base(), {x_.size(0), 2 * rank}, ScalarType::Float);
    multiply(wide, dy, b, 1.0, /*add=*/false);
    sums.push_back({wide.columns(0, rank), wide.columns(rank, rank), out, scaling, parts});
  }
  one_read.run();
  together.run();
  sum_parts(sums);
}

// dt = s·dy' B of all members.
void Backward::project_down() {
  const Tensor whole = empty(x_.base(), {x_.size(0), adapters_.ranks()}, x_.scalar_type());
  dt_ = whole;
  Together<SkinnyDown> together;
  OneRead one_read(lora_dys_);
  for (size_t i = 0; i < members_.count(); ++i) {
    if (!members_.a(i)) continue;
    const View part = adapters_.part(*dt_, i);
    if (!dys_[i]) {
      Tensor unused = part.tensor();
      torch::stable::zero_(unused);
      continue;
    }
    const View &dy = *lora_dys_[i], &b = *adapters_.b[i];
    if (needs(i, kNeedB))
      dbs_[i] = one_read.takes(dy, b, adapters_.part(t_, i), part, members_.scaling(i), members_.b(i)->scalar_type(),
                               std::nullopt, members_.up_scaling(i, x_.scalar_type()));
    if (!dbs_[i] && !together.takes({dy, b.transposed(), part, members_.scaling(i), std::nullopt}))
      multiply(part, dy, b, members_.scaling(i), /*add=*/false);
  }
  one_read.run();
  together.run();
  for (size_t i = 0; i < members_.count(); ++i)
    if (dbs_[i] && members_.gain(i) && members_.masked(i)) lora_dys_[i].reset();  // has served
}

// g∘dy, and what else of dy is wanted, in one pass; plain LoRA needs none, one without sums or scaled.
TokenSums Backward::pass_over_dy(size_t i, const MaybeView& u, const MaybeTensor& norm, bool own_dy) {
  const View& dy = *dys_[i];
  const auto vector = [&] {
    return empty(dy.base(), {dy.size(1)},
                 dy.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  };
  TokenSums work{dy};
  work.gain = members_.gain_of(i);
  if (needs(i, kNeedBias)) work.sums = sums_[i] = vector();
  if (u) {
    work.scaled = lora_dys_[i] = own_dy && members_.scaled(i) ? dy : View(fresh_like(dy));
    if (needs(i, kNeedMagnitude)) {
      work.u = u;
      work.norm = norm;
      work.dots = dots_[i] = vector();
    }
  } else {
    lora_dys_[i] = dy;
  }
  return work;
}

void Backward::input(const View& dx) const {
  std::vector<Term> terms;
  std::vector<size_t> masked;
  const bool share = !members_.any_masked();
  for (size_t i = 0; i < members_.count(); ++i) {
    if (!dys_[i]) continue;
    terms.push_back({members_.scaled(i) ? *lora_dys_[i] : *dys_[i], members_.weight(i, x_.scalar_type())});
    if (!members_.a(i) || share) continue;
    if (members_.masked(i))
      masked.push_back(i);
    else
      terms.push_back({adapters_.part(*dt_, i), adapters_.a_of(i)});
  }
  if (dt_ && share) terms.push_back({*dt_, *adapters_.a});
  // The mask of one member goes into the product.
  if (!masked.empty() && multiply_dropped(dx, dropped_terms(masked[0]), *members_.mask(masked[0]), terms))
    masked.erase(masked.begin());
  else
    multiply(dx, terms, std::nullopt);
  if (!masked.empty()) add_dropped(dx, masked);
}

// Of dx, what member i's mask is over.
std::vector<Term> Backward::dropped_terms(size_t i) const {
  std::vector<Term> terms;
  if (members_.gain(i)) {
    const View excess = fresh_like(*dys_[i]);
    scale({*dys_[i], excess, {members_.gain(i), std::nullopt}, Scale::kExcess});
    terms.push_back({excess, members_.weight(i, x_.scalar_type())});
  }
  terms.push_back({adapters_.part(*dt_, i), adapters_.a_of(i)});
  return terms;
}

void Backward::add_dropped(const View& dx, const std::vector<size_t>& which) const {
  std::vector<DroppedUp> fused;
  for (const size_t i : which) {
    const View dt = adapters_.part(*dt_, i), a = adapters_.a_of(i);
    const Dropped mask = *members_.mask(i);
    if (!members_.gain(i) && is_skinny({&dx, &dt, &a})) {
      fused.push_back({dt, a, mask});
      continue;
    }
    const View delta = fresh_like(dx);
    multiply(delta, dropped_terms(i), std::nullopt);
    drop(delta, mask, dx, /*accumulate=*/true);
  }
#if defined(CUDA_KERNEL)
  if (!fused.empty()) dropped_up_add_cuda(dx, fused);
#endif
}

void Backward::parameters_exactly(const View& x, Tensors& grads) const {
  std::vector<PartSum> sums;
  std::vector<Cast> casts;
  Together<SkinnyOuter> together;
  // (high + rest)ᵀ D(input) or, turned, its transpose, in float32; high and rest are next to each other.
  const auto product = [&](const View& both, const View& input, bool turned, const std::optional<Dropped>& mask) {
    const int64_t rank = both.size(1) / 2, cols = input.size(1);
    const auto shaped = [&](int64_t ranks) {
      return empty(x.base(), {turned ? cols : ranks, turned ? ranks : cols}, ScalarType::Float);
    };
    const Tensor out = shaped(rank);
    const View high = both.columns(0, rank), rest = both.columns(rank, rank);
    if (together.takes({high, input, out, turned, mask, rest}, /*hopper_alone=*/true)) return out;
    const View wide = shaped(2 * rank), from = kept(input, mask);
    if (turned) {
      multiply(wide, from.transposed(), both, 1.0, /*add=*/false);
      sums.push_back({wide.columns(0, rank), wide.columns(rank, rank), out, scale_of(mask)});
    } else {
      multiply(wide, both.transposed(), from, 1.0, /*add=*/false);
      sums.push_back({wide.rows(0, rank), wide.rows(rank, rank), out, scale_of(mask)});
    }
    return out;
  };
  const auto gradient = [&](const View& sum, ScalarType dtype) {
    if (dtype == ScalarType::Float) return sum.tensor();
    const Tensor wanted = empty(x.base(), {sum.size(0), sum.size(1)}, dtype);
    casts.push_back({sum, wanted});
    return wanted;
  };
  MaybeTensor all;  // dA of all members, where their parts are together
  for (size_t i = 0; i < members_.count(); ++i) {
    const int64_t rank = adapters_.rank(i), ranks = adapters_.ranks();
    if (needs(i, kNeedA)) {
      const ScalarType dtype = members_.a(i)->scalar_type();
      if (adapters_.together) {
        if (!all) all = product(dt_->columns(ranks, 2 * ranks), x, /*turned=*/false, std::nullopt);
        grads.push_back(gradient(View(*all).rows(adapters_.first[i], rank), dtype));
      } else {
        const View dt = adapters_.part(*dt_, i).columns(rank, 2 * rank);
        grads.push_back(gradient(product(dt, x, /*turned=*/false, members_.mask(i)), dtype));
      }
    }
    if (dbs_[i]) {
      grads.push_back(*dbs_[i]);
    } else if (needs(i, kNeedB)) {
      const View t = adapters_.part(t_, i).columns(rank, 2 * rank);
      grads.push_back(gradient(product(t, *lora_dys_[i], /*turned=*/true, std::nullopt), members_.b(i)->scalar_type()));
    }
    if (needs(i, kNeedBias)) grads.push_back(*sums_[i]);
    if (needs(i, kNeedMagnitude)) grads.push_back(*dots_[i]);
  }
  together.run();
  sum_parts(sums);
  if (!casts.empty()) cast_all(casts);
}

void Backward::parameters(const View& x, Tensors& grads) const {
  if (members_.exact()) return parameters_exactly(x, grads);
  std::vector<Cast> casts;
  Together<SkinnyOuter> together;
  // scaling·tᵀ D(input) or, turned, its transpose, in `dtype`: with all others of its kind, by the library into what is
  // wanted, or by a conversion of its product in x's dtype.
  const auto product = [&](const View& t, const View& input, ScalarType dtype, bool turned,
                           const std::optional<Dropped>& mask, double scaling = 1.0) {
    const int64_t rank = t.size(1), cols = input.size(1);
    const std::vector<int64_t> sizes{turned ? cols : rank, turned ? rank : cols};
    const Tensor wanted = empty(x.base(), sizes, dtype);
    const bool direct = dtype == x.scalar_type() || (dtype == ScalarType::Float && gives_float(x));
    if (direct && together.takes({t, input, wanted, turned, mask, std::nullopt, scaling})) return wanted;
    const Tensor own = direct ? wanted : empty(x.base(), sizes, x.scalar_type());
    const View from = mask ? dropped(input, *mask) : input;
    turned ? multiply(own, from.transposed(), t, scaling, /*add=*/false)
           : multiply(own, t.transposed(), from, scaling, /*add=*/false);
    if (!direct) casts.push_back({own, wanted});
    return wanted;
  };
  const bool share = !members_.any_masked();
  std::optional<Tensor> all;  // dA of all members
  for (size_t i = 0; i < members_.count(); ++i) {
    if (needs(i, kNeedA)) {
      const ScalarType dtype = members_.a(i)->scalar_type();
      if (share) {
        if (!all || all->scalar_type() != dtype) all = product(*dt_, x, dtype, /*turned=*/false, std::nullopt);
        grads.push_back(View(*all).rows(adapters_.first[i], members_.rank(i)).tensor());
      } else {
        grads.push_back(product(adapters_.part(*dt_, i), x, dtype, /*turned=*/false, members_.mask(i)));
      }
    }
    if (dbs_[i])
      grads.push_back(*dbs_[i]);
    else if (needs(i, kNeedB))
      grads.push_back(product(adapters_.part(t_, i), *lora_dys_[i], members_.b(i)->scalar_type(), /*turned=*/true,
                              std::nullopt, members_.up_scaling(i, x.scalar_type())));
    if (needs(i, kNeedBias)) grads.push_back(*sums_[i]);
    if (needs(i, kNeedMagnitude)) grads.push_back(*dots_[i]);
  }
  together.run();
  if (!casts.empty()) cast_all(casts);
}

}  // namespace lora_fused
