//! Attention as one parallel region.

use std::sync::atomic::{AtomicUsize, Ordering};

use oxllama_backend::quantised::GROUP;
use oxllama_backend::{AttentionArgs, AttentionOps, DeviceError, HeadNorm, HostBuffer};

use crate::attention::{AttentionScratch, Plan, TASK_ROWS, attend, prepare};
use crate::device::{CpuDevice, read, write};
use crate::isa::per_isa;
use crate::pool::Team;
use crate::rowwise::RowNorm;
use crate::step::{CpuWorkspace, StepScratch};

per_isa! {
    unsafe fn prepare_head(plan: &Plan<'_>, row: usize, kv_head: usize) = prepare;
}
per_isa! {
    unsafe fn attend_rows(
        plan: &Plan<'_>,
        scratch: &AttentionScratch,
        rows: (usize, usize),
        kv_head: usize,
    ) = attend;
}

/// The region's parts.
struct Region<'a> {
    isa: crate::Isa,
    plan: Plan<'a>,
    scratch: StepScratch,
    /// The next task that no thread has taken.
    next: AtomicUsize,
    /// Every row is of another sequence.
    separate: bool,
}

// SAFETY: the pointers are to buffers that the operation's caller has borrowed for it; threads
// write disjoint rows and heads, and read the cache after a barrier or where they wrote it.
unsafe impl Sync for Region<'_> {}

impl Region<'_> {
    /// One thread's part.
    ///
    /// # Safety
    /// The plan's pointers have the extents it states, and every thread of the team calls this.
    unsafe fn run(&self, team: &Team<'_>) {
        let plan = &self.plan;
        let rows = plan.positions.len();
        let kv_heads = plan.kv_heads;
        let share = team.share(rows * kv_heads);
        let group = plan.heads / kv_heads;
        let own = self.scratch.attention(team.thread);
        // SAFETY: own scratch, sized for these heads; rows and heads are disjoint.
        unsafe {
            let scratch = AttentionScratch::new(own, group, plan.head_dim);
            for unit in share.clone() {
                prepare_head(self.isa, plan, unit / kv_heads, unit % kv_heads);
                if self.separate {
                    // What this row reads, this thread has just written or an earlier step has.
                    let row = unit / kv_heads;
                    attend_rows(self.isa, plan, &scratch, (row, row + 1), unit % kv_heads);
                }
            }
            if self.separate {
                return;
            }
            team.barrier();
            let mut task = 0;
            let mut taken = self.next.fetch_add(1, Ordering::Relaxed);
            let mut row = 0;
            while row < rows {
                let end = self.task_end(row);
                while taken < task + kv_heads {
                    attend_rows(self.isa, plan, &scratch, (row, end), taken - task);
                    taken = self.next.fetch_add(1, Ordering::Relaxed);
                }
                task += kv_heads;
                row = end;
            }
        }
    }

    /// End of the task that starts at `row`: neighbours of the same sequence.
    fn task_end(&self, row: usize) -> usize {
        let sequences = self.plan.row_sequences;
        let most = (row + TASK_ROWS).min(sequences.len());
        let same = |&other: &usize| sequences[other] == sequences[row];
        row + (row..most).take_while(same).count()
    }
}

/// A head norm as the kernels take it, at the first head's weights.
fn head_norm(norm: &HeadNorm<HostBuffer>, heads: usize, head_dim: usize) -> RowNorm {
    RowNorm {
        kind: norm.kind,
        weight: read(&norm.weight, heads * head_dim),
        bias: std::ptr::null(),
        epsilon: norm.epsilon,
        width: head_dim,
    }
}

impl AttentionOps for CpuDevice {
    fn attention(
        &self,
        args: AttentionArgs<'_, HostBuffer>,
        workspace: &mut CpuWorkspace,
    ) -> Result<(), DeviceError> {
        let shape = args.cache.shape;
        let (heads, kv_heads, head_dim) = (args.heads, shape.kv_heads, shape.head_dim);
        let rows = workspace.rows();
        if rows == 0 {
            return Ok(());
        }
        assert!(
            heads.is_multiple_of(kv_heads) && workspace.pages_used <= shape.pages,
            "{heads} query heads share {kv_heads}; the step names page {} of {}",
            workspace.pages_used.saturating_sub(1),
            shape.pages
        );
        let limits = &workspace.shape;
        assert!(
            AttentionScratch::elements(heads, kv_heads, head_dim)
                <= AttentionScratch::elements(limits.heads, limits.kv_heads, limits.head_dim),
            "{heads} heads of {head_dim} dimensions exceed the workspace"
        );
        let key_bytes = shape.pages * shape.key_page_bytes();
        let value_bytes = shape.pages * shape.value_page_bytes();
        let rope = args.rope.map(|index| workspace.rope(index));
        assert!(
            !shape.format.is_quantised() || head_dim.is_multiple_of(GROUP),
            "{head_dim} dimensions of a head are not whole groups of {GROUP}"
        );
        assert!(
            rope.is_none_or(|rope| 2 * rope.pairs <= head_dim),
            "a rope rotates at most a head's dimensions"
        );
        let scratch = workspace.scratch(rows, 0, self.pool.threads());
        let row_sequences = workspace.row_sequences();
        let region = Region {
            isa: self.isa,
            plan: Plan {
                queries: write(args.queries, rows * heads * head_dim),
                keys: write(args.keys, rows * kv_heads * head_dim),
                values: read(args.values, rows * kv_heads * head_dim),
                out: write(args.out, rows * heads * head_dim),
                key_cache: args.cache.keys.as_mut_slice::<u8>()[..key_bytes].as_mut_ptr(),
                value_cache: args.cache.values.as_mut_slice::<u8>()[..value_bytes].as_mut_ptr(),
                key_layout: shape.key_layout(),
                value_layout: shape.value_layout(),
                heads,
                kv_heads,
                head_dim,
                scale: args.scale,
                softcap: args.softcap,
                window: args.window,
                query_norm: args.query_norm.map(|norm| head_norm(norm, heads, head_dim)),
                key_norm: args
                    .key_norm
                    .map(|norm| head_norm(norm, kv_heads, head_dim)),
                rope,
                positions: workspace.positions(),
                row_sequences,
                page_tables: workspace.page_tables(),
                pages_per_sequence: workspace.pages_per_sequence(),
            },
            scratch,
            next: AtomicUsize::new(0),
            separate: row_sequences.windows(2).all(|pair| pair[0] < pair[1]),
        };
        // SAFETY: buffers were checked above and are borrowed for this call; pages are below the
        // cache's; positions lie within page tables since the step began.
        self.pool.run(&|team| unsafe { region.run(team) });
        Ok(())
    }
}
