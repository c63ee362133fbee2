// Products with an adapter's rank, see skinny.h.
#include "skinny.h"

#include "products.h"

namespace lora_fused {

namespace {

// Up to so many tokens a step waits for the host, and one launch for all skinny products of a group is
// worth more than the library's best product for each.
constexpr int64_t kOneLaunchTokens = 1024, kOneLaunchTokensOnHopper = 2048, kOneLaunchRank = 64;
// From so many tokens and elements of a group's dy on, one read of it for dt and dB is worth a launch more.
constexpr int64_t kOneReadTokens = 2048, kOneReadElements = int64_t(1) << 24;

bool is_launch_bound(const MatrixView& x) {
  const auto dtype = x.scalar_type();
  return x.is_cuda() && (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) && x.size(0) <= kOneLaunchTokens;
}

#if defined(CUDA_KERNEL)
const MatrixView& other_of(const Shrink& product) { return product.a; }
const MatrixView& other_of(const AdapterGrad& product) { return product.t; }
int64_t rank_of(const Shrink& product) { return product.t.size(1); }
int64_t rank_of(const AdapterGrad& product) { return product.t.size(1); }
void run_sm80(const std::vector<Shrink>& products) { shrink_cuda(products); }
void run_sm80(const std::vector<AdapterGrad>& products) { adapter_grad_cuda(products); }
#endif

}  // namespace

Adapters::Layout layout_of_b(const MatrixView& x) {
#if defined(CUDA_KERNEL)
  if (skinny_sm90_supports(x)) return Adapters::kAsStored;
#endif
  return is_launch_bound(x) ? Adapters::kTransposed : Adapters::kAsStored;
}

bool is_skinny(std::initializer_list<const MatrixView*> operands) {
#if defined(CUDA_KERNEL)
  for (const MatrixView* operand : operands)
    if (!operand->is_cuda() || !skinny_supports(*operand)) return false;
  return true;
#else
  return false;
#endif
}

void multiply_shrink(const MatrixView& out, const MatrixView& x, const MatrixView& a, double scaling) {
  SkinnyBatch<Shrink> batch;
  if (batch.add({x, a, out, scaling, std::nullopt}, /*hopper_alone=*/true)) return batch.run();
  multiply(out, x, a.transposed(), scaling, /*add=*/false);
}

template <typename Product>
bool SkinnyBatch<Product>::add(const Product& product, bool hopper_alone) {
#if defined(CUDA_KERNEL)
  if (!product.x.is_cuda()) return false;
  if ((product.mask || product.x.size(0) <= kOneLaunchTokensOnHopper) && skinny_sm90_supports(product)) {
    sm90_.push_back(product);
    return true;
  }
  const bool is_faster = product.mask || (is_launch_bound(product.x) && rank_of(product) <= kOneLaunchRank);
  if (hopper_alone || !is_faster || !is_skinny({&product.x, &other_of(product)})) return false;
  sm80_.push_back(product);
  return true;
#else
  return false;
#endif
}

template <typename Product>
void SkinnyBatch<Product>::run() const {
#if defined(CUDA_KERNEL)
  if (!sm90_.empty()) skinny_sm90(sm90_);
  if (!sm80_.empty()) run_sm80(sm80_);
#endif
}

template class SkinnyBatch<Shrink>;
template class SkinnyBatch<AdapterGrad>;

FusedDtDb::FusedDtDb(const std::vector<MaybeMatrixView>& dys) {
  int64_t tokens = 0, elements = 0;
  for (const MaybeMatrixView& dy : dys)
    if (dy) tokens = dy->size(0), elements += dy->numel();
  is_faster_ = tokens >= kOneReadTokens && elements >= kOneReadElements;
}

MaybeTensor FusedDtDb::add(const MatrixView& dy, const MatrixView& b, const MatrixView& t, const MatrixView& dt,
                           double scaling, ScalarType dtype, const std::optional<SplitLayout>& split, double db_scaling) {
#if defined(CUDA_KERNEL)
  if (!is_faster_ || !skinny_sm90_supports(dy)) return std::nullopt;
  const Tensor db = empty(dy.base(), {b.size(0), dt.size(1)}, dtype);
  const DtDb products{dy, b, t, dt, db, scaling, split, db_scaling};
  if (!dt_db_sm90_supports(products)) return std::nullopt;
  products_.push_back(products);
  return db;
#else
  return std::nullopt;
#endif
}

void FusedDtDb::run() const {
#if defined(CUDA_KERNEL)
  if (!products_.empty()) dt_db_sm90(products_);
#endif
}

}  // namespace lora_fused
