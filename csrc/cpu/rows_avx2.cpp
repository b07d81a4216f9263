#include "vec.h"

#define KDKERNELS_ENTRY caad_rows_avx2
#include "rows.inl"
