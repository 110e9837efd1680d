// mixture_sample: scan, then a block per row that draws (the semantics are in
// ensemw2s/ops/mixture_sample.py).

#include "mixture.cuh"

namespace ensemw2s::cuda {

// Candidates that fit into shared memory; more of them spill to scratch memory.
#if !defined(ENSEMW2S_SHARED_CANDIDATES)
#  define ENSEMW2S_SHARED_CANDIDATES 2048
#endif
constexpr int kSharedCandidates = ENSEMW2S_SHARED_CANDIDATES;

struct SampleScratch {
  float *upper, *lower;  // [rows, groups]: bounds on the largest log-probability of each group
  int32_t* ids;          // [rows, vocabulary], null if no filter needs candidates
  float* log_probs;      // [rows, vocabulary]
};

struct RowShared {
  RowState state;
  int count;
  int32_t ids[kSharedCandidates];
  float log_probs[kSharedCandidates];
};

// A token and its log-probability.
struct Likely {
  float log_prob;
  int token;  // -1: none
};

ENSEMW2S_DEVICE Likely likelier(const Likely& a, const Likely& b) {
  if (a.token < 0 || b.token < 0) return a.token < 0 ? b : a;
  return is_likelier(a.log_prob, a.token, b.log_prob, b.token) ? a : b;
}

struct Best {
  double score;
  int token;   // -1: none yet
  int unused;  // whole words
};

ENSEMW2S_DEVICE Best better(const Best& a, const Best& b) {
  if (a.token < 0 || b.token < 0) return a.token < 0 ? b : a;
  if (a.score != b.score) return a.score > b.score ? a : b;
  return a.token < b.token ? a : b;
}

// An integer image of a float that keeps the order.
ENSEMW2S_DEVICE uint32_t ascending_bits(float value) {
  const uint32_t bits = bits_from_float(value == 0 ? 0.0f : value);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

ENSEMW2S_DEVICE float from_ascending_bits(uint32_t bits) {
  return float_from_bits(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

struct Sums {
  uint64_t of[3];
};

ENSEMW2S_DEVICE Sums added(const Sums& a, const Sums& b) {
  return {{a.of[0] + b.of[0], a.of[1] + b.of[1], a.of[2] + b.of[2]}};
}

// The largest key such that the items from it upwards weigh at least `target`, found two bits at a time; 0 if
// all items together weigh less. Weights are integers: their sums do not depend on the order of the items.
template <class Key, class Weight>
ENSEMW2S_DEVICE uint32_t select_key(int count, uint64_t target, const Key& key, const Weight& weight) {
  uint32_t found = 0;
  for (int shift = 30; shift >= 0; shift -= 2) {
    const uint32_t step = 1u << shift;
    Sums sums{};
    for (int i = thread_index(); i < count; i += kRowThreads) {
      const uint32_t k = key(i);
      if (k < found + step) continue;
      const uint64_t w = weight(i);
      sums.of[0] += w;
      sums.of[1] += k >= found + 2 * step ? w : 0;
      sums.of[2] += k >= found + 3 * step ? w : 0;
    }
    sums = reduce_block<kRowThreads>(sums, added);
    found += step * uint32_t((sums.of[0] >= target) + (sums.of[1] >= target) + (sums.of[2] >= target));
  }
  return found;
}

template <class Weight>
ENSEMW2S_DEVICE uint64_t total_over(int count, const Weight& weight) {
  uint64_t sum = 0;
  for (int i = thread_index(); i < count; i += kRowThreads) sum += weight(i);
  return reduce_block<kRowThreads>(sum, [](uint64_t a, uint64_t b) { return a + b; });
}

// One row's block. Every member function is called by all threads together unless it says otherwise.
template <class T>
struct RowSampler {
  const DeviceMixture& mixture;
  const RowSettings settings;
  RowShared& shared;
  const RowState& state;
  int64_t row;
  int groups;
  const Partial* partials;
  const float* all_max;  // the groups' largest logits
  const float* maxima;   // those of the tokens that count
  bool is_restricted;    // whether some tokens may not be drawn, or not as they are
  const uint32_t* least_words;
  float *upper, *lower;
  int32_t* spilled_ids;
  float* spilled_log_probs;
  float largest_lower;
  double anchor = 0;  // of the race: near the likeliest token's log-probability

  ENSEMW2S_DEVICE RowSampler(const DeviceMixture& a_mixture, const RowSettings& asked,
                             const ScanResults& results, const SampleScratch& scratch, RowShared& a_shared,
                             int64_t a_row)
      : mixture(a_mixture),
        settings(asked),
        shared(a_shared),
        state(a_shared.state),
        row(a_row),
        groups(shape_of(a_mixture).groups),
        partials(results.partials + row * (mixture.num_experts + 1) * shape_of(a_mixture).chunks),
        all_max(maxima_of(results.group_max)),
        maxima(results.plain_max ? maxima_of(results.plain_max) : all_max),
        is_restricted(!mixture.offer.is_everything()),
        least_words(results.least_words + row * groups),
        upper(scratch.upper + row * groups),
        lower(scratch.lower + row * groups),
        spilled_ids(scratch.ids + row * mixture.vocabulary),
        spilled_log_probs(scratch.log_probs + row * mixture.vocabulary) {}

  ENSEMW2S_DEVICE const float* maxima_of(const float* of_rows) const {
    return of_rows + row * groups * (is_product(mixture) ? 1 : mixture.num_experts);
  }

  ENSEMW2S_DEVICE bool is_vote() const { return mixture.combine == Combine::kVote; }

  // The scan found the row valid. The token, which is the likeliest where the race has no winner, or -1 if no
  // token that may be drawn is possible.
  ENSEMW2S_DEVICE int draw() {
    if (is_vote())
      collect_votes();
    else
      bound_groups();
    if (is_restricted && !offers_something()) return -1;
    const int winner = settings.is_greedy() ? -1 : race();
    if (winner >= 0) return winner;
    return is_vote() ? most_voted() : most_probable();
  }

  ENSEMW2S_DEVICE int race() {
    if (is_vote()) return filter_and_race(false);
    if (!settings.is_filtered()) return race_all();
    return filter_and_race(collect_for_filters());
  }

  // ---- log-probabilities (by single threads) ----

  ENSEMW2S_DEVICE float logit(int t, int token) const { return to_float(row_of<T>(mixture, t, row)[token]); }

  ENSEMW2S_DEVICE float quick_log_prob(int token) const {
    return float_log_prob(mixture, state, [&](int t) { return logit(t, token); });
  }

  ENSEMW2S_DEVICE double expert_log_prob(int t, int token) const {
    return double(logit(t, token)) - state.max[t] - state.log_sum[t];
  }

  ENSEMW2S_DEVICE double log_prob(int token) const {
    const int experts = mixture.num_experts;
    if (is_vote()) return log_votes(mixture, state, token);
    if (is_product(mixture)) {
      const double score = exact_product_score(mixture, state, [&](int t) { return logit(t, token); });
      return fmin(0.0, score - state.product_max - state.log_sum[experts]);
    }
    double sum = 0, largest = -kInfinity;
    for (int t = 0; t < experts; ++t)
      if (state.weight[t] > 0) largest = fmax(largest, expert_log_prob(t, token));
    if (!(largest > -kInfinity)) return largest;
    for (int t = 0; t < experts; ++t)
      if (state.weight[t] > 0) sum += state.weight[t] * exp(expert_log_prob(t, token) - largest);
    return largest + log(sum);
  }

  // ---- what is offered (by single threads) ----

  ENSEMW2S_DEVICE bool is_plain(int token) const {
    return !is_restricted || (mixture.offer.plain_word(row, token / 32) >> (token % 32) & 1);
  }

  // The place of an adjusted token in the row's list; -1 if it has none there.
  ENSEMW2S_DEVICE int64_t place_of(int token) const {
    int64_t low = 0, high = mixture.offer.count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const int32_t other = mixture.offer.token(row, middle);
      if (other >= 0 && other < token)
        low = middle + 1;
      else
        high = middle;
    }
    return low < mixture.offer.count && mixture.offer.token(row, low) == token ? low : -1;
  }

  // The log-probability at which a token is offered; -inf if it may not be drawn.
  ENSEMW2S_DEVICE double offered(int token) const {
    if (is_plain(token)) return log_prob(token);
    const int64_t place = place_of(token);
    if (place < 0 || !mixture.offer.is_allowed(row, token)) return -kInfinity;
    return mixture.offer.adjustment(mixture.rows, row, place).of(log_prob(token));
  }

  // visit(token, upper bound on the log-probability at which it is offered) for the adjusted tokens that may
  // be drawn.
  template <class Visit>
  ENSEMW2S_DEVICE void visit_adjusted(const Visit& visit) const {
    if (!is_restricted) return;
    for (int64_t i = thread_index(); i < mixture.offer.count; i += kRowThreads) {
      const int token = mixture.offer.token(row, i);
      if (token < 0 || !mixture.offer.is_allowed(row, token)) continue;
      const float value = quick_log_prob(token);
      const float bound = mixture.offer.adjustment(mixture.rows, row, i).of(value + slack(value));
      visit(token, bound + 1e-6f * fabsf(bound));
    }
  }

  ENSEMW2S_DEVICE bool offers_something() const {
    if (is_vote()) return shared.count > 0;
    bool found = largest_lower > -kInfinity;
    visit_adjusted([&](int token, float bound) {
      found = found || (bound > -kInfinity && float(offered(token)) > -kInfinity);
    });
    return reduce_block<kRowThreads>(int(found), [](int a, int b) { return a | b; }) != 0;
  }

  // Rounding that a bound or a float32 log-probability of this size may have.
  ENSEMW2S_DEVICE float slack(float log_prob) const {
    const float of_product =
        is_product(mixture) ? 1e-7f * (8 + mixture.num_experts) * fabsf(state.max[mixture.num_experts]) : 0;
    return 2e-5f + of_product + 1e-6f * fabsf(log_prob);
  }

  // ---- groups ----

  ENSEMW2S_DEVICE void bound_groups() {
    float largest = -kInfinity;
    for (int g = thread_index(); g < groups; g += kRowThreads) {
      if (is_product(mixture)) {
        const double fall = descent(mixture, state, partials, g / kWarp) - state.product_max;
        upper[g] = lower[g] = maxima[g] + float(fall - state.log_sum[mixture.num_experts]);
      } else {
        float term = -kInfinity;
        for (int t = 0; t < mixture.num_experts; ++t)
          if (state.weight[t] > 0)
            term = fmaxf(term, (maxima[int64_t(t) * groups + g] - state.max[t]) + state.shift[t]);
        lower[g] = term;  // one token of the group has this term
        upper[g] = float_log_prob(mixture, state, [&](int t) { return maxima[int64_t(t) * groups + g]; });
      }
      largest = fmaxf(largest, lower[g]);
    }
    // Its barriers also make the bounds known to all threads.
    largest_lower = reduce_block<kRowThreads>(largest, [](float a, float b) { return fmaxf(a, b); });
  }

  // visit(token, group) for every token that may be drawn as it is, of the groups with is_near(group): a warp
  // looks at a group together.
  template <class Near, class Visit>
  ENSEMW2S_DEVICE void visit_groups(const Near& is_near, const Visit& visit) const {
    for (int start = warp_index() * kWarp; start < groups; start += kRowThreads) {
      uint32_t near = ballot(is_near(start + lane_index()));
      for (; near != 0; near &= near - 1) {
        const int group = start + lowest_bit(near), token = token_of<T>(group, lane_index());
        if (token < mixture.vocabulary && is_plain(token)) visit(token, group);
      }
    }
  }

  // ---- greedy ----

  ENSEMW2S_DEVICE int most_probable() {
    const float limit = largest_lower - slack(largest_lower);
    Best best{0, -1, 0};
    visit_groups([&](int g) { return upper[g] >= limit; },
                 [&](int token, int) {
                   if (quick_log_prob(token) >= limit) best = better(best, {log_prob(token), token, 0});
                 });
    visit_adjusted([&](int token, float bound) {
      if (bound >= limit) best = better(best, {offered(token), token, 0});
    });
    best = reduce_block<kRowThreads>(best, better);
    return best.token >= 0 ? best.token : most_probable_of_best_group();
  }

  // What the bounds rule out by rounding alone: logits that are as large as floats get.
  ENSEMW2S_DEVICE int most_probable_of_best_group() {
    Best best{0, -1, 0};
    visit_groups([&](int g) { return lower[g] == largest_lower; },
                 [&](int token, int) { best = better(best, {log_prob(token), token, 0}); });
    return reduce_block<kRowThreads>(best, better).token;
  }

  ENSEMW2S_DEVICE int most_voted() {
    Best best{0, -1, 0};
    for (int i = thread_index(); i < shared.count; i += kRowThreads)
      best = better(best, {offered(shared.ids[i]), shared.ids[i], 0});
    return reduce_block<kRowThreads>(best, better).token;
  }

  // ---- candidates ----

  ENSEMW2S_DEVICE int candidate(int i) const {
    return i < kSharedCandidates ? shared.ids[i] : spilled_ids[i - kSharedCandidates];
  }
  ENSEMW2S_DEVICE float candidate_log_prob(int i) const {
    return i < kSharedCandidates ? shared.log_probs[i] : spilled_log_probs[i - kSharedCandidates];
  }

  // By a single thread. The order of the candidates is left to chance: nothing may depend on it.
  ENSEMW2S_DEVICE void add_candidate(int token, float value) {
    const int i = atomic_add(&shared.count, 1);
    (i < kSharedCandidates ? shared.ids[i] : spilled_ids[i - kSharedCandidates]) = token;
    (i < kSharedCandidates ? shared.log_probs[i] : spilled_log_probs[i - kSharedCandidates]) = value;
  }

  ENSEMW2S_DEVICE void clear_candidates() {
    if (thread_index() == 0) shared.count = 0;
    barrier();
  }

  ENSEMW2S_DEVICE void collect_votes() {
    clear_candidates();
    for (int t = thread_index(); t < mixture.num_experts; t += kRowThreads) {
      bool is_first = state.winner[t] >= 0;
      for (int earlier = 0; earlier < t; ++earlier)
        is_first = is_first && state.winner[earlier] != state.winner[t];
      const float value = is_first ? float(offered(state.winner[t])) : -kInfinity;
      if (value > -kInfinity) add_candidate(state.winner[t], value);
    }
    barrier();
  }

  // Keeps all possible tokens whose log-probability is at least `floor` (and some that are less than slack()
  // below).
  ENSEMW2S_DEVICE void collect(float floor) {
    clear_candidates();
    const float limit = fmaxf(floor - slack(floor), kLowest);
    visit_groups([&](int g) { return upper[g] >= limit - slack(limit); },
                 [&](int token, int) {
                   const float value = quick_log_prob(token);
                   if (value >= limit) add_candidate(token, value);
                 });
    visit_adjusted([&](int token, float bound) {
      const float value = bound >= limit ? float(offered(token)) : -kInfinity;
      if (value >= limit) add_candidate(token, value);
    });
    barrier();
  }

  // Most nuclei hold no token that is exp(9) times less likely than the first.
  static constexpr float kNucleusDepth = 9.0f;

  // Whether all tokens together weigh 1, which is then known without a look at them.
  ENSEMW2S_DEVICE bool weighs_one() const { return settings.temperature == 1 && !is_restricted; }

  // Keeps what top-k and top-p may let through; true if the mass of what was left out is known: all tokens
  // together then weigh 1.
  ENSEMW2S_DEVICE bool collect_for_filters() {
    if (settings.top_k > 0) {
      collect(floor_of(settings.top_k));
      return false;
    }
    if (weighs_one()) {
      collect(largest_lower - kNucleusDepth);
      const float top = largest_candidate();
      const double kept =
          double(total_over(shared.count, [&](int i) { return mass(candidate_log_prob(i), top); }));
      if (kept * exp(double(top)) >= (settings.top_p + 1e-4) * kMassUnit) return true;
    }
    collect(-kInfinity);
    return weighs_one();
  }

  // At least `count` tokens reach this: each group holds one that reaches its lower bound.
  ENSEMW2S_DEVICE float floor_of(int64_t count) const {
    if (count > groups) return -kInfinity;
    return from_ascending_bits(select_key(
        groups, uint64_t(count), [&](int g) { return ascending_bits(lower[g]); }, [](int) { return 1; }));
  }

  ENSEMW2S_DEVICE float largest_candidate() const {
    float largest = -kInfinity;
    for (int i = thread_index(); i < shared.count; i += kRowThreads)
      largest = fmaxf(largest, candidate_log_prob(i));
    return reduce_block<kRowThreads>(largest, [](float a, float b) { return fmaxf(a, b); });
  }

  ENSEMW2S_DEVICE int likeliest_candidate() const {
    Best best{0, -1, 0};
    for (int i = thread_index(); i < shared.count; i += kRowThreads)
      best = better(best, {candidate_log_prob(i), candidate(i), 0});
    return reduce_block<kRowThreads>(best, better).token;
  }

  // ---- the likeliest tokens ----

  // After draw(), whose bounds it uses where they are those of all tokens: those likelier than all others,
  // the likeliest first.
  ENSEMW2S_DEVICE void write_likeliest(const SampleOutputs& outputs) {
    const int count = int(outputs.top_count);
    if (is_restricted) {
      barrier();
      maxima = all_max;
      is_restricted = false;
      if (!is_vote()) bound_groups();
    }
    if (is_vote())
      collect_votes();
    else
      collect(floor_of(count));
    Likely last{kInfinity, 0};
    for (int n = 0; n < count; ++n) {
      if (last.token >= 0) last = next_likeliest(last);
      if (thread_index() != 0) continue;
      outputs.top_tokens[row * count + n] = last.token;
      outputs.top_log_probs[row * count + n] = last.token < 0 ? -kInfinity : last.log_prob;
    }
  }

  ENSEMW2S_DEVICE Likely next_likeliest(const Likely& last) const {
    Likely next{0, -1};
    for (int i = thread_index(); i < shared.count; i += kRowThreads) {
      const Likely other{candidate_log_prob(i), candidate(i)};
      if (other.log_prob > -kInfinity && is_likelier(last.log_prob, last.token, other.log_prob, other.token))
        next = likelier(next, other);
    }
    return reduce_block<kRowThreads>(next, likelier);
  }

  // ---- filters ----

  // exp((log_prob - top) / temperature) as a whole number of units: sums of 2^21 of them fit, in any order.
  static constexpr double kMassUnit = 0x1p42;
  ENSEMW2S_DEVICE uint64_t mass(float value, float top) const {
    const float inverse = fminf(float(1 / settings.temperature), FLT_MAX);  // 0 * inf would be NaN
    return uint64_t(double(expf((value - top) * inverse)) * kMassUnit);
  }

  // What the filters let through: keys above `key`, and those equal to it up to token `last_tied`.
  struct Kept {
    uint32_t key;
    int last_tied;

    ENSEMW2S_DEVICE bool holds(uint32_t other, int token) const {
      return other > key || (other == key && token <= last_tied);
    }
  };

  ENSEMW2S_DEVICE int filter_and_race(bool weighs_one) {
    const int count = shared.count;
    const float top = largest_candidate();
    if (count == 0) return -1;
    const auto key = [&](int i) { return ascending_bits(candidate_log_prob(i)); };
    anchor = offered(likeliest_candidate());
    Kept kept{0, mixture.vocabulary};
    if (settings.top_k > 0 && settings.top_k < count)
      kept.key = select_key(count, uint64_t(settings.top_k), key, [](int) { return 1; });
    if (settings.top_p < 1) keep_nucleus(kept, top, weighs_one);
    if (settings.min_p > 0) {
      const uint32_t least = ascending_bits(top + float(settings.temperature * log(settings.min_p)));
      if (least > kept.key) kept = {least, mixture.vocabulary};
    }
    return race_candidates(kept);
  }

  ENSEMW2S_DEVICE void keep_nucleus(Kept& kept, float top, bool weighs_one) const {
    const int count = shared.count;
    const uint32_t least = kept.key;
    const auto key = [&](int i) { return ascending_bits(candidate_log_prob(i)); };
    const auto weight = [&](int i) { return key(i) >= least ? mass(candidate_log_prob(i), top) : 0; };
    const uint64_t sum = total_over(count, weight);
    const double total = weighs_one ? fmax(double(sum), exp(-double(top)) * kMassUnit) : double(sum);
    const uint64_t target = uint64_t(ceil(settings.top_p * total));
    if (target > sum) return;
    const uint32_t edge = select_key(count, target, key, weight);
    const uint64_t above = total_over(count, [&](int i) { return key(i) > edge ? weight(i) : 0; });
    const uint64_t tied = total_over(count, [&](int i) { return uint64_t(key(i) == edge); });
    const uint64_t each = mass(from_ascending_bits(edge), top);
    const uint64_t admitted = (target - above + each - 1) / each;
    kept = {edge, mixture.vocabulary};
    if (admitted < tied)  // the lowest ids first
      kept.last_tied = int(~select_key(
          count, admitted, [&](int i) { return ~uint32_t(candidate(i)); },
          [&](int i) { return uint64_t(key(i) == edge); }));
  }

  // ---- Gumbel race: argmax over tokens of (log_prob - anchor) / temperature + noise ----

  // As -log(-log(1 - u)) <= -log(u), no token of this log-probability and word can score more.
  ENSEMW2S_DEVICE double highest_score(float value, uint32_t word) const {
    const float noise = 22.180710f - logf(float(word) + 0.5f);
    return (double(value) + slack(value) - anchor) / settings.temperature + noise + 1e-4;
  }

  // By a single thread.
  ENSEMW2S_DEVICE void enter(Best& best, int token, float upper_bound, double floor) const {
    const uint32_t word = philox(settings.seed, settings.position, uint32_t(token));
    if (best.token >= 0 && highest_score(upper_bound, word) < best.score) return;
    const double value = offered(token);
    if (value >= floor && value > -kInfinity)
      best = better(best, {(value - anchor) / settings.temperature + gumbel(word), token, 0});
  }

  ENSEMW2S_DEVICE int race_candidates(const Kept& kept) const {
    Best best{0, -1, 0};
    for (int i = thread_index(); i < shared.count; i += kRowThreads) {
      const float value = candidate_log_prob(i);
      if (kept.holds(ascending_bits(value), candidate(i))) enter(best, candidate(i), value, -kInfinity);
    }
    return reduce_block<kRowThreads>(best, better).token;
  }

  // Below this temperature the likeliest token is looked for first, as for min-p: it is the anchor.
  static constexpr double kCold = 1e-3;
  // No noise makes up for this: it lies between -3.2 and 22.9.
  static constexpr double kFarthest = -30;

  // No filter but min-p, which alone needs nothing but the likeliest token.
  ENSEMW2S_DEVICE int race_all() {
    double floor = -kInfinity;
    if (settings.min_p > 0 || settings.temperature < kCold) {
      anchor = offered(most_probable());
      floor = anchor + settings.temperature * (settings.min_p > 0 ? log(settings.min_p) : kFarthest);
    }
    const auto reaches_floor = [&](int g) {
      return upper[g] > -kInfinity && upper[g] + slack(upper[g]) >= floor;
    };
    Best group{0, -1, 0};
    for (int g = thread_index(); g < groups; g += kRowThreads)
      if (reaches_floor(g)) group = better(group, {highest_score(upper[g], least_words[g]), g, 0});
    group = reduce_block<kRowThreads>(group, better);
    // The group of the highest bound first: few others can beat what it holds.
    Best best{0, -1, 0};
    const int token = group.token < 0 ? mixture.vocabulary : token_of<T>(group.token, lane_index());
    if (warp_index() == 0 && token < mixture.vocabulary && is_plain(token))
      enter(best, token, upper[group.token], floor);
    best = reduce_block<kRowThreads>(best, better);
    visit_groups(
        [&](int g) {
          return reaches_floor(g) &&
                 (best.token < 0 || highest_score(upper[g], least_words[g]) >= best.score);
        },
        [&](int other, int g) { enter(best, other, upper[g], floor); });
    visit_adjusted([&](int other, float bound) { enter(best, other, bound, floor); });
    return reduce_block<kRowThreads>(best, better).token;
  }
};

// Whether a row's adjustments are such as token_adjustments makes. By all threads of the row's block; all
// find the same.
ENSEMW2S_DEVICE bool are_adjustments_usable(const DeviceMixture& mixture, int64_t row) {
  const Offer& offer = mixture.offer;
  if (offer.count == 0) return true;
  bool good = true;
  for (int64_t i = thread_index(); i < offer.count; i += kRowThreads) {
    const int token = offer.token(row, i), last = i > 0 ? offer.token(row, i - 1) : -1;
    const bool in_order = i == 0 || (last >= 0 && last < token);
    if (token >= 0)
      good = good && token < mixture.vocabulary && in_order &&
             offer.adjustment(mixture.rows, row, i).is_usable();
  }
  return reduce_block<kRowThreads>(int(good), [](int a, int b) { return a & b; }) != 0;
}

// By all threads of an invalid row's block.
ENSEMW2S_DEVICE void write_no_likeliest(const SampleOutputs& outputs, int64_t row) {
  for (int64_t n = thread_index(); n < outputs.top_count; n += kRowThreads) {
    outputs.top_tokens[row * outputs.top_count + n] = -1;
    outputs.top_log_probs[row * outputs.top_count + n] = NAN;
  }
}

template <class T>
ENSEMW2S_KERNEL(kRowThreads, 1)
sample_kernel(const DeviceMixture mixture, const SampleSettings settings, const ScanResults results,
              const SampleScratch scratch, const SampleOutputs outputs) {
  ENSEMW2S_SHARED(RowShared, shared);
  const int64_t row = block_index();
  merge_partials<T>(mixture, results, row, shared.state);
  barrier();
  const RowSettings asked = settings.of(row, mixture.vocabulary);
  const bool is_usable =
      is_valid(mixture, shared.state, row) && asked.are_usable() && are_adjustments_usable(mixture, row);
  RowSampler<T> sampler(mixture, asked, results, scratch, shared, row);
  if (is_usable && mixture.combine == Combine::kVote) {
    find_winners<T>(mixture, results, row, shared.state);
    barrier();
  }
  const int token = is_usable ? sampler.draw() : -1;
  const bool valid = token >= 0;
  for (int t = thread_index(); t < mixture.num_experts; t += kRowThreads)
    outputs.expert_log_probs[t * mixture.rows + row] =
        valid && shared.state.usable[t] ? float(sampler.expert_log_prob(t, token)) : NAN;
  if (thread_index() == 0) {
    outputs.valid[row] = valid;
    outputs.tokens[row] = token;
    outputs.log_probs[row] = valid ? float(sampler.log_prob(token)) : NAN;
  }
  if (!valid)
    write_no_likeliest(outputs, row);
  else if (outputs.top_count > 0)
    sampler.write_likeliest(outputs);
}

// Whether some row may need the noise of all tokens, and room for candidates.
struct Needs {
  bool noise, candidates;
};

inline Needs needs_of(const DeviceMixture& mixture, const SampleSettings& settings,
                      const SampleOutputs& outputs) {
  if (mixture.combine == Combine::kVote) return {false, false};
  if (!settings.same_for_all()) return {true, true};
  const RowSettings all = settings.settings_of(0, mixture.vocabulary);
  return {races_all(all), outputs.top_count > 0 || (!all.is_greedy() && all.is_filtered())};
}

template <class T>
const char* launch_sample(const DeviceMixture& mixture, const SampleSettings& settings,
                          const SampleOutputs& outputs, const Allocate& allocate, Stream stream) {
  const Needs needs = needs_of(mixture, settings, outputs);
  const ScanResults results = allocate_scan(mixture, needs.noise, allocate);
  SampleScratch scratch{};
  const int64_t bounds = mixture.rows * shape_of(mixture).groups * int64_t(sizeof(float));
  scratch.upper = static_cast<float*>(allocate(bounds));
  scratch.lower = static_cast<float*>(allocate(bounds));
  if (needs.candidates) {
    const int64_t tokens = mixture.rows * mixture.vocabulary;
    scratch.ids = static_cast<int32_t*>(allocate(tokens * int64_t(sizeof(int32_t))));
    scratch.log_probs = static_cast<float*>(allocate(tokens * int64_t(sizeof(float))));
  }
  const char* error = launch_scan<T>(mixture, settings, results, stream);
  return error ? error
               : launch(&sample_kernel<T>, mixture.rows, kRowThreads, stream, mixture, settings, results,
                        scratch, outputs);
}

const char* mixture_sample(const DeviceMixture& mixture, const SampleSettings& settings,
                           const SampleOutputs& outputs, const Allocate& allocate, void* stream) {
  if (mixture.rows == 0) return nullptr;
  ENSEMW2S_DISPATCH(mixture.dtype, launch_sample, mixture, settings, outputs, allocate,
                    static_cast<Stream>(stream));
}

}  // namespace ensemw2s::cuda
