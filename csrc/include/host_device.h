// Marks a function that kernels of both kinds call: nvcc compiles it for the device too.
#pragma once

#if defined(__CUDACC__)
#  define ENSEMW2S_HOST_DEVICE __host__ __device__
#else
#  define ENSEMW2S_HOST_DEVICE
#endif
