// The CUDA ops on torch tensors: they check, unpack to raw pointers and launch on torch's current stream,
// without waiting for the device. Values inside tensors are not looked at: a row that they spoil is reported
// by the kernels.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "launch.h"

namespace ensemw2s::cuda {

namespace {

using torch::stable::accelerator::DeviceGuard;

// The library is linked against neither libtorch_cuda nor any symbol of it, so that it also loads beside a
// CPU torch.
void* current_stream(int32_t device) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<GetStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"))
                      : nullptr;
  }();
  STD_TORCH_CHECK(get_stream, "ensemw2s: libtorch_cuda.so does not tell its current stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == 0, "ensemw2s: torch has no current stream of device ",
                  device);
  return stream;
}

// Whether one stride leads from each row to the next.
bool find_row_stride(const Rows& rows, int64_t& stride) {
  int64_t next = -1;  // what the next outer dimension's stride must be
  stride = 0;
  for (int d = rows.dims - 1; d >= 0; --d) {
    if (rows.sizes[d] == 1) continue;
    if (next < 0)
      stride = rows.strides[d];
    else if (rows.strides[d] != next)
      return false;
    next = rows.strides[d] * rows.sizes[d];
  }
  return true;
}

bool same_kind(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim() || a.scalar_type() != b.scalar_type() ||
      a.get_device_index() != b.get_device_index())
    return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// Owns what a DeviceMixture points to, and the scratch memory of its kernels: the caching allocator hands
// memory out again in the order of the stream, so that it may go before they are done.
class MixtureOnDevice {
 public:
  MixtureOnDevice(std::vector<Tensor> logits, const Tensor& weights, int64_t combine)
      : logits_(std::move(logits)) {
    ENSEMW2S_CHECK(!logits_.empty() && logits_.size() <= kMaxExperts, "the CUDA kernels mix 1 to ",
                   kMaxExperts, " experts, got ", logits_.size(), "; use impl='reference'");
    ENSEMW2S_CHECK(combine >= 0 && combine <= 2, "combine must be 0, 1 or 2, got ", combine);
    const Tensor& first = logits_[0];
    const int64_t vocabulary = vocabulary_of(first);
    ENSEMW2S_CHECK(vocabulary <= kMaxVocabulary, "the CUDA kernels take vocabularies of 1 to ",
                   kMaxVocabulary, " tokens, got ", vocabulary);
    const int64_t experts = int64_t(logits_.size()), rows = first.numel() / vocabulary;
    const bool per_row = weights.dim() > 1;
    ENSEMW2S_CHECK(
        weights.numel() == experts * (per_row ? rows : 1) && weights.scalar_type() == ScalarType::Float &&
            weights.is_contiguous() && weights.is_cuda() &&
            weights.get_device_index() == first.get_device_index(),
        "weights must be a contiguous float32 [T] or [..., T] on the logits' device with T = ", experts);
    for (size_t t = 0; t < logits_.size(); ++t) set_expert(t);
    mixture_.num_experts = int(experts);
    mixture_.rows = rows;
    mixture_.vocabulary = int(vocabulary);
    mixture_.weights = static_cast<const float*>(weights.const_data_ptr());
    mixture_.weight_stride = per_row ? experts : 0;
    mixture_.combine = Combine(combine);
    mixture_.dtype = dtype_of(first);
  }
  MixtureOnDevice(const MixtureOnDevice&) = delete;
  MixtureOnDevice& operator=(const MixtureOnDevice&) = delete;

  const DeviceMixture& operator*() const { return mixture_; }
  int32_t device() const { return logits_[0].get_device_index(); }

  void offer(const Offer& offer) { mixture_.offer = offer; }

  void* allocate(int64_t bytes) {
    scratch_.push_back(new_tensor(logits_[0], {bytes}, ScalarType::Byte));
    return scratch_.back().mutable_data_ptr();
  }

 private:
  void set_expert(size_t t) {
    ENSEMW2S_CHECK(same_kind(logits_[t], logits_[0]), "all experts' logits need one shape, dtype and device");
    if (!find_row_stride(rows_of(logits_[t]), mixture_.row_stride[t])) {
      logits_[t] = as_contiguous(logits_[t]);
      find_row_stride(rows_of(logits_[t]), mixture_.row_stride[t]);
    }
    mixture_.logits[t] = logits_[t].const_data_ptr();
  }

  std::vector<Tensor> logits_, scratch_;
  DeviceMixture mixture_{};
};

Dense<int64_t> keys_of(const Tensor& tensor, int64_t rows, const Tensor& logits, const char* name) {
  ENSEMW2S_CHECK(tensor.is_cuda() && tensor.get_device_index() == logits.get_device_index(), name,
                 " must be on the logits' device");
  return {tensor, rows, name};
}

void check_device(const std::optional<Tensor>& rows, const Tensor& logits, const char* name) {
  ENSEMW2S_CHECK(!rows || (rows->is_cuda() && rows->get_device_index() == logits.get_device_index()), name,
                 " must be on the logits' device");
}

void check_launch(const char* error) { STD_TORCH_CHECK(!error, "ensemw2s: CUDA launch failed: ", error); }

}  // namespace

Tensor mixture_log_probs_cuda(std::vector<Tensor> logits, Tensor weights, int64_t combine) {
  MixtureOnDevice mixture(logits, weights, combine);
  const DeviceGuard guard(mixture.device());
  const auto sizes = logits[0].sizes();
  Tensor out = new_tensor(logits[0], std::vector<int64_t>(sizes.begin(), sizes.end()), ScalarType::Float);
  check_launch(mixture_log_probs(
      *mixture, static_cast<float*>(out.mutable_data_ptr()),
      [&](int64_t bytes) { return mixture.allocate(bytes); }, current_stream(mixture.device())));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixture_sample_cuda(
    std::vector<Tensor> logits, Tensor weights, double temperature, int64_t top_k, double top_p, double min_p,
    std::optional<Tensor> temperatures, std::optional<Tensor> top_ks, std::optional<Tensor> top_ps,
    std::optional<Tensor> min_ps, Tensor seeds, Tensor positions, int64_t combine, int64_t top_logprobs,
    std::optional<Tensor> adjusted_tokens, std::optional<Tensor> adjusted_values,
    std::optional<Tensor> adjusted_bits, std::optional<Tensor> mask) {
  MixtureOnDevice mixture(logits, weights, combine);
  const DeviceGuard guard(mixture.device());
  const Tensor& first = logits[0];
  check_device(temperatures, first, "temperature");
  check_device(top_ks, first, "top_k");
  check_device(top_ps, first, "top_p");
  check_device(min_ps, first, "min_p");
  check_device(adjusted_tokens, first, "adjustments");
  check_device(mask, first, "mask");
  const int64_t rows = (*mixture).rows;
  const OfferOfTensors offer(adjusted_tokens, adjusted_values, adjusted_bits, mask, rows,
                             vocabulary_of(first));
  mixture.offer(*offer);
  const RealSetting temperature_of(temperature, temperatures, rows, "temperature");
  const CountSetting top_k_of(top_k, top_ks, rows, "top_k");
  const RealSetting top_p_of(top_p, top_ps, rows, "top_p"), min_p_of(min_p, min_ps, rows, "min_p");
  const Dense<int64_t> dense_seeds = keys_of(seeds, rows, first, "seeds");
  const Dense<int64_t> dense_positions = keys_of(positions, rows, first, "positions");
  const SampleSettings settings{*temperature_of, *top_k_of,        *top_p_of,
                                *min_p_of,       dense_seeds.data, dense_positions.data};
  const NewSample sample(first, rows, int64_t(logits.size()), top_logprobs);
  check_launch(mixture_sample(
      *mixture, settings, sample.pointers(), [&](int64_t bytes) { return mixture.allocate(bytes); },
      current_stream(mixture.device())));
  return sample.tensors();
}

}  // namespace ensemw2s::cuda

STABLE_TORCH_LIBRARY_IMPL(ensemw2s, CUDA, m) {
  m.impl("mixture_log_probs", TORCH_BOX(&ensemw2s::cuda::mixture_log_probs_cuda));
  m.impl("mixture_sample", TORCH_BOX(&ensemw2s::cuda::mixture_sample_cuda));
}
