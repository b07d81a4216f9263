#include "vec.h"

#define KDKERNELS_ENTRY caad_rows_generic
#include "rows.inl"

#define KDKERNELS_LAYER_ENTRY layer_rows_generic
#include "layer_rows.inl"
