// The settings of the functions in library.h as the kernels take them.
#pragma once

#include "library.h"
#include "mixture.h"

namespace ensemw2s {

inline SampleSettings settings_of(const EmulatedSettings& given) {
  return {{given.temperature, given.rows[0], given.wide[0]},
          {given.top_k, given.rows[1], given.wide[1]},
          {given.top_p, given.rows[2], given.wide[2]},
          {given.min_p, given.rows[3], given.wide[3]},
          given.seeds,
          given.positions};
}

inline Offer offer_of(const EmulatedSettings& given, int vocabulary) {
  return {given.mask, given.tokens, given.values, given.listed, given.count, (vocabulary + 31) / 32};
}

}  // namespace ensemw2s
