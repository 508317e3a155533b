// The instruction set in use.
#pragma once
#include "kernels.h"

const Kernels& active_kernels();
