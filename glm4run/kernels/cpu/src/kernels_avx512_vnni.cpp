#include "vector_avx512.h"

#include "kernels_generic.h"

G4_KERNELS(KERNELS_AVX512_VNNI, "avx512-vnni")
