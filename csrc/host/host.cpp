// ensemw2s._host: what `ensemw2s env` reports and what tests need of the C++ side. No tensors here.
#include <pybind11/pybind11.h>

#include "instruction_set.h"
#include "philox.h"

namespace {

const char* instruction_set_name() {
  switch (ensemw2s::instruction_set()) {
    case ensemw2s::InstructionSet::kAvx512:
      return "avx512";
    case ensemw2s::InstructionSet::kAvx2:
      return "avx2";
    case ensemw2s::InstructionSet::kPlain:
      return "default";
  }
  return "default";
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information, the chosen instruction set and Philox for tests.";
  m.def("compiler", [] {
    return
#if defined(__clang__)
        "clang " __clang_version__
#else
      "g++ " __VERSION__
#endif
        ;
  });
  m.def("instruction_set", &instruction_set_name,
        "avx512, avx2 or default: what the CPU kernels use here (ATEN_CPU_CAPABILITY lowers it).");
  m.def("philox", &ensemw2s::philox, pybind11::arg("seed"), pybind11::arg("position"), pybind11::arg("token"),
        "Word token % 4 of Philox4x32-10 for key `seed` and counter (token / 4, position, 0, 0).");
  m.def("gumbel", &ensemw2s::gumbel, pybind11::arg("word"), "Gumbel noise of a Philox word.");
}
