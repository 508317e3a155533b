#define G4_AVX_VNNI
#include "vector_avx2.h"

#include "kernels_generic.h"

G4_KERNELS(KERNELS_AVX_VNNI, "avx-vnni")
