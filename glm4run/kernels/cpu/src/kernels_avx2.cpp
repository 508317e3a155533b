#include "vector_avx2.h"

#include "kernels_generic.h"

G4_KERNELS(KERNELS_AVX2, "avx2")
