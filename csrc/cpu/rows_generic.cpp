#include "vec.h"

#define KDKERNELS_ENTRY caad_rows_generic
#include "rows.inl"
