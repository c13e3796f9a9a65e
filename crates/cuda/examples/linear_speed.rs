//! Speed of products of few rows with EXL2 weights, next to what the memory gives.
//!
//! `linear_speed [SHAPE...]` measures llama2-7b, tinyllama-1b and codellama-34b, or those of them
//! that are named. Each launch reads other weights than the ones before, until there are more
//! than twice as many bytes between as the second-level cache has. Times are those of recorded
//! launches, with the kernel that prepares their rows (1 to 2 us) before each.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use half::f16;
use oxllama_backend::{
    DeviceMemory, DrawKinds, LinearOps, LinearOutput, NormLinears, SequenceKey, StepOps,
    WorkspaceShape,
};
use oxllama_cuda::{CudaBuffer, CudaDevice, CudaLinear, gpus};
use oxllama_format::{
    DType, FormatError, GptqConfig, LinearSource, TensorData, TensorInfo, TensorSource,
};
use oxllama_memory::{Bytes, Ledger, Purpose, Reservation};

/// Launches of one measurement, and how often it is repeated; the best counts.
const LAUNCHES: usize = 200;
const REPEATS: usize = 5;

const ROWS: [usize; 4] = [1, 8, 16, 32];

/// Rows of an EXL2 group.
const GROUP_ROWS: usize = 128;

/// Bytes that the bandwidth of memory is measured with.
const READ_BYTES: Bytes = Bytes::from_mib(2048);

/// What linears of one launch have in common.
#[derive(Debug, Clone, Copy)]
struct Product {
    name: &'static str,
    bits: usize,
    in_features: usize,
    out_features: &'static [usize],
}

const fn product(
    name: &'static str,
    bits: usize,
    in_features: usize,
    out_features: &'static [usize],
) -> Product {
    Product {
        name,
        bits,
        in_features,
        out_features,
    }
}

const SHAPES: [(&str, [Product; 5]); 3] = [
    (
        "llama2-7b",
        [
            product("q, k, v", 4, 4096, &[4096, 4096, 4096]),
            product("o", 4, 4096, &[4096]),
            product("gate, up", 4, 4096, &[11_008, 11_008]),
            product("down", 4, 11_008, &[4096]),
            product("head", 6, 4096, &[32_000]),
        ],
    ),
    (
        "tinyllama-1b",
        [
            product("q, k, v", 4, 2048, &[2048, 256, 256]),
            product("o", 4, 2048, &[2048]),
            product("gate, up", 4, 2048, &[5632, 5632]),
            product("down", 4, 5632, &[2048]),
            product("head", 6, 2048, &[32_000]),
        ],
    ),
    (
        "codellama-34b",
        [
            product("q, k, v", 4, 8192, &[8192, 1024, 1024]),
            product("o", 4, 8192, &[8192]),
            product("gate, up", 4, 8192, &[22_016, 22_016]),
            product("down", 4, 22_016, &[8192]),
            product("head", 6, 8192, &[32_000]),
        ],
    ),
];

/// The tensors of one EXL2 matrix of one width.
struct Matrix {
    tensors: BTreeMap<&'static str, (TensorInfo, Vec<u8>)>,
}

impl Matrix {
    fn new(bits: usize, in_features: usize, out_features: usize) -> Self {
        let groups = in_features.div_ceil(GROUP_ROWS);
        let words = in_features / 32 * bits;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |count: usize| -> Vec<u8> {
            let next = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state
            };
            std::iter::repeat_with(next)
                .flat_map(u64::to_le_bytes)
                .take(count)
                .collect()
        };
        let first_words = (0..groups).map(|group| group * GROUP_ROWS / 32 * bits);
        let table = first_words.flat_map(|word| [bits as u16, word as u16]);
        let mut matrix = Self {
            tensors: BTreeMap::new(),
        };
        for (name, dtype, shape, bytes) in [
            (
                "m.q_weight",
                DType::I32,
                vec![words, out_features],
                random(words * out_features * 4),
            ),
            (
                "m.q_scale",
                DType::I32,
                vec![groups, out_features / 8],
                random(groups * out_features / 2),
            ),
            (
                "m.q_scale_max",
                DType::F16,
                vec![groups],
                f16::from_f32(0.01).to_le_bytes().repeat(groups),
            ),
            (
                "m.q_groups",
                DType::I16,
                vec![2 * groups],
                table.flat_map(u16::to_le_bytes).collect(),
            ),
            (
                "m.q_invperm",
                DType::I32,
                vec![in_features],
                (0..in_features as u32).flat_map(u32::to_le_bytes).collect(),
            ),
        ] {
            let info = TensorInfo {
                name: name.to_owned(),
                dtype,
                shape,
            };
            matrix.tensors.insert(name, (info, bytes));
        }
        matrix
    }
}

impl TensorSource for Matrix {
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn infos(&self) -> Box<dyn Iterator<Item = &TensorInfo> + '_> {
        Box::new(self.tensors.values().map(|(info, _)| info))
    }

    fn read(&self, name: &str) -> Result<TensorData<'_>, FormatError> {
        let found = self.tensors.get(name);
        let (info, bytes) = found.ok_or_else(|| FormatError::MissingTensor {
            path: self.file_of(name).to_path_buf(),
            tensor: name.to_owned(),
            expected: "a tensor of a measured matrix".to_owned(),
        })?;
        Ok(TensorData {
            info: info.clone(),
            bytes: bytes.as_slice().into(),
        })
    }

    fn file_of(&self, _name: &str) -> &Path {
        Path::new("random")
    }
}

/// Copies of the matrices of one launch, and the bytes of all matrices of one copy.
type Loaded = (Vec<Vec<CudaLinear>>, usize);

/// A device and what its memory gives.
struct Bench {
    device: CudaDevice,
    ledger: Ledger,
    l2_bytes: usize,
    bytes_per_second: f64,
}

impl Bench {
    fn reserve(&self, bytes: Bytes) -> Result<Reservation, Box<dyn Error>> {
        let device = self.device.id();
        Ok(self
            .ledger
            .reserve(device, "linear_speed", Purpose::Weights, bytes)?)
    }

    fn floats(&self, count: usize) -> Result<CudaBuffer, Box<dyn Error>> {
        let bytes = Bytes::from_usize(count * size_of::<f32>());
        Ok(self.device.allocate(self.reserve(bytes)?)?)
    }

    /// As many copies of the matrices as fill the cache twice.
    fn load(&self, product: &Product) -> Result<Loaded, Box<dyn Error>> {
        let outputs = product.out_features.iter();
        let matrices: Vec<Matrix> = outputs
            .map(|&out| Matrix::new(product.bits, product.in_features, out))
            .collect();
        let weights = product.in_features * product.out_features.iter().sum::<usize>();
        // Scales have four bits a group and output.
        let bytes = weights * product.bits / 8 + weights / GROUP_ROWS / 2;
        let copies = (2 * self.l2_bytes).div_ceil(bytes) + 1;
        let gptq = GptqConfig::default();
        let mut loaded = Vec::new();
        for _ in 0..copies {
            let mut copy = Vec::new();
            for matrix in &matrices {
                let source = LinearSource::load(matrix, "m", &gptq, 1.0)?;
                let reservation = self.reserve(self.device.linear_bytes(&source.header()))?;
                copy.push(self.device.load_linear(&source, reservation)?);
            }
            loaded.push(copy);
        }
        Ok((loaded, bytes))
    }

    fn measure(&self, product: &Product) -> Result<(), Box<dyn Error>> {
        let (copies, bytes) = self.load(product)?;
        for rows in ROWS {
            let seconds = self.time(product, &copies, rows)?;
            let rate = bytes as f64 / seconds;
            say(&format!(
                "  {:9} {:6} -> {:15} {} bit, {rows:2} rows: {:7.2} us, {:5.0} GB/s, {:3.0}%",
                product.name,
                product.in_features,
                format!("{:?}", product.out_features),
                product.bits,
                seconds * 1e6,
                rate / 1e9,
                100.0 * rate / self.bytes_per_second,
            ));
        }
        Ok(())
    }

    /// Seconds of one launch.
    fn time(
        &self,
        product: &Product,
        copies: &[Vec<CudaLinear>],
        rows: usize,
    ) -> Result<f64, Box<dyn Error>> {
        let widest = product.out_features.iter().max().copied();
        let shape = WorkspaceShape {
            rows,
            sequences: 1,
            pages_per_sequence: 1,
            max_in_features: product.in_features,
            max_out_features: widest.unwrap_or(0),
            draw_width: 0,
            heads: 1,
            kv_heads: 1,
            head_dim: 32,
            rotary_dim: 0,
            ropes: 0,
        };
        let reservation = self.reserve(self.device.workspace_bytes(&shape))?;
        let mut workspace = self.device.create_workspace(&shape, reservation)?;
        let recordings = self.device.recording_bytes(&shape, LAUNCHES / 10);
        let recordings = self.reserve(recordings)?;
        self.device.record_within(recordings, &mut workspace)?;
        let x = self.floats(rows * product.in_features)?;
        let mut normed = self.floats(rows * product.in_features)?;
        let mut outs = Vec::new();
        for out_features in product.out_features {
            outs.push(self.floats(rows * out_features)?);
        }
        let key = SequenceKey {
            rows,
            logit_rows: 0,
            draws: DrawKinds::None,
            generation: 0,
        };
        let mut best = f64::INFINITY;
        // The first pass loads the kernels, the second records.
        for repeat in 0..REPEATS + 2 {
            self.device.synchronize()?;
            let start = Instant::now();
            self.device
                .sequence(Some(key), &mut workspace, |workspace| {
                    for copy in copies.iter().cycle().take(LAUNCHES) {
                        let pairs = copy.iter().zip(&mut outs);
                        let mut linears: Vec<_> = pairs
                            .map(|(weights, out)| LinearOutput { weights, out })
                            .collect();
                        let args = NormLinears {
                            norm: None,
                            x: &x,
                            normed: &mut normed,
                            linears: &mut linears,
                            rows,
                        };
                        self.device.norm_linears(args, workspace)?;
                    }
                    Ok::<(), oxllama_backend::DeviceError>(())
                })?;
            self.device.synchronize()?;
            if repeat >= 2 {
                best = best.min(start.elapsed().as_secs_f64() / LAUNCHES as f64);
            }
        }
        Ok(best)
    }
}

fn run(names: &[String]) -> Result<(), Box<dyn Error>> {
    for gpu in gpus()? {
        let device = CudaDevice::open(&gpu)?;
        let ledger = Ledger::for_device(device.id().clone(), device.free_memory()?);
        let purpose = Purpose::Workspace;
        let reservation = ledger.reserve(device.id(), "linear_speed", purpose, READ_BYTES)?;
        let bytes_per_second = device.measure_read_bandwidth(reservation)?;
        say(&format!(
            "{}: {}, reads {:.0} GB/s",
            gpu.id,
            gpu.name,
            bytes_per_second / 1e9
        ));
        let bench = Bench {
            device,
            ledger,
            l2_bytes: gpu.l2_cache.get() as usize,
            bytes_per_second,
        };
        for (name, products) in &SHAPES {
            if names.is_empty() || names.iter().any(|wanted| wanted == name) {
                say(name);
                for product in products {
                    bench.measure(product)?;
                }
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let known = |name: &String| SHAPES.iter().any(|(shape, _)| shape == name);
    if let Some(unknown) = names.iter().find(|name| !known(name)) {
        say(&format!(
            "unknown shape {unknown}: use {}",
            SHAPES.map(|(name, _)| name).join(", ")
        ));
        return ExitCode::from(2);
    }
    match run(&names) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "a program that reports")]
fn say(line: &str) {
    println!("{line}");
}
