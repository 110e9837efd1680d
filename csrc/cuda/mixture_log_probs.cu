// mixture_log_probs: scan, then a block per row that merges, then one pass that writes.

#include "mixture.cuh"

namespace ensemw2s::cuda {

template <class T, bool kProduct>
ENSEMW2S_KERNEL(kRowThreads, 1)
finish_kernel(const DeviceMixture mixture, const ScanResults results, RowState* states) {
  allow_early_kernels();
  RowState& state = states[block_index()];
  merge_partials<T, kProduct>(mixture, results, block_index(), state);
  barrier();
  const bool valid = is_valid<kProduct>(state);
  if (valid && mixture.combine == Combine::kVote) find_winners<T>(mixture, results, block_index(), state);
  if (thread_index() == 0) state.valid = valid;
}

ENSEMW2S_DEVICE void store_floats(float* out, int first, int vocabulary, int count, const float* values) {
  for (int e = 0; e < count; e += 4) {
    if (uintptr_t(out) % 16 == 0 && first + e + 4 <= vocabulary) {
      Words4 words;
      memcpy(&words, values + e, sizeof words);
      store_16_bytes(out + first + e, words);
    } else {
      for (int i = e; i < e + 4 && first + i < vocabulary; ++i) out[first + i] = values[i];
    }
  }
}

// kVector tokens from `first` on.
template <class T, bool kProduct>
ENSEMW2S_DEVICE void log_probs_of_vector(const DeviceMixture& mixture, const RowState& state, int64_t row,
                                         int first, float* out) {
  const int experts = mixture.num_experts;
  float logits[kVector<T>];
  for (int e = 0; e < kVector<T>; ++e) out[e] = 0;
#pragma unroll 2
  for (int a = 0; a < state.num_active; ++a) {
    const int t = state.active[a];
    load_vector(row_of<T>(mixture, t, row), mixture.vocabulary, first, logits);
    for (int e = 0; e < kVector<T>; ++e)
      out[e] += kProduct ? product_term(float(state.weight[t]), logits[e], state.max[t])
                         : weighted_probability(state, t, logits[e]);
  }
  for (int e = 0; e < kVector<T>; ++e) {
    const int token = first + e < mixture.vocabulary ? first + e : first;
    const auto logit = [&](int t) { return logit_of<T>(state, t, token); };
    out[e] = kProduct ? fminf(0, (out[e] - state.max[experts]) - float(state.log_sum[experts]))
                      : log_of(out[e], state, logit);
  }
}

// One warp for every (row, chunk).
template <class T, bool kProduct>
ENSEMW2S_KERNEL(kScanThreads, 6)
write_kernel(const DeviceMixture mixture, const RowState* states, float* log_probs) {
  wait_for_earlier_kernels();
  const int64_t row = block_index();
  const int chunk = block_index_y() * kScanWarps + warp_index();
  const RowState& state = states[row];
  float* out = log_probs + row * mixture.vocabulary;
  for (int i = 0; i < kGroup; i += kVector<T>) {
    const int first = token_of<T>(chunk * kWarp + lane_index(), i);
    if (first >= mixture.vocabulary) return;
    float values[kVector<T>];
    if (!state.valid)
      for (int e = 0; e < kVector<T>; ++e) values[e] = NAN;
    else if (mixture.combine == Combine::kVote)
      for (int e = 0; e < kVector<T>; ++e) values[e] = log_votes(state, first + e);
    else
      log_probs_of_vector<T, kProduct>(mixture, state, row, first, values);
    store_floats(out, first, mixture.vocabulary, kVector<T>, values);
  }
}

template <class T, bool kProduct>
const char* launch_finish(const DeviceMixture& mixture, const ScanResults& results, RowState* states,
                          float* log_probs, Stream stream) {
  const char* error = launch(&finish_kernel<T, kProduct>, {mixture.rows}, kRowThreads, Start::kEarly, stream,
                             mixture, results, states);
  if (error) return error;
  return launch(&write_kernel<T, kProduct>, {mixture.rows, chunk_blocks(mixture)}, kScanThreads,
                Start::kEarly, stream, mixture, states, log_probs);
}

template <class T>
const char* launch_log_probs(const DeviceMixture& mixture, float* log_probs, const Allocate& allocate,
                             Stream stream) {
  const ScanResults results = allocate_scan(mixture, false, allocate);
  RowState* states = static_cast<RowState*>(allocate(mixture.rows * int64_t(sizeof(RowState))));
  const char* error = launch_scan<T>(mixture, SampleSettings{}, results, stream);
  if (error) return error;
  return is_product(mixture) ? launch_finish<T, true>(mixture, results, states, log_probs, stream)
                             : launch_finish<T, false>(mixture, results, states, log_probs, stream);
}

const char* mixture_log_probs(const DeviceMixture& mixture, float* log_probs, const Allocate& allocate,
                              void* stream) {
  if (mixture.rows == 0) return nullptr;
  ENSEMW2S_DISPATCH(mixture.dtype, launch_log_probs, mixture, log_probs, allocate,
                    static_cast<Stream>(stream));
}

}  // namespace ensemw2s::cuda
