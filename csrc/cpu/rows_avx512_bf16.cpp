#include "vec.h"

#define KDKERNELS_ENTRY caad_rows_avx512_bf16
#include "rows.inl"
