#include "vec.h"

#define KDKERNELS_ENTRY caad_rows_avx512
#include "rows.inl"

#define KDKERNELS_LAYER_ENTRY layer_rows_avx512
#include "layer_rows.inl"

#define KDKERNELS_MIX_ENTRY mix_rows_avx512
#include "mix_rows.inl"

#define KDKERNELS_PROJECTED_ENTRY projected_rows_avx512
#include "projected_rows.inl"

#define KDKERNELS_SHARD_ENTRY shard_rows_avx512
#include "shard_rows.inl"
