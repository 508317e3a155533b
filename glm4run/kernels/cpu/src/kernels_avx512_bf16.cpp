#define G4_AVX512_BF16
#include "vector_avx512.h"

#include "kernels_generic.h"

G4_KERNELS(KERNELS_AVX512_BF16, "avx512-bf16")
