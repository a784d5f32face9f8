// The instruction set that the CPU kernels run with, chosen once per process.
#pragma once

namespace metafast {

enum class Isa { baseline, avx2, avx512 };

const char* isa_name(Isa isa);

// Whether this build holds kernels for it.
bool isa_built(Isa isa);

// The best one that is built and that this processor and operating system support.
Isa detected_isa();

// METAFAST_CPU_ISA if it is set, else detected_isa(). Throws std::runtime_error where the variable names none
// that can run here; importing metafast calls it first, so that the error comes then.
Isa active_isa();

}  // namespace metafast
