#include "vector_scalar.h"

#include "kernels_generic.h"

G4_KERNELS(KERNELS_SCALAR, "scalar")
