#include "ops.h"
#include "tensors.h"

namespace ensemw2s {

Tensor mixture_log_probs_cpu(std::vector<Tensor> logits, Tensor weights, int64_t combine) {
  const MixtureOfTensors mixture(logits, weights, combine);
  const auto sizes = logits[0].sizes();
  Tensor out = new_tensor(logits[0], std::vector<int64_t>(sizes.begin(), sizes.end()), ScalarType::Float);
  mixture_log_probs(*mixture, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

namespace {

// Refuses a row's setting that is out of its range. A number for all rows was looked at in Python.
template <class Narrow, class Wide, class InRange>
void check_rows(const Setting<Narrow, Wide>& setting, int64_t rows, const char* name, const char* expected,
                const InRange& in_range) {
  for (int64_t i = 0; setting.rows && i < rows; ++i)
    ENSEMW2S_CHECK(in_range(setting.of(i)), name, " must be ", expected, ", got ", setting.of(i), " in row ",
                   i);
}

void check_settings(const SampleSettings& settings, int64_t rows) {
  check_rows(settings.temperature, rows, "temperature", "finite and at least 0 (0 is greedy)",
             [](double value) { return value >= 0 && std::isfinite(value); });
  check_rows(settings.top_k, rows, "top_k", "at least 0 (0 is off) and below 2**63",
             [](int64_t value) { return value >= 0; });
  check_rows(settings.top_p, rows, "top_p", "in (0, 1] (1 is off)",
             [](double value) { return value > 0 && value <= 1; });
  check_rows(settings.min_p, rows, "min_p", "in [0, 1] (0 is off)",
             [](double value) { return value >= 0 && value <= 1; });
}

// Refuses adjustments that token_adjustments would not have made.
void check_adjustments(const Offer& offer, int64_t rows, int64_t vocabulary) {
  for (int64_t row = 0; row < rows; ++row) {
    int64_t last = -1;
    for (int64_t i = 0; i < offer.count; ++i) {
      const int64_t token = offer.token(row, i);
      if (token == -1) {
        last = vocabulary;
        continue;
      }
      ENSEMW2S_CHECK(token > last && token < vocabulary,
                     "the tokens of adjustments must ascend and be below ", vocabulary, ", got ", token,
                     " in row ", row);
      ENSEMW2S_CHECK(offer.listed[row * offer.words + token / 32] >> (token % 32) & 1,
                     "the bits of adjustments lack token ", token, " in row ", row);
      ENSEMW2S_CHECK(offer.adjustment(rows, row, i).is_usable(), "the values of adjustments for token ",
                     token, " cannot be used in row ", row);
      last = token;
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixture_sample_cpu(
    std::vector<Tensor> logits, Tensor weights, double temperature, int64_t top_k, double top_p, double min_p,
    std::optional<Tensor> temperatures, std::optional<Tensor> top_ks, std::optional<Tensor> top_ps,
    std::optional<Tensor> min_ps, Tensor seeds, Tensor positions, int64_t combine, int64_t top_logprobs,
    std::optional<Tensor> adjusted_tokens, std::optional<Tensor> adjusted_values,
    std::optional<Tensor> adjusted_bits, std::optional<Tensor> mask) {
  ENSEMW2S_CHECK(!logits.empty(), "logits hold no expert");
  const int64_t vocabulary = vocabulary_of(logits[0]), rows = logits[0].numel() / vocabulary;
  const OfferOfTensors offer(adjusted_tokens, adjusted_values, adjusted_bits, mask, rows, vocabulary);
  check_adjustments(*offer, rows, vocabulary);
  const MixtureOfTensors mixture(logits, weights, combine, *offer);
  const RealSetting temperature_of(temperature, temperatures, rows, "temperature");
  const CountSetting top_k_of(top_k, top_ks, rows, "top_k");
  const RealSetting top_p_of(top_p, top_ps, rows, "top_p"), min_p_of(min_p, min_ps, rows, "min_p");
  const Dense<int64_t> dense_seeds(seeds, rows, "seeds"), dense_positions(positions, rows, "positions");
  const SampleSettings settings{*temperature_of, *top_k_of,        *top_p_of,
                                *min_p_of,       dense_seeds.data, dense_positions.data};
  check_settings(settings, rows);
  const NewSample sample(logits[0], rows, int64_t(logits.size()), top_logprobs);
  mixture_sample(*mixture, settings, sample.pointers());
  return sample.tensors();
}

}  // namespace ensemw2s
