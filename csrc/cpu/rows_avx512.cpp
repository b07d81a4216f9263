#include "vec.h"

#define KDKERNELS_ENTRY caad_rows_avx512
#include "rows.inl"
