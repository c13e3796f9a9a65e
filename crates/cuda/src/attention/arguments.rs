//! The arguments of attention's kernels, as their units declare them.

use cudarc::driver::sys::CUdeviceptr;

/// `CacheArgs` of `cache.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct CacheArgs {
    pub(super) queries: CUdeviceptr,
    pub(super) keys: CUdeviceptr,
    pub(super) values: CUdeviceptr,
    pub(super) queries_f16: CUdeviceptr,
    pub(super) key_pages: CUdeviceptr,
    pub(super) value_pages: CUdeviceptr,
    pub(super) query_weight: CUdeviceptr,
    pub(super) key_weight: CUdeviceptr,
    pub(super) angles: CUdeviceptr,
    pub(super) positions: CUdeviceptr,
    pub(super) row_sequences: CUdeviceptr,
    pub(super) page_tables: CUdeviceptr,
    pub(super) query_epsilon: f32,
    pub(super) key_epsilon: f32,
    pub(super) rows: i32,
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) head_dim: i32,
    pub(super) padded_head_dim: i32,
    pub(super) key_format: i32,
    pub(super) value_format: i32,
    pub(super) query_norm: i32,
    pub(super) key_norm: i32,
    pub(super) rope_style: i32,
    pub(super) rope_pairs: i32,
    pub(super) angle_pairs: i32,
    pub(super) table_stride: i32,
    pub(super) heads_of_warp: i32,
}

/// `AttendArgs` of `attention.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct AttendArgs {
    pub(super) queries: CUdeviceptr,
    pub(super) key_pages: CUdeviceptr,
    pub(super) value_pages: CUdeviceptr,
    pub(super) out: CUdeviceptr,
    pub(super) partial_out: CUdeviceptr,
    pub(super) partial_state: CUdeviceptr,
    pub(super) counters: CUdeviceptr,
    pub(super) tiles: CUdeviceptr,
    pub(super) page_tables: CUdeviceptr,
    pub(super) score_factor: f32,
    pub(super) cap_factor: f32,
    pub(super) window: i32,
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) head_dim: i32,
    pub(super) heads_per_tile: i32,
    pub(super) head_tiles: i32,
    pub(super) group: i32,
    pub(super) inverse_heads: i32,
    pub(super) key_format: i32,
    pub(super) value_format: i32,
    pub(super) table_stride: i32,
    pub(super) most_pieces: i32,
    pub(super) slots: i32,
    pub(super) slot_bytes: i32,
}

/// `StepHeads` of `split.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct StepHeads {
    pub(super) queries: CUdeviceptr,
    pub(super) keys: CUdeviceptr,
    pub(super) values: CUdeviceptr,
    pub(super) query_weight: CUdeviceptr,
    pub(super) key_weight: CUdeviceptr,
    pub(super) angles: CUdeviceptr,
    pub(super) query_epsilon: f32,
    pub(super) key_epsilon: f32,
    pub(super) query_norm: i32,
    pub(super) key_norm: i32,
    pub(super) rope_style: i32,
    pub(super) rope_pairs: i32,
    pub(super) angle_pairs: i32,
    pub(super) is_fresh: i32,
}

/// `AttendSplitArgs` of `split.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct AttendSplitArgs {
    pub(super) attend: AttendArgs,
    pub(super) heads: StepHeads,
    pub(super) ordered_out: CUdeviceptr,
    pub(super) out_places: CUdeviceptr,
    pub(super) staging_at: i32,
    pub(super) tiles_at: i32,
    pub(super) tiles_alone: i32,
    pub(super) unused: i32,
}

/// `AttendExactArgs` of `attention_exact.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct AttendExactArgs {
    pub(super) queries: CUdeviceptr,
    pub(super) key_pages: CUdeviceptr,
    pub(super) value_pages: CUdeviceptr,
    pub(super) out: CUdeviceptr,
    pub(super) positions: CUdeviceptr,
    pub(super) row_sequences: CUdeviceptr,
    pub(super) page_tables: CUdeviceptr,
    pub(super) score_factor: f32,
    pub(super) cap_factor: f32,
    pub(super) window: i32,
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) head_dim: i32,
    pub(super) table_stride: i32,
    pub(super) unused: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<CacheArgs>(), 12 * 8 + 16 * 4);
        assert_eq!(size_of::<AttendArgs>(), 9 * 8 + 16 * 4);
        assert_eq!(size_of::<StepHeads>(), 6 * 8 + 8 * 4);
        assert_eq!(
            size_of::<AttendSplitArgs>(),
            size_of::<AttendArgs>() + size_of::<StepHeads>() + 2 * 8 + 4 * 4
        );
        assert_eq!(size_of::<AttendExactArgs>(), 7 * 8 + 8 * 4);
    }
}
