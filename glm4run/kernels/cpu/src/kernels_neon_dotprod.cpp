#include "vector_neon.h"

#include "kernels_generic.h"

G4_KERNELS(KERNELS_NEON_DOTPROD, "neon-dotprod")
