#include "vec.h"

#define KDKERNELS_ENTRY caad_rows_generic
#include "rows.inl"

#define KDKERNELS_LAYER_ENTRY layer_rows_generic
#include "layer_rows.inl"

#define KDKERNELS_MIX_ENTRY mix_rows_generic
#include "mix_rows.inl"

#define KDKERNELS_PROJECTED_ENTRY projected_rows_generic
#include "projected_rows.inl"

#define KDKERNELS_SHARD_ENTRY shard_rows_generic
#include "shard_rows.inl"
