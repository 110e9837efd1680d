// Everything that a kernel may include, so that targets.inc can compile kernels only.
#pragma once

#if defined(__x86_64__)
#  include <immintrin.h>
#elif defined(__aarch64__)
#  include <arm_neon.h>
#endif

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"
#include "philox.h"
#include "types.h"
