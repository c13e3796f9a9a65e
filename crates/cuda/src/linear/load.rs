//! Weights from their files to the device's layout.
//!
//! The host copies pieces of the source, front to back, into page-locked memory, from where the
//! repacking kernels read them over the bus while the next piece is copied. Each thread that
//! loads has a stream and two such pieces of its own; the device holds nothing but the result.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdeviceptr};
use oxllama_backend::DeviceError;
use oxllama_format::{DType, Exl2Linear, FloatLinear, GptqLinear, LinearSource};
use oxllama_memory::{Bytes, Reservation};

use super::layout::{
    BlockInfo, Layout, MOST_BLOCKS, TILE_OUTPUTS, UNIT_BYTES, block_table, groups, section_ends,
};
use super::order::{Order, inverse, permutation_of};
use super::plan::Plan;
use super::ranges::RangeTable;
use super::{CudaLinear, LinearMemory};
use crate::buffer::CudaBuffer;
use crate::context::Context;
use crate::device::CudaDevice;
use crate::launch::Launch;
use crate::step::aligned;
use crate::stream::{Event, PinnedBuffer, Stream};

/// Bytes of a piece, unless a single block of inputs or tile of outputs has more.
const PIECE_BYTES: usize = 8 << 20;

/// Pieces that may be under way at once.
const PIECES: usize = 2;

/// Warps of a block of the repacking kernels; `REPACK_WARPS` in `repack.cu`.
const REPACK_WARPS: usize = 4;

/// Threads of a block of the kernels for scales.
const SCALE_THREADS: usize = 256;

/// The smallest magnitude that rounds to infinity in fp16: half a step above 65504.
const F16_OVERFLOW: f32 = 65520.0;

/// `RepackExl2Args` of `repack.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct RepackExl2Args {
    words: CUdeviceptr,
    weights: CUdeviceptr,
    tile_bytes: i64,
    columns: i32,
    blocks: i32,
    bits: i32,
    reserved: i32,
}

/// `RepackGptqArgs` of `repack.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct RepackGptqArgs {
    words: CUdeviceptr,
    permutation: CUdeviceptr,
    weights: CUdeviceptr,
    tile_bytes: i64,
    columns: i32,
    blocks: i32,
}

/// `RepackFloatArgs` of `repack.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct RepackFloatArgs {
    values: CUdeviceptr,
    weights: CUdeviceptr,
    largest: CUdeviceptr,
    tile_bytes: i64,
    rows: i32,
    width: i32,
    dtype: i32,
    factor: f32,
}

/// `RepackExl2ScalesArgs` of `repack.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct RepackExl2ScalesArgs {
    words: CUdeviceptr,
    scales: CUdeviceptr,
    group_count: i32,
    groups: i32,
    tiles: i32,
    reserved: i32,
}

/// `RepackGptqScalesArgs` of `repack.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct RepackGptqScalesArgs {
    scales: CUdeviceptr,
    zero_words: CUdeviceptr,
    tile_scales: CUdeviceptr,
    tile_zeros: CUdeviceptr,
    zero_offset: i32,
    group_count: i32,
    groups: i32,
    columns: i32,
}

/// A stream and page-locked memory for one load at a time.
#[derive(Debug)]
pub(crate) struct Loader {
    stream: Stream,
    pieces: [(PinnedBuffer, Event); PIECES],
    next: usize,
}

impl Loader {
    fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let piece = || {
            let memory = PinnedBuffer::new(context, PIECE_BYTES)?;
            Ok::<_, DeviceError>((memory, Event::new(context)?))
        };
        Ok(Self {
            stream: Stream::new(context)?,
            pieces: [piece()?, piece()?],
            next: 0,
        })
    }
}

/// Loaders that no thread uses at the moment: at most as many as have loaded at once.
#[derive(Debug, Default)]
pub(crate) struct LoaderPool(Mutex<Vec<Loader>>);

impl LoaderPool {
    /// A loader for the calling thread.
    fn take(&self, context: &Arc<Context>) -> Result<Loader, DeviceError> {
        let idle = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.map_or_else(|| Loader::new(context), Ok)
    }

    fn give_back(&self, loader: Loader) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(loader);
    }
}

/// A load in progress.
struct Load<'a> {
    device: &'a CudaDevice,
    loader: &'a mut Loader,
    layout: &'a Layout,
    /// Where the matrix starts on the device.
    address: CUdeviceptr,
}

impl Load<'_> {
    fn tile_bytes(&self) -> usize {
        self.layout.tile_units * UNIT_BYTES
    }

    fn part(&self, offset: usize) -> CUdeviceptr {
        self.address + offset as u64
    }

    /// Lets `fill` write a piece of `bytes` bytes, then `enqueue` what reads it from the address
    /// that it has on the device.
    fn piece(
        &mut self,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
        enqueue: impl FnOnce(&CudaDevice, &Stream, CUdeviceptr) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Loader {
            stream,
            pieces,
            next,
        } = &mut *self.loader;
        let (memory, is_read) = &mut pieces[*next];
        *next = (*next + 1) % PIECES;
        is_read.synchronize()?;
        if memory.as_slice::<u8>().len() < bytes {
            *memory = PinnedBuffer::new(self.device.context(), bytes)?;
        }
        fill(&mut memory.as_mut_slice::<u8>()[..bytes]);
        // Page-locked memory has the same address on the device: addresses are unified on every
        // GPU that is supported.
        let address = memory.as_slice::<u8>().as_ptr().addr() as CUdeviceptr;
        enqueue(self.device, stream, address)?;
        is_read.record(stream)
    }

    /// Copies `bytes` to the device.
    fn upload(&mut self, bytes: &[u8], to: CUdeviceptr) -> Result<(), DeviceError> {
        for (index, bytes) in bytes.chunks(PIECE_BYTES).enumerate() {
            let to = to + (index * PIECE_BYTES) as u64;
            let fill = |piece: &mut [u8]| piece.copy_from_slice(bytes);
            self.piece(bytes.len(), fill, |device, stream, from| {
                device.context().bind()?;
                // SAFETY: the piece lives until its event has passed; the part of the matrix
                // that starts at `to` is as long as its source.
                let code = unsafe {
                    sys::cuMemcpyHtoDAsync_v2(
                        to,
                        std::ptr::with_exposed_provenance(from as usize),
                        bytes.len(),
                        stream.handle(),
                    )
                };
                let what = || format!("copying {} bytes of weights", bytes.len());
                device.context().check(code, what)
            })?;
        }
        Ok(())
    }

    fn exl2(&mut self, linear: &Exl2Linear<'_>) -> Result<(), DeviceError> {
        let columns = linear.out_features();
        let mut first_word = 0;
        let mut groups = linear.groups();
        while let Some(first) = groups.first() {
            let bits = first.bits as usize;
            let count = groups.partition_point(|group| group.bits == first.bits);
            let words: usize = groups[..count].iter().map(|group| group.words()).sum();
            groups = &groups[count..];
            let block_words = bits * columns;
            let piece_blocks = (PIECE_BYTES / (block_words * 4)).max(1);
            let section = &linear.words()[first_word * columns..][..words * columns];
            for (piece, words) in section.chunks(piece_blocks * block_words).enumerate() {
                // A row of words is a unit of every tile.
                let units = first_word + piece * piece_blocks * bits;
                self.exl2_piece(words, columns, bits, units)?;
            }
            first_word += words;
        }
        let (tiles, groups) = (self.layout.tiles, self.layout.groups);
        let row_words = columns / 8;
        let piece_groups = (PIECE_BYTES / (row_words * 4)).max(1);
        for (piece, words) in linear
            .scale_words()
            .chunks(piece_groups * row_words)
            .enumerate()
        {
            let bytes: &[u8] = bytemuck::cast_slice(words);
            let group_count = words.len() / row_words;
            let scales = self.part(self.layout.scales + piece * piece_groups * 16);
            self.piece(
                bytes.len(),
                |memory| memory.copy_from_slice(bytes),
                |device, stream, words| {
                    let args = RepackExl2ScalesArgs {
                        words,
                        scales,
                        group_count: group_count as i32,
                        groups: groups as i32,
                        tiles: tiles as i32,
                        reserved: 0,
                    };
                    let threads = group_count * tiles * 8;
                    let launch = Launch::linear(threads.div_ceil(SCALE_THREADS), SCALE_THREADS);
                    let kernel = device.kernels().linear.repack_exl2_scales;
                    // SAFETY: the structure is the kernel's; the piece holds the groups' words,
                    // the matrix the scales of all its tiles and groups.
                    unsafe { device.launch_on(stream, kernel, launch, &args) }
                },
            )?;
        }
        Ok(())
    }

    /// Repacks whole blocks of one width, which start at unit `first_unit` of every tile.
    fn exl2_piece(
        &mut self,
        words: &[u32],
        columns: usize,
        bits: usize,
        first_unit: usize,
    ) -> Result<(), DeviceError> {
        let bytes: &[u8] = bytemuck::cast_slice(words);
        let blocks = words.len() / (bits * columns);
        let weights = self.part(first_unit * UNIT_BYTES);
        let tile_bytes = self.tile_bytes() as i64;
        let warps = blocks * self.layout.tiles;
        self.piece(
            bytes.len(),
            |memory| memory.copy_from_slice(bytes),
            |device, stream, words| {
                let args = RepackExl2Args {
                    words,
                    weights,
                    tile_bytes,
                    columns: columns as i32,
                    blocks: blocks as i32,
                    bits: bits as i32,
                    reserved: 0,
                };
                let kernel = device.kernels().linear.repack_exl2;
                // SAFETY: the structure is the kernel's; the piece holds the blocks' words, the
                // matrix these blocks of every tile.
                unsafe { device.launch_on(stream, kernel, repack_launch(warps), &args) }
            },
        )
    }

    /// Needs the permutation on the device.
    fn gptq(
        &mut self,
        linear: &GptqLinear<'_>,
        permutation: CUdeviceptr,
    ) -> Result<(), DeviceError> {
        let columns = linear.out_features();
        let word_rows = linear.in_features() / 8;
        let blocks = self.layout.blocks;
        let tile_bytes = self.tile_bytes();
        let piece_tiles = (PIECE_BYTES / (word_rows * TILE_OUTPUTS * 4)).max(1);
        for first_tile in (0..self.layout.tiles).step_by(piece_tiles) {
            let first = first_tile * TILE_OUTPUTS;
            let count = (columns - first).min(piece_tiles * TILE_OUTPUTS);
            let weights = self.part(first_tile * tile_bytes);
            let fill = |memory: &mut [u8]| {
                let rows = linear.words().chunks_exact(columns);
                for (memory, row) in memory.chunks_exact_mut(count * 4).zip(rows) {
                    memory.copy_from_slice(bytemuck::cast_slice(&row[first..first + count]));
                }
            };
            self.piece(word_rows * count * 4, fill, |device, stream, words| {
                let args = RepackGptqArgs {
                    words,
                    permutation,
                    weights,
                    tile_bytes: tile_bytes as i64,
                    columns: count as i32,
                    blocks: blocks as i32,
                };
                let launch = repack_launch(count.div_ceil(TILE_OUTPUTS) * blocks);
                let kernel = device.kernels().linear.repack_gptq;
                // SAFETY: the structure is the kernel's; the piece holds these columns, the
                // matrix these tiles; permutations are below the inputs.
                unsafe { device.launch_on(stream, kernel, launch, &args) }
            })?;
        }
        self.gptq_scales(linear)
    }

    fn gptq_scales(&mut self, linear: &GptqLinear<'_>) -> Result<(), DeviceError> {
        let columns = linear.out_features();
        let (tiles, groups) = (self.layout.tiles, self.layout.groups);
        let zero_offset = linear.zero_offset() as i32;
        let piece_groups = (PIECE_BYTES / (columns * 5)).max(1);
        let scale_rows = linear.scales().chunks(piece_groups * columns);
        let zero_rows = linear.zero_words().chunks(piece_groups * (columns / 8));
        for (piece, (scales, zeros)) in scale_rows.zip(zero_rows).enumerate() {
            let scales: &[u8] = bytemuck::cast_slice(scales);
            let zeros: &[u8] = bytemuck::cast_slice(zeros);
            let zeros_at = aligned(scales.len());
            let group_count = scales.len() / (columns * 2);
            let before = piece * piece_groups;
            let tile_scales = self.part(self.layout.scales + before * TILE_OUTPUTS * 2);
            let tile_zeros = self.part(self.layout.zeros + before * TILE_OUTPUTS);
            let fill = |memory: &mut [u8]| {
                memory[..scales.len()].copy_from_slice(scales);
                memory[zeros_at..].copy_from_slice(zeros);
            };
            self.piece(zeros_at + zeros.len(), fill, |device, stream, from| {
                let args = RepackGptqScalesArgs {
                    scales: from,
                    zero_words: from + zeros_at as u64,
                    tile_scales,
                    tile_zeros,
                    zero_offset,
                    group_count: group_count as i32,
                    groups: groups as i32,
                    columns: columns as i32,
                };
                let threads = group_count * tiles * 8;
                let launch = Launch::linear(threads.div_ceil(SCALE_THREADS), SCALE_THREADS);
                let kernel = device.kernels().linear.repack_gptq_scales;
                // SAFETY: the structure is the kernel's; the piece holds the groups' scales and
                // zeros, the matrix those of all its tiles and groups.
                unsafe { device.launch_on(stream, kernel, launch, &args) }
            })?;
        }
        Ok(())
    }

    /// Weights in fp16 and the factor that they stand for. Values beyond fp16 divide the whole
    /// matrix by a power of two.
    fn float(&mut self, linear: &FloatLinear<'_>) -> Result<f32, DeviceError> {
        let largest = self.float_scaled(linear, 1.0)?;
        if !largest.is_finite() {
            // Names the weight in its error.
            linear.to_f16_scaled()?;
        }
        let mut divisor = 1.0_f32;
        while largest.is_finite() && largest / divisor >= F16_OVERFLOW {
            divisor *= 2.0;
        }
        if divisor > 1.0 {
            self.float_scaled(linear, 1.0 / divisor)?;
        }
        Ok(linear.prescale() * divisor)
    }

    /// Repacks the values times `factor`; returns their largest magnitude without it.
    fn float_scaled(&mut self, linear: &FloatLinear<'_>, factor: f32) -> Result<f32, DeviceError> {
        let width = linear.in_features();
        let dtype = match linear.dtype() {
            DType::F16 => 0,
            DType::BF16 => 1,
            _ => 2,
        };
        let row_bytes = width * linear.dtype().size_bytes();
        let tile_rows = TILE_OUTPUTS * row_bytes;
        let piece_tiles = (PIECE_BYTES / tile_rows).max(1);
        let tile_bytes = self.tile_bytes();
        let blocks = self.layout.blocks;
        let largest = self.part(self.layout.largest);
        self.upload(&[0; 4], largest)?;
        for (piece, bytes) in linear.bytes().chunks(piece_tiles * tile_rows).enumerate() {
            let rows = bytes.len() / row_bytes;
            let weights = self.part(piece * piece_tiles * tile_bytes);
            let fill = |memory: &mut [u8]| memory.copy_from_slice(bytes);
            self.piece(bytes.len(), fill, |device, stream, values| {
                let args = RepackFloatArgs {
                    values,
                    weights,
                    largest,
                    tile_bytes: tile_bytes as i64,
                    rows: rows as i32,
                    width: width as i32,
                    dtype,
                    factor,
                };
                let launch = repack_launch(rows.div_ceil(TILE_OUTPUTS) * blocks);
                let kernel = device.kernels().linear.repack_float;
                // SAFETY: the structure is the kernel's; the piece holds the rows, the matrix
                // their tiles and the word for the largest.
                unsafe { device.launch_on(stream, kernel, launch, &args) }
            })?;
        }
        self.read_largest(largest)
    }

    fn read_largest(&mut self, largest: CUdeviceptr) -> Result<f32, DeviceError> {
        let mut bits = 0_u32;
        let context = self.device.context();
        context.bind()?;
        // SAFETY: one word on either side; the wait below keeps it.
        let code = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                (&raw mut bits).cast(),
                largest,
                size_of::<u32>(),
                self.loader.stream.handle(),
            )
        };
        context.check(code, || "reading the largest weight".to_owned())?;
        self.loader.stream.synchronize()?;
        Ok(f32::from_bits(bits))
    }

    /// Everything; returns the matrix' factor.
    fn run(
        &mut self,
        source: &LinearSource<'_>,
        blocks: &[BlockInfo],
        ranges: &RangeTable,
        permutation: &[u32],
    ) -> Result<f32, DeviceError> {
        self.upload(
            bytemuck::cast_slice(blocks),
            self.part(self.layout.block_table),
        )?;
        self.upload(
            bytemuck::cast_slice(&ranges.words),
            self.part(self.layout.range_table),
        )?;
        let order = self.part(self.layout.permutation);
        self.upload(bytemuck::cast_slice(permutation), order)?;
        let places = inverse(permutation);
        self.upload(bytemuck::cast_slice(&places), self.part(self.layout.places))?;
        if let Some(bias) = source.bias() {
            self.upload(bytemuck::cast_slice(&bias), self.part(self.layout.bias))?;
        }
        let scale = match source {
            LinearSource::Exl2(linear) => self.exl2(linear).map(|()| 1.0)?,
            LinearSource::Gptq(linear) => {
                let order = if permutation.is_empty() { 0 } else { order };
                self.gptq(linear, order).map(|()| 1.0)?
            }
            LinearSource::Float(linear) => self.float(linear)?,
        };
        self.loader.stream.synchronize()?;
        Ok(scale)
    }
}

/// The launch of `warps` repacking warps.
fn repack_launch(warps: usize) -> Launch {
    Launch::linear(warps.div_ceil(REPACK_WARPS), REPACK_WARPS * 32)
}

impl CudaDevice {
    /// Repacks `source` into `reservation`.
    pub(super) fn load(
        &self,
        source: &LinearSource<'_>,
        reservation: Reservation,
    ) -> Result<CudaLinear, DeviceError> {
        let header = source.header();
        let layout = Layout::new(&header);
        let needed = Bytes::from_usize(layout.total);
        self.check_reservation(|| format!("a linear of {header:?}"), needed, &reservation)?;
        let limits = self.limits();
        let plan = Plan::of(layout.blocks, limits.shared_bytes);
        let groups = groups(source);
        let blocks = block_table(&groups);
        let ranges = (layout.blocks <= MOST_BLOCKS)
            .then(|| RangeTable::new(&blocks, plan, matches!(source, LinearSource::Gptq(_))))
            .filter(|ranges| plan.can_be_divided(ranges.range_units, limits));
        let Some(ranges) = ranges else {
            return Err(DeviceError::Operation {
                device: self.context().id().clone(),
                operation: format!("loading a linear of {} inputs", header.in_features),
                reason: format!(
                    "a multiprocessor's {} of shared memory are too little for so many",
                    Bytes::from_usize(limits.shared_bytes)
                ),
            });
        };
        let buffer = CudaBuffer::allocate(self.context(), reservation)?;
        let order = permutation_of(source);
        let mut loader = self.loaders().take(self.context())?;
        let mut load = Load {
            device: self,
            loader: &mut loader,
            layout: &layout,
            address: buffer.address(),
        };
        // A loader that failed is dropped, when nothing reads its memory any more; so is the
        // buffer.
        let scale = match load.run(source, &blocks, &ranges, &order) {
            Ok(scale) => scale,
            Err(error) => {
                // Its failure is the one that is reported.
                let _ = loader.stream.synchronize();
                return Err(error);
            }
        };
        self.loaders().give_back(loader);
        let sections = section_ends(&groups);
        Ok(CudaLinear {
            in_features: header.in_features,
            out_features: header.out_features,
            matrix: layout.matrix(buffer.address(), &sections, scale),
            order: Order::new(
                &order,
                buffer.at(layout.permutation),
                buffer.at(layout.places),
            ),
            bias: header.bias.then(|| buffer.at(layout.bias)),
            plan,
            range_units: ranges.range_units,
            widest_bits: groups.iter().map(|group| group.bits).max().unwrap_or(0),
            layout,
            _memory: LinearMemory::Device(buffer),
        })
    }
}
