//! The operations, by family.
//!
//! Arguments of more than a few parts are structs with named fields, so that a call site
//! reads like the formula. `B` is a backend's buffer, `L` its linear weights.

mod steps;

use oxllama_format::{LinearHeader, LinearSource};
use oxllama_memory::{Bytes, CacheFormat, Reservation};

use crate::{DeviceError, DrawLimits, HeadLayout};

pub use steps::{DeviceMemory, StepOps};

/// Which normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + epsilon) · weight`
    Rms,
    /// `(x − mean(x)) / sqrt(var(x) + epsilon) · weight + bias`
    Layer,
}

/// A normalisation over a row's whole width.
#[derive(Debug)]
pub struct Norm<B> {
    /// Formula.
    pub kind: NormKind,
    /// f32 `[width]`. Gemma's `1 + w` is applied when this is filled.
    pub weight: B,
    /// f32 `[width]`; only with [`NormKind::Layer`].
    pub bias: Option<B>,
    /// Added to the mean square or variance.
    pub epsilon: f32,
    /// Elements of a row.
    pub width: usize,
}

/// A normalisation over each head's dimensions by itself.
#[derive(Debug)]
pub struct HeadNorm<B> {
    /// Formula (no bias).
    pub kind: NormKind,
    /// f32 `[heads, head_dim]`; a model's single `[head_dim]` vector is repeated per head.
    pub weight: B,
    /// Added to the mean square or variance.
    pub epsilon: f32,
}

/// Normalisations.
pub trait NormOps: StepOps {
    /// `out[r, :] = norm(x[r, :])` for `rows` rows of f32 `[rows, norm.width]`.
    ///
    /// # Errors
    /// The device failed.
    fn norm(
        &self,
        norm: &Norm<Self::Buffer>,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
        rows: usize,
        workspace: &mut Self::Workspace,
    ) -> Result<(), DeviceError>;
}

/// What a linear does with the old contents of its output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Store {
    /// `out = y`
    Overwrite,
    /// `out += scale · y`: a residual connection.
    Add {
        /// Granite's residual multiplier; 1 elsewhere. Multiplies the bias as well.
        scale: f32,
    },
}

/// One linear and where its result goes.
#[derive(Debug)]
pub struct LinearOutput<'a, L, B> {
    /// The weights.
    pub weights: &'a L,
    /// f32 `[rows, out_features]`, padding columns included.
    pub out: &'a mut B,
}

/// `y_i = W_i · norm(x)` for linears that read the same input.
#[derive(Debug)]
pub struct NormLinears<'a, L, B> {
    /// `None`: the linears read `x` itself.
    pub norm: Option<&'a Norm<B>>,
    /// f32 `[rows, in_features]`.
    pub x: &'a B,
    /// f32 `[rows, in_features]`: receives `norm(x)` where the backend does not fuse;
    /// otherwise its contents are unspecified afterwards.
    pub normed: &'a mut B,
    /// Outputs are overwritten.
    pub linears: &'a mut [LinearOutput<'a, L, B>],
    /// Rows of `x`.
    pub rows: usize,
}

/// Element-wise function of a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt 2))`
    GeluErf,
}

/// `out ← store(W · (activation(gate) ⊙ up))`: the second half of a gated MLP.
#[derive(Debug)]
pub struct GatedLinear<'a, L, B> {
    /// Function of the gate.
    pub activation: Activation,
    /// f32 `[rows, in_features]`; unspecified afterwards.
    pub gate: &'a mut B,
    /// f32 `[rows, in_features]`.
    pub up: &'a B,
    /// The down projection.
    pub weights: &'a L,
    /// f32 `[rows, out_features]`.
    pub out: &'a mut B,
    /// Overwrite, or add to the residual stream.
    pub store: Store,
    /// Rows.
    pub rows: usize,
}

/// Matrix products with weights of any stored format.
pub trait LinearOps: NormOps + ElementwiseOps {
    /// Weights as this backend wants them, repacked at load.
    type Linear: Send + Sync + 'static;

    /// Bytes of such weights on the device, from their header alone: exactly what
    /// [`Self::load_linear`] takes.
    fn linear_bytes(&self, header: &LinearHeader) -> Bytes;

    /// Repacks `source` into `reservation`, which must hold [`Self::linear_bytes`].
    /// Callable from several threads at once.
    ///
    /// # Errors
    /// The weights are malformed, or allocation fails.
    fn load_linear(
        &self,
        source: &LinearSource<'_>,
        reservation: Reservation,
    ) -> Result<Self::Linear, DeviceError>;

    /// Bytes of the host's memory that an embedding takes which stays there and whose rows
    /// [`Self::embed`] reads in place; `None` where devices cannot, or where their memory is the
    /// host's anyway: the default.
    fn host_embedding_bytes(&self, header: &LinearHeader) -> Option<Bytes> {
        let _ = header;
        None
    }

    /// Brings an embedding into the host's memory: `reservation` is one of the host's and holds
    /// [`Self::host_embedding_bytes`]. Only for [`Self::embed`].
    ///
    /// # Errors
    /// The weights are malformed, or allocation fails; the default always fails.
    fn load_host_embedding(
        &self,
        source: &LinearSource<'_>,
        reservation: Reservation,
    ) -> Result<Self::Linear, DeviceError> {
        let _ = source;
        Err(DeviceError::Operation {
            device: self.id().clone(),
            operation: format!("keeping an embedding on {}", reservation.device()),
            reason: "this kind of device does not read the host's memory in place".to_owned(),
        })
    }

    /// `(in_features, out_features)` of loaded weights, padding included.
    fn linear_shape(&self, weights: &Self::Linear) -> (usize, usize);

    /// `out[r, :] = scale · table[token_ids[r], :]` for the step's rows. `table` is a float
    /// linear whose outputs are the vocabulary and whose inputs the hidden width, so that a
    /// tied head and the embedding are one piece of memory. Ids past its rows read row 0
    /// (the engine refuses them long before).
    ///
    /// # Errors
    /// The device failed.
    fn embed(
        &self,
        table: &Self::Linear,
        scale: f32,
        out: &mut Self::Buffer,
        workspace: &mut Self::Workspace,
    ) -> Result<(), DeviceError>;

    /// `out ← store(W · x + bias)`; `x` is f32 `[rows, in_features]`.
    ///
    /// # Errors
    /// The device failed.
    fn linear(
        &self,
        x: &Self::Buffer,
        output: LinearOutput<'_, Self::Linear, Self::Buffer>,
        store: Store,
        rows: usize,
        workspace: &mut Self::Workspace,
    ) -> Result<(), DeviceError>;

    /// [`NormLinears`]; composed of [`NormOps::norm`] and [`Self::linear`] by default.
    ///
    /// # Errors
    /// The device failed.
    fn norm_linears(
        &self,
        args: NormLinears<'_, Self::Linear, Self::Buffer>,
        workspace: &mut Self::Workspace,
    ) -> Result<(), DeviceError> {
        let NormLinears {
            norm,
            x,
            normed,
            linears,
            rows,
        } = args;
        let input = match norm {
            Some(norm) => {
                self.norm(norm, x, normed, rows, workspace)?;
                &*normed
            }
            None => x,
        };
        for output in linears {
            let output = LinearOutput {
                weights: output.weights,
                out: &mut *output.out,
            };
            self.linear(input, output, Store::Overwrite, rows, workspace)?;
        }
        Ok(())
    }

    /// Tells that the workspace's next operation is attention, and that [`Self::linear`] with these
    /// weights is the one after it and alone reads what it gives: so a device may make that as the
    /// linear wants it, and leave [`AttentionArgs::out`] as it was. Results do not depend on it.
    /// By default nothing is made of it.
    fn announce_reader(&self, _weights: &Self::Linear, _workspace: &mut Self::Workspace) {}

    /// Tells that the workspace's next operation is [`Self::norm_linears`] of two linears, a gate and an
    /// up projection, and [`Self::gated_linear`] of the two with this activation and these weights the one
    /// after it, which alone reads what they give: so a device may leave there what suits it. Results do not
    /// depend on it. By default nothing is made of it.
    fn announce_gate(
        &self,
        _activation: Activation,
        _weights: &Self::Linear,
        _workspace: &mut Self::Workspace,
    ) {
    }

    /// [`GatedLinear`]; composed of [`ElementwiseOps::gate`] and [`Self::linear`] by default.
    ///
    /// # Errors
    /// The device failed.
    fn gated_linear(
        &self,
        args: GatedLinear<'_, Self::Linear, Self::Buffer>,
        workspace: &mut Self::Workspace,
    ) -> Result<(), DeviceError> {
        let (in_features, _) = self.linear_shape(args.weights);
        self.gate(args.activation, args.gate, args.up, args.rows * in_features)?;
        let output = LinearOutput {
            weights: args.weights,
            out: args.out,
        };
        self.linear(args.gate, output, args.store, args.rows, workspace)
    }
}

/// Extents of one layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Pages in the pool.
    pub pages: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Dimensions of a head; whole groups where the format is quantised.
    pub head_dim: usize,
    /// Element format.
    pub format: CacheFormat,
}

impl CacheShape {
    /// How a head's keys lie in a page.
    pub const fn key_layout(&self) -> HeadLayout {
        HeadLayout {
            format: self.format.keys(),
            head_dim: self.head_dim,
        }
    }

    /// How a head's values lie in a page.
    pub const fn value_layout(&self) -> HeadLayout {
        HeadLayout {
            format: self.format.values(),
            head_dim: self.head_dim,
        }
    }

    /// Bytes of one page of keys: page `i` is one block, from byte `i` times this on.
    pub const fn key_page_bytes(&self) -> usize {
        self.kv_heads * self.key_layout().page_bytes()
    }

    /// Bytes of one page of values, which is one block likewise.
    pub const fn value_page_bytes(&self) -> usize {
        self.kv_heads * self.value_layout().page_bytes()
    }

    /// Bytes of the keys of one layer.
    pub fn key_bytes(&self) -> Bytes {
        Bytes::from_usize(self.key_page_bytes()).saturating_mul(self.pages as u64)
    }

    /// Bytes of the values of one layer.
    pub fn value_bytes(&self) -> Bytes {
        Bytes::from_usize(self.value_page_bytes()).saturating_mul(self.pages as u64)
    }
}

/// One layer's keys and values.
#[derive(Debug)]
pub struct KvLayer<B> {
    /// Extents of both buffers.
    pub shape: CacheShape,
    /// `[pages, kv_heads]` of [`CacheShape::key_layout`]
    pub keys: B,
    /// `[pages, kv_heads]` of [`CacheShape::value_layout`]
    pub values: B,
}

/// Attention of the step's rows over their own sequences' pages.
#[derive(Debug)]
pub struct AttentionArgs<'a, B> {
    /// f32 `[rows, heads, head_dim]`; normed and rotated, unspecified afterwards.
    pub queries: &'a mut B,
    /// f32 `[rows, kv_heads, head_dim]`; normed and rotated, then stored; unspecified afterwards.
    pub keys: &'a mut B,
    /// f32 `[rows, kv_heads, head_dim]`; stored.
    pub values: &'a B,
    /// The layer's cache; written at each row's position before any row reads.
    pub cache: &'a mut KvLayer<B>,
    /// f32 `[rows, heads, head_dim]`: the result.
    pub out: &'a mut B,
    /// Normalisation of query heads before the rotation (Qwen3, Gemma 3, Cohere).
    pub query_norm: Option<&'a HeadNorm<B>>,
    /// Normalisation of key heads before the rotation.
    pub key_norm: Option<&'a HeadNorm<B>>,
    /// Index into the ropes of [`StepOps::begin_step`]; `None`: not rotated.
    pub rope: Option<usize>,
    /// Query heads; a multiple of the cache's `kv_heads`, neighbours share one.
    pub heads: usize,
    /// Multiplies the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// `Some(c)`: scores become `c · tanh(score / c)` (Gemma 2).
    pub softcap: Option<f32>,
    /// `Some(w)`: a row at position `p` sees positions `p − w + 1 ..= p` only.
    pub window: Option<usize>,
}

/// Attention over the paged cache.
pub trait AttentionOps: StepOps {
    /// Norms and rotates queries and keys, stores keys and values, then attends:
    /// `out[r, h] = softmax(cap(scale · q · K)) · V` over the row's visible positions.
    ///
    /// # Errors
    /// The device failed.
    fn attention(
        &self,
        args: AttentionArgs<'_, Self::Buffer>,
        workspace: &mut Self::Workspace,
    ) -> Result<(), DeviceError>;
}

/// Element-wise and row-wise operations.
pub trait ElementwiseOps: StepOps {
    /// `gate[i] = activation(gate[i]) · up[i]` for `elements` f32 elements.
    ///
    /// # Errors
    /// The device failed.
    fn gate(
        &self,
        activation: Activation,
        gate: &mut Self::Buffer,
        up: &Self::Buffer,
        elements: usize,
    ) -> Result<(), DeviceError>;

    /// `out[i] += scale · x[i]` for `elements` f32 elements.
    ///
    /// # Errors
    /// The device failed.
    fn add(
        &self,
        x: &Self::Buffer,
        scale: f32,
        out: &mut Self::Buffer,
        elements: usize,
    ) -> Result<(), DeviceError>;

    /// `out[i, :] = x[rows[i], :]`, f32 `[_, width]`.
    ///
    /// # Errors
    /// The device failed.
    fn gather_rows(
        &self,
        x: &Self::Buffer,
        rows: &[u32],
        width: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// `out[i, :] = x[rows[i], :]`, where `rows` are the step's [`StepBatch::logit_rows`], which
    /// a device that records sequences reads from its own copy.
    ///
    /// # Errors
    /// The device failed.
    fn gather_logit_rows(
        &self,
        x: &Self::Buffer,
        rows: &[u32],
        width: usize,
        out: &mut Self::Buffer,
        _workspace: &mut Self::Workspace,
    ) -> Result<(), DeviceError> {
        self.gather_rows(x, rows, width, out)
    }

    /// `out[rows[i], :] += scale · x[i, :]`, f32 `[_, width]`: the way back of
    /// [`Self::gather_rows`]. No row is named twice.
    ///
    /// # Errors
    /// The device failed.
    fn scatter_add_rows(
        &self,
        x: &Self::Buffer,
        rows: &[u32],
        scale: f32,
        width: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// Finishes logits f32 `[rows, width]` in place: multiplies by `scale`, then caps as
    /// `c · tanh(x / c)`, then sets columns from `vocab_size` on (padding) to −∞.
    ///
    /// # Errors
    /// The device failed.
    fn finish_logits(&self, logits: &mut Self::Buffer, args: LogitArgs) -> Result<(), DeviceError>;

    /// The largest draws that the device makes by itself from rows of `width` logits; `None`:
    /// it makes none, and whoever wants tokens reads logits.
    fn draw_limits(&self, _width: usize) -> Option<DrawLimits> {
        None
    }

    /// Enqueues the step's [`StepBatch::draws`] from the last so many rows of finished logits, for
    /// [`Self::drawn_tokens`]. The logits are as before afterwards.
    ///
    /// # Errors
    /// The device failed. A device without [`Self::draw_limits`] is never asked.
    fn draw_tokens(
        &self,
        _logits: &mut Self::Buffer,
        _args: LogitArgs,
        _workspace: &mut Self::Workspace,
    ) -> Result<(), DeviceError> {
        unreachable!("only a device that draws is asked to")
    }

    /// The first `elements` of the logits that the last step with logit rows has made, as
    /// [`DeviceMemory::read_f32`] gives them. Steps without any may have begun since: they are not
    /// waited for.
    ///
    /// # Errors
    /// The device failed, perhaps in what was enqueued before.
    fn read_logits<'a>(
        &self,
        logits: &'a mut Self::Buffer,
        elements: usize,
        copy: &'a mut [f32],
        _workspace: &mut Self::Workspace,
    ) -> Result<&'a mut [f32], DeviceError> {
        self.read_f32(logits, elements, copy)
    }

    /// The tokens of [`Self::draw_tokens`], in the draws' order; where none can be drawn,
    /// [`NOT_FINITE`](crate::NOT_FINITE) or [`NOTHING_LEFT`](crate::NOTHING_LEFT). As with
    /// [`Self::read_logits`] they are those of the last step with logit rows.
    ///
    /// # Errors
    /// The device failed, perhaps in what was enqueued before.
    fn drawn_tokens<'a>(
        &self,
        _workspace: &'a mut Self::Workspace,
    ) -> Result<&'a [u32], DeviceError> {
        Ok(&[])
    }
}

/// A block of logits, and how [`ElementwiseOps::finish_logits`] treats it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitArgs {
    /// Rows of logits.
    pub rows: usize,
    /// Columns of a row, padding included.
    pub width: usize,
    /// Columns that are tokens.
    pub vocab_size: usize,
    /// Multiplier (Cohere, Granite); 1 elsewhere.
    pub scale: f32,
    /// Gemma 2's final cap.
    pub softcap: Option<f32>,
}

/// A whole device: every family of operations.
pub trait Device: LinearOps + AttentionOps {}

impl<T: LinearOps + AttentionOps> Device for T {}
