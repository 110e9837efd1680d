// The first pass over the logits ("scan") and what one row's block makes of it ("finish").
//
// A chunk is kChunk consecutive tokens, one warp's work; lane `l` of it loads 16 bytes at a time and owns the
// kGroup tokens that it loads, a group. The scan leaves a normaliser for every (row, expert, chunk) and the
// largest logit of every (row, expert, group): bounds that tell which groups can matter later. Chunks do not
// depend on the batch or the chip and are merged in a fixed order, and so a row's numbers depend on nothing
// but the row.
#pragma once

#include <cfloat>
#include <cmath>

#include "device.h"
#include "launch.h"
#include "philox.h"

namespace ensemw2s::cuda {

constexpr int kGroup = 32;
constexpr int kChunk = kWarp * kGroup;
constexpr float kLowest = -FLT_MAX;
constexpr float kInfinity = INFINITY;
constexpr float kLog2e = 1.4426950408889634f;

// Threads of a block. The emulation takes fewer.
#if !defined(ENSEMW2S_SCAN_THREADS)
#  define ENSEMW2S_SCAN_THREADS 128
#endif
#if !defined(ENSEMW2S_ROW_THREADS)
#  define ENSEMW2S_ROW_THREADS 512
#endif
constexpr int kScanThreads = ENSEMW2S_SCAN_THREADS, kScanWarps = kScanThreads / kWarp;
constexpr int kRowThreads = ENSEMW2S_ROW_THREADS, kRowWarps = kRowThreads / kWarp;

// Tokens in 16 bytes.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

// The chunk-wise results, in scratch memory. The product's scores are taken beside the experts' largest
// logits in the chunk.
struct Partial {
  float max, sum;  // log-sum-exp in two numbers
};

struct ScanResults {
  Partial* partials;      // [rows, T + 1, chunks]; the last one is the product of experts
  float* group_max;       // [rows, T, groups]; for the product of experts [rows, 1, groups]
  float* plain_max;       // like group_max, of the tokens that may be drawn as they are; null if all may
  uint32_t* least_words;  // [rows, groups], the least Philox word of each group; null if not needed
};

struct Shape {
  int chunks, groups;
};
ENSEMW2S_HOST_DEVICE inline Shape shape_of(const DeviceMixture& mixture) {
  const int chunks = (mixture.vocabulary + kChunk - 1) / kChunk;
  return {chunks, chunks * kWarp};
}

ENSEMW2S_HOST_DEVICE inline bool is_product(const DeviceMixture& mixture) {
  return mixture.combine == Combine::kLogProb;
}

// How many distributions of a row are scanned each for itself: the experts', or the product's alone.
ENSEMW2S_HOST_DEVICE inline int scored(const DeviceMixture& mixture) {
  return is_product(mixture) ? 1 : mixture.num_experts;
}

template <class T>
ENSEMW2S_DEVICE const T* row_of(const DeviceMixture& mixture, int expert, int64_t row) {
  return static_cast<const T*>(mixture.logits[expert]) + row * mixture.row_stride[expert];
}

// Token number i of a group.
template <class T>
ENSEMW2S_DEVICE int token_of(int group, int i) {
  const int chunk = group / kWarp, lane = group % kWarp;
  return chunk * kChunk + i / kVector<T> * (kWarp * kVector<T>)+lane * kVector<T> + i % kVector<T>;
}

// kVector logits from token `first` on, which is a multiple of kVector; -inf past the end.
template <class T>
ENSEMW2S_DEVICE void load_vector(const T* row, int vocabulary, int first, float* logits) {
  if (uintptr_t(row) % 16 == 0 && first + kVector<T> <= vocabulary) {
    const Words4 words = load_16_bytes(row + first);
    T values[kVector<T>];
    memcpy(values, &words, sizeof words);
    for (int e = 0; e < kVector<T>; ++e) logits[e] = to_float(values[e]);
  } else {
    for (int e = 0; e < kVector<T>; ++e)
      logits[e] = first + e < vocabulary ? to_float(row[first + e]) : -kInfinity;
  }
}

// The lane's tokens of a chunk. Of a whole chunk in an aligned row all loads are under way before the first
// arrives.
template <class T>
ENSEMW2S_DEVICE void load_group(const T* row, int vocabulary, int chunk, float* logits) {
  constexpr int kLoads = kGroup / kVector<T>;
  const int group = chunk * kWarp + lane_index();
  if (uintptr_t(row) % 16 == 0 && (chunk + 1) * kChunk <= vocabulary) {
    Words4 words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) words[i] = load_16_bytes(row + token_of<T>(group, i * kVector<T>));
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      T values[kVector<T>];
      memcpy(values, &words[i], sizeof values);
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) logits[i * kVector<T> + e] = to_float(values[e]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; i += kVector<T>)
      load_vector(row, vocabulary, token_of<T>(group, i), logits + i);
  }
}

// ---- scan ----

// The group's largest value among tokens that may be drawn as they are.
template <class T>
ENSEMW2S_DEVICE float largest_plain(const DeviceMixture& mixture, int64_t row, int group,
                                    const float* values) {
  float top = -kInfinity;
#pragma unroll
  for (int i = 0; i < kGroup; i += kVector<T>) {
    const int first = token_of<T>(group, i);
    if (first >= mixture.vocabulary) continue;
    const uint32_t bits = mixture.offer.plain_word(row, first / 32) >> (first % 32);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e)
      if (bits >> e & 1) top = fmaxf(top, values[i + e]);
  }
  return top;
}

// The group's largest value into *group_max, the warp's normaliser into *partial; returns the warp's largest
// value.
ENSEMW2S_DEVICE float reduce_chunk(const float* values, float* group_max, Partial* partial) {
  float top = values[0];
#pragma unroll
  for (int i = 1; i < kGroup; ++i) top = fmaxf(top, values[i]);
  *group_max = top;
  const float max = fmaxf(reduce_warp(top, [](float a, float b) { return fmaxf(a, b); }), kLowest);
  // The difference first: max * log2(e) alone would be rounded, by as much as max is large.
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sum += fast_exp2((values[i] - max) * kLog2e);
  sum = reduce_warp(sum, [](float a, float b) { return a + b; });
  if (lane_index() == 0) *partial = {max, sum};
  return max;
}

// w (z - top), an expert's part in the product's score of a token, where `top` is at least z. By halves,
// because z - top may be more than a float holds.
ENSEMW2S_DEVICE float product_term(float weight, float logit, float top) {
  return 2 * weight * (0.5f * logit - 0.5f * top);
}

// A row's weights. An expert of weight 0 is not read.
ENSEMW2S_DEVICE const float* weights_of(const DeviceMixture& mixture, int64_t row) {
  return mixture.weights + row * mixture.weight_stride;
}

// Sum of the weights in a fixed order; NaN if one of them cannot be a weight.
ENSEMW2S_DEVICE double total_weight(const DeviceMixture& mixture, int64_t row) {
  const float* weights = weights_of(mixture, row);
  double total = 0;
  for (int t = 0; t < mixture.num_experts; ++t) total += weights[t] >= 0 ? double(weights[t]) : NAN;
  return total;
}

template <class T>
ENSEMW2S_DEVICE void scan_expert(const DeviceMixture& mixture, const ScanResults& results, int64_t row,
                                 int expert, int chunk) {
  if (weights_of(mixture, row)[expert] == 0) return;
  const Shape shape = shape_of(mixture);
  const int group = chunk * kWarp + lane_index();
  float logits[kGroup];
  load_group(row_of<T>(mixture, expert, row), mixture.vocabulary, chunk, logits);
  const int64_t place = (row * mixture.num_experts + expert) * shape.groups + group;
  if (results.plain_max) results.plain_max[place] = largest_plain<T>(mixture, row, group, logits);
  reduce_chunk(logits, &results.group_max[place],
               &results.partials[(row * (mixture.num_experts + 1) + expert) * shape.chunks + chunk]);
}

// All experts in turn, and the sum of their weighted logits.
template <class T>
ENSEMW2S_DEVICE void scan_product(const DeviceMixture& mixture, const ScanResults& results, int64_t row,
                                  int chunk) {
  const Shape shape = shape_of(mixture);
  const int group = chunk * kWarp + lane_index();
  Partial* partials = &results.partials[row * (mixture.num_experts + 1) * shape.chunks + chunk];
  float* group_max = &results.group_max[row * shape.groups + group];
  const float* weights = weights_of(mixture, row);
  const double total = total_weight(mixture, row);
  float logits[kGroup], scores[kGroup] = {};
  for (int t = 0; t < mixture.num_experts; ++t) {
    if (weights[t] == 0) continue;
    load_group(row_of<T>(mixture, t, row), mixture.vocabulary, chunk, logits);
    const float top = reduce_chunk(logits, group_max, partials + int64_t(t) * shape.chunks);
    const float weight = float(weights[t] / total);
    if (weight != 0) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) scores[i] += product_term(weight, logits[i], top);
    }
  }
  if (results.plain_max)
    results.plain_max[row * shape.groups + group] = largest_plain<T>(mixture, row, group, scores);
  reduce_chunk(scores, group_max, partials + int64_t(mixture.num_experts) * shape.chunks);
}

// Whether a row's race is among all tokens, which is what the least words are for.
ENSEMW2S_HOST_DEVICE inline bool races_all(const RowSettings& asked) {
  return !asked.is_greedy() && asked.top_k == 0;
}

template <class T>
ENSEMW2S_DEVICE void scan_noise(const DeviceMixture& mixture, const SampleSettings& settings,
                                const ScanResults& results, int64_t row, int chunk) {
  const int group = chunk * kWarp + lane_index();
  const RowSettings asked = settings.of(row, mixture.vocabulary);
  if (!races_all(asked)) return;
  uint32_t least = ~0u;
  for (int i = 0; i < kGroup; i += 4) {  // kVector neighbours are a multiple of four
    const PhiloxWords block = philox_words(asked.seed, asked.position, uint32_t(token_of<T>(group, i)) / 4);
    for (const uint32_t word : block.word) least = word < least ? word : least;
  }
  results.least_words[row * shape_of(mixture).groups + group] = least;
}

// The warps of a block take chunks that follow one another.
inline int chunk_blocks(const DeviceMixture& mixture) {
  return (shape_of(mixture).chunks + kScanWarps - 1) / kScanWarps;
}

// The noise is a slice of its own: its arithmetic fills the time in which the other blocks wait for memory.
inline Grid scan_grid(const DeviceMixture& mixture, bool with_noise) {
  return {mixture.rows, chunk_blocks(mixture), scored(mixture) + with_noise};
}

template <class T, bool kProduct>
ENSEMW2S_KERNEL(kScanThreads, kProduct ? 3 : 8)
scan_kernel(const DeviceMixture mixture, const SampleSettings settings, const ScanResults results) {
  allow_early_kernels();
  const int64_t row = block_index();
  const int chunk = block_index_y() * kScanWarps + warp_index(), slice = block_index_z();
  if (chunk >= shape_of(mixture).chunks) return;
  if (slice == (kProduct ? 1 : mixture.num_experts))
    scan_noise<T>(mixture, settings, results, row, chunk);
  else if constexpr (kProduct)
    scan_product<T>(mixture, results, row, chunk);
  else
    scan_expert<T>(mixture, results, row, slice, chunk);
}

// ---- finish ----

// What is known of a row after its scan. Index T is the product of experts.
struct RowState {
  int num_experts, num_active;
  int active[kMaxExperts];          // the experts of a weight above 0, ascending
  const void* logits[kMaxExperts];  // the row's
  double weight[kMaxExperts];       // normalised
  double log_sum[kMaxExperts + 1];
  double total_weight;         // as the user gave them
  double product_max;          // the likeliest token's score
  float max[kMaxExperts + 1];  // of the product: product_max as a float
  float scale[kMaxExperts];    // scale * exp(z - max) = weight * probability
  float shift[kMaxExperts];    // its logarithm
  bool usable[kMaxExperts + 1];
  int winner[kMaxExperts];  // vote: the expert's first argmax, -1 for weight 0
  bool is_vote, valid;
};

template <class T>
ENSEMW2S_DEVICE float logit_of(const RowState& state, int t, int token) {
  return to_float(static_cast<const T*>(state.logits[t])[token]);
}

// The row's weights and its active experts, by one warp.
template <class T>
ENSEMW2S_DEVICE void normalise_weights(const DeviceMixture& mixture, int64_t row, RowState& state) {
  const float* weights = weights_of(mixture, row);
  const double total = total_weight(mixture, row);
  int count = 0;
  for (int first = 0; first < mixture.num_experts; first += kWarp) {
    const int t = first + lane_index();
    const bool is_expert = t < mixture.num_experts;
    const double weight = is_expert ? weights[t] / total : 0;
    const bool is_active = float(weight) > 0;  // as the scan sees it
    const uint32_t others = ballot(is_active);
    if (is_active) state.active[count + count_bits(others & ((1u << lane_index()) - 1))] = t;
    count += count_bits(others);
    if (!is_expert) continue;
    state.logits[t] = row_of<T>(mixture, t, row);
    state.weight[t] = is_active ? weight : 0;
    state.winner[t] = -1;
  }
  if (lane_index() != 0) return;
  state.num_experts = mixture.num_experts;
  state.is_vote = mixture.combine == Combine::kVote;
  state.num_active = count;
  state.total_weight = total;
}

// Keeps an expert's or the product's normaliser. By a single thread.
ENSEMW2S_DEVICE void keep_normaliser(RowState& state, int t, float max, float sum) {
  state.max[t] = max;
  state.log_sum[t] = log(double(sum));
  state.usable[t] = sum > 0 && max <= FLT_MAX && sum <= FLT_MAX;
}

// What leads from the product's scores in a chunk to those beside the experts' largest logits in the row.
ENSEMW2S_DEVICE double descent(const DeviceMixture& mixture, const RowState& state, const Partial* partials,
                               int chunk) {
  double sum = 0;
  for (int a = 0; a < state.num_active; ++a) {
    const int t = state.active[a];
    const float top = partials[int64_t(t) * shape_of(mixture).chunks + chunk].max;
    sum += state.weight[t] * (double(top) - state.max[t]);
  }
  return sum;
}

// The product's score of a token beside the experts' largest logits, where logit(t) is expert t's logit of
// it.
template <class Logit>
ENSEMW2S_DEVICE float product_score(const RowState& state, const Logit& logit) {
  float score = 0;
#pragma unroll 4
  for (int a = 0; a < state.num_active; ++a) {
    const int t = state.active[a];
    score += product_term(float(state.weight[t]), logit(t), state.max[t]);
  }
  return score;
}

template <class Logit>
ENSEMW2S_DEVICE double exact_product_score(const RowState& state, const Logit& logit) {
  double score = 0;
#pragma unroll 4
  for (int a = 0; a < state.num_active; ++a) {
    const int t = state.active[a];
    score += state.weight[t] * (double(logit(t)) - state.max[t]);
  }
  return score;
}

// Of the chunks of one row, the largest score and its chunk.
struct BestChunk {
  double max;
  int chunk;
  int unused;  // whole words: shuffles carry no padding
};

// The product's normaliser, by one warp. Where the experts disagree by far the scores are large numbers, and
// roundings of them too. So that the likeliest token is likely in the arithmetic of everything that follows,
// its score there is what the others are compared with.
template <class T>
ENSEMW2S_DEVICE void merge_product(const DeviceMixture& mixture, const ScanResults& results, int64_t row,
                                   RowState& state) {
  const int chunks = shape_of(mixture).chunks, experts = mixture.num_experts;
  const Partial* partials = results.partials + row * (experts + 1) * chunks;
  const auto max_of = [&](int chunk) {
    return partials[int64_t(experts) * chunks + chunk].max + descent(mixture, state, partials, chunk);
  };
  const auto sum_of = [&](int chunk) { return partials[int64_t(experts) * chunks + chunk].sum; };
  BestChunk best{-DBL_MAX, 0, 0};
  for (int chunk = lane_index(); chunk < chunks; chunk += kWarp) {
    const double max = max_of(chunk);
    if (sum_of(chunk) > 0 && max > best.max) best = {max, chunk, 0};
  }
  best = reduce_warp(best, [](const BestChunk& a, const BestChunk& b) {
    return a.max > b.max || (a.max == b.max && a.chunk < b.chunk) ? a : b;
  });
  float sum = 0;
  for (int chunk = lane_index(); chunk < chunks; chunk += kWarp)
    sum += sum_of(chunk) * fast_exp2(float(max_of(chunk) - best.max) * kLog2e);
  sum = reduce_warp(sum, [](float a, float b) { return a + b; });
  const float* group_max = results.group_max + row * shape_of(mixture).groups + best.chunk * kWarp;
  const float top = partials[int64_t(experts) * chunks + best.chunk].max;
  const uint32_t holders = ballot(group_max[lane_index()] == top);
  const int group = best.chunk * kWarp + (holders ? lowest_bit(holders) : 0);
  const int token = token_of<T>(group, lane_index());
  const auto logit = [&](int t) {
    return token < mixture.vocabulary ? logit_of<T>(state, t, token) : -kInfinity;
  };
  const auto larger = [](double a, double b) { return fmax(a, b); };
  const double exact = reduce_warp(exact_product_score(state, logit), larger);
  const double rounded = reduce_warp(double(product_score(state, logit)), larger);
  if (lane_index() != 0) return;
  keep_normaliser(state, experts, float(best.max), sum);
  state.product_max = exact;
  state.max[experts] = float(rounded);
}

// Merges the chunks' normalisers of one expert, by a warp.
ENSEMW2S_DEVICE void merge_expert(const Partial* partials, int chunks, RowState& state, int t) {
  float max = kLowest, sum = 0;
#pragma unroll 4
  for (int chunk = lane_index(); chunk < chunks; chunk += kWarp) max = fmaxf(max, partials[chunk].max);
  max = reduce_warp(max, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll 4
  for (int chunk = lane_index(); chunk < chunks; chunk += kWarp)
    sum += partials[chunk].sum * fast_exp2((partials[chunk].max - max) * kLog2e);
  sum = reduce_warp(sum, [](float a, float b) { return a + b; });
  if (lane_index() != 0) return;
  keep_normaliser(state, t, max, sum);
  state.scale[t] = float(state.weight[t] / sum);
  state.shift[t] = float(log(state.weight[t]) - state.log_sum[t]);
}

// What the scan found, a warp for each expert. Waits for the scan. Between this call and the use of `state` a
// barrier is needed.
template <class T, bool kProduct>
ENSEMW2S_DEVICE void merge_partials(const DeviceMixture& mixture, const ScanResults& results, int64_t row,
                                    RowState& state) {
  if (warp_index() == 0) normalise_weights<T>(mixture, row, state);
  wait_for_earlier_kernels();
  barrier();
  const int chunks = shape_of(mixture).chunks, experts = mixture.num_experts;
  const float* weights = weights_of(mixture, row);
  const Partial* partials = results.partials + row * (experts + 1) * chunks;
  for (int t = warp_index(); t < experts; t += kRowWarps) {
    if (weights[t] != 0)
      merge_expert(partials + int64_t(t) * chunks, chunks, state, t);
    else if (lane_index() == 0)
      state.usable[t] = false;
  }
  if constexpr (kProduct) {
    barrier();
    if (warp_index() == 0) merge_product<T>(mixture, results, row, state);
  }
}

// Whether the row can be used; every thread finds the same.
template <bool kProduct>
ENSEMW2S_DEVICE bool is_valid(const RowState& state) {
  bool valid = state.total_weight > 0 && state.total_weight <= DBL_MAX;
  for (int a = 0; a < state.num_active; ++a) valid = valid && state.usable[state.active[a]];
  return valid && (!kProduct || state.usable[state.num_experts]);
}

// Vote: every active expert's first argmax, a warp for each expert. A barrier is needed before and after.
template <class T>
ENSEMW2S_DEVICE void find_winners(const DeviceMixture& mixture, const ScanResults& results, int64_t row,
                                  RowState& state) {
  const int groups = shape_of(mixture).groups;
  for (int a = warp_index(); a < state.num_active; a += kRowWarps) {
    const int t = state.active[a];
    const float* group_max = results.group_max + (row * mixture.num_experts + t) * groups;
    const float max = state.max[t];
    int first = mixture.vocabulary;
    for (int group = lane_index(); group < groups; group += kWarp) {
      if (group_max[group] != max) continue;
      for (int i = 0; i < kGroup; ++i) {
        const int token = token_of<T>(group, i);
        if (token < first && logit_of<T>(state, t, token) == max) first = token;
      }
    }
    first = reduce_warp(first, [](int a, int b) { return a < b ? a : b; });
    if (lane_index() == 0) state.winner[t] = first;
  }
}

// log(sum(exp(x))) of terms that come one by one, with one power for each.
struct LogSum {
  float max = -kInfinity, sum = 0;

  ENSEMW2S_DEVICE void add(float x) {
    if (!(x > -kInfinity)) return;
    const float scaled = fast_exp2(-fabsf(x - max) * kLog2e);
    sum = x > max ? sum * scaled + 1 : sum + scaled;
    max = fmaxf(x, max);
  }
  ENSEMW2S_DEVICE float value() const { return max > -kInfinity ? max + logf(sum) : max; }
};

// Votes for a token, as a log-probability.
ENSEMW2S_DEVICE float log_votes(const RowState& state, int token) {
  float votes = 0;
#pragma unroll 1
  for (int a = 0; a < state.num_active; ++a) {
    const int t = state.active[a];
    votes += state.winner[t] == token ? float(state.weight[t]) : 0.0f;
  }
  return votes > 0 ? fminf(0, logf(votes)) : -kInfinity;
}

// An expert's part in the probability of a token.
ENSEMW2S_DEVICE float weighted_probability(const RowState& state, int t, float logit) {
  return state.scale[t] * fast_exp2((logit - state.max[t]) * kLog2e);
}

// From here on a sum of weighted probabilities has not lost parts of it to underflow.
constexpr float kSafeProbability = 0x1p-80f;

// The mixture's log-probability where logit(t) is expert t's logit of the token and `probability` the sum of
// the weighted probabilities.
template <class Logit>
ENSEMW2S_DEVICE float log_of(float probability, const RowState& state, const Logit& logit) {
  if (probability >= kSafeProbability) return logf(probability);
  LogSum total;
#pragma unroll 1
  for (int a = 0; a < state.num_active; ++a) {
    const int t = state.active[a];
    total.add((logit(t) - state.max[t]) + state.shift[t]);
  }
  return total.value();
}

// The mixture's log-probability where logit(t) is expert t's logit of the token.
template <bool kProduct, class Logit>
ENSEMW2S_DEVICE float float_log_prob(const RowState& state, const Logit& logit) {
  if constexpr (kProduct) {
    const int product = state.num_experts;
    return fminf(0, (product_score(state, logit) - state.max[product]) - float(state.log_sum[product]));
  } else {
    float probability = 0;
#pragma unroll 4
    for (int a = 0; a < state.num_active; ++a)
      probability += weighted_probability(state, state.active[a], logit(state.active[a]));
    return log_of(probability, state, logit);
  }
}

template <class T>
ENSEMW2S_DEVICE double expert_log_prob(const RowState& state, int t, int token) {
  return double(logit_of<T>(state, t, token)) - state.max[t] - state.log_sum[t];
}

// In double, since the likeliest of some tokens shall be the one that it is in exact arithmetic: only tokens
// that can still win are looked at like this.
template <class T, bool kProduct>
ENSEMW2S_DEVICE_CALL double exact_log_prob(const RowState& state, int token) {
  if (state.is_vote) return log_votes(state, token);
  if constexpr (kProduct) {
    const double score = exact_product_score(state, [&](int t) { return logit_of<T>(state, t, token); });
    return fmin(0.0, score - state.product_max - state.log_sum[state.num_experts]);
  }
  double sum = 0, largest = -kInfinity;
#pragma unroll 1
  for (int a = 0; a < state.num_active; ++a)
    largest = fmax(largest, expert_log_prob<T>(state, state.active[a], token));
  if (!(largest > -kInfinity)) return largest;
#pragma unroll 2
  for (int a = 0; a < state.num_active; ++a) {
    const int t = state.active[a];
    sum += state.weight[t] * exp(expert_log_prob<T>(state, t, token) - largest);
  }
  return largest + log(sum);
}

template <class T>
const char* launch_scan(const DeviceMixture& mixture, const SampleSettings& settings,
                        const ScanResults& results, Stream stream) {
  const auto kernel = is_product(mixture) ? &scan_kernel<T, true> : &scan_kernel<T, false>;
  return launch(kernel, scan_grid(mixture, results.least_words != nullptr), kScanThreads, Start::kInOrder,
                stream, mixture, settings, results);
}

inline ScanResults allocate_scan(const DeviceMixture& mixture, bool with_noise, const Allocate& allocate) {
  const int64_t rows = mixture.rows, experts = mixture.num_experts;
  const Shape shape = shape_of(mixture);
  const auto memory = [&](int64_t count, int64_t size) { return allocate(count * size); };
  ScanResults results{};
  results.partials = static_cast<Partial*>(memory(rows * (experts + 1) * shape.chunks, sizeof(Partial)));
  results.group_max = static_cast<float*>(memory(rows * scored(mixture) * shape.groups, sizeof(float)));
  if (!mixture.offer.is_everything() && mixture.combine != Combine::kVote)
    results.plain_max = static_cast<float*>(memory(rows * scored(mixture) * shape.groups, sizeof(float)));
  if (with_noise) results.least_words = static_cast<uint32_t*>(memory(rows * shape.groups, sizeof(uint32_t)));
  return results;
}

}  // namespace ensemw2s::cuda

// Calls f<T>(...) for the element type that a Dtype names.
#define ENSEMW2S_DISPATCH(dtype, function, ...) \
  switch (dtype) {                              \
    case Dtype::kFloat:                         \
      return function<float>(__VA_ARGS__);      \
    case Dtype::kBFloat16:                      \
      return function<BFloat16>(__VA_ARGS__);   \
    case Dtype::kHalf:                          \
      return function<Half>(__VA_ARGS__);       \
  }                                             \
  return "unknown dtype"
