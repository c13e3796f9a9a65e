//! Finding and reading single tensors with the checks that every format needs.

use std::borrow::Cow;

use half::{bf16, f16};

use crate::mmap::cast_bytes;
use crate::{DType, FormatError, TensorInfo, TensorSource};

/// Element types that plain weights, norms and biases may have.
pub(crate) const FLOATS: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

/// What the header says of `name`; `None` if the source has no such tensor.
///
/// # Errors
/// The tensor exists but cannot be used (an element type that is not read here).
pub(crate) fn lookup<'s>(
    source: &'s dyn TensorSource,
    name: &str,
) -> Result<Option<&'s TensorInfo>, FormatError> {
    if let Some(info) = source.info(name) {
        return Ok(Some(info));
    }
    match source.read(name) {
        Ok(_) | Err(FormatError::MissingTensor { .. }) => Ok(None),
        Err(unusable) => Err(unusable),
    }
}

/// What the header says of `name`, whose element type must be one of `dtypes`.
pub(crate) fn require<'s>(
    source: &'s dyn TensorSource,
    name: &str,
    dtypes: &[DType],
    why: &str,
) -> Result<&'s TensorInfo, FormatError> {
    let Some(info) = lookup(source, name)? else {
        return Err(FormatError::MissingTensor {
            path: source.file_of(name).to_path_buf(),
            tensor: name.to_owned(),
            expected: format!("expected {why}"),
        });
    };
    if !dtypes.contains(&info.dtype) {
        return Err(FormatError::wrong_dtype(
            source.file_of(name),
            name,
            info.dtype,
            dtypes,
        ));
    }
    Ok(info)
}

/// Like [`require`], and the shape must be `shape`.
pub(crate) fn require_shape(
    source: &dyn TensorSource,
    name: &str,
    dtypes: &[DType],
    shape: &[usize],
    why: &str,
) -> Result<(), FormatError> {
    let info = require(source, name, dtypes, why)?;
    if info.shape != shape {
        let expected = format!("{shape:?} ({why})");
        return Err(FormatError::wrong_shape(
            source.file_of(name),
            name,
            &info.shape,
            expected,
        ));
    }
    Ok(())
}

/// The two extents of a matrix, neither of them zero.
pub(crate) fn require_matrix(
    source: &dyn TensorSource,
    name: &str,
    dtypes: &[DType],
    why: &str,
) -> Result<(usize, usize), FormatError> {
    let info = require(source, name, dtypes, why)?;
    match info.shape[..] {
        [rows, columns] if rows > 0 && columns > 0 => Ok((rows, columns)),
        _ => Err(FormatError::wrong_shape(
            source.file_of(name),
            name,
            &info.shape,
            format!("two dimensions, neither of them 0 ({why})"),
        )),
    }
}

/// The tensor's bytes as 32-bit words; its element type has been checked.
pub(crate) fn read_words<'s>(
    source: &'s dyn TensorSource,
    name: &str,
) -> Result<Cow<'s, [u32]>, FormatError> {
    Ok(cast_bytes(source.read(name)?.bytes))
}

/// Decodes elements of an F16, BF16 or F32 tensor to f32, which is exact.
///
/// # Panics
/// If `dtype` is another one; callers have checked it.
pub(crate) fn floats_to_f32(dtype: DType, bytes: Cow<'_, [u8]>) -> Vec<f32> {
    use half::slice::HalfFloatSliceExt;
    match dtype {
        DType::F16 => {
            let halves = cast_bytes::<f16>(bytes);
            let mut values = vec![0.0; halves.len()];
            halves.convert_to_f32_slice(&mut values);
            values
        }
        DType::BF16 => cast_bytes::<bf16>(bytes)
            .iter()
            .map(|value| value.to_f32())
            .collect(),
        DType::F32 => cast_bytes::<f32>(bytes).into_owned(),
        other => unreachable!("{other} is not one of the float types that are read"),
    }
}

/// Reads a vector (a norm's weight, a bias) of F16, BF16 or F32 as f32.
///
/// # Errors
/// Missing, another element type, not of shape `[expected_len]`, or a value that is not finite.
pub fn read_vector_f32(
    source: &dyn TensorSource,
    name: &str,
    expected_len: usize,
) -> Result<Vec<f32>, FormatError> {
    require_shape(
        source,
        name,
        &FLOATS,
        &[expected_len],
        "one value per feature",
    )?;
    read_finite(source, name)
}

/// Reads a query or key norm as f32 `[heads, head_dim]`.
///
/// It is stored as `[head_dim]` (then repeated here for every head), or as
/// `[heads, head_dim]`, which is how EXL2 files carry it.
///
/// # Errors
/// Missing, another element type or shape, or a value that is not finite.
pub fn read_head_norm_f32(
    source: &dyn TensorSource,
    name: &str,
    heads: usize,
    head_dim: usize,
) -> Result<Vec<f32>, FormatError> {
    let info = require(source, name, &FLOATS, "norm of each attention head")?;
    if info.shape == [head_dim] {
        return Ok(read_finite(source, name)?.repeat(heads));
    }
    if info.shape == [heads, head_dim] {
        return read_finite(source, name);
    }
    Err(FormatError::wrong_shape(
        source.file_of(name),
        name,
        &info.shape,
        format!("[{head_dim}] or [{heads}, {head_dim}]"),
    ))
}

/// Reads a float tensor as f32 and refuses NaN and infinity.
fn read_finite(source: &dyn TensorSource, name: &str) -> Result<Vec<f32>, FormatError> {
    let data = source.read(name)?;
    let values = floats_to_f32(data.info.dtype, data.bytes);
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(index) => Err(FormatError::invalid_tensor(
            source.file_of(name),
            name,
            format!("element {index}"),
            values[index],
            "a finite number",
        )),
    }
}

/// The optional bias `{key}.bias` of a linear with `out_features` outputs, times `prescale`.
pub(crate) fn read_bias(
    source: &dyn TensorSource,
    key: &str,
    out_features: usize,
    prescale: f32,
) -> Result<Option<Vec<f32>>, FormatError> {
    let name = format!("{key}.bias");
    if lookup(source, &name)?.is_none() {
        return Ok(None);
    }
    let mut bias = read_vector_f32(source, &name, out_features)?;
    if prescale != 1.0 {
        bias.iter_mut().for_each(|value| *value *= prescale);
    }
    Ok(Some(bias))
}

/// Whether `{key}.bias` exists, with its element type and shape checked.
pub(crate) fn has_bias(
    source: &dyn TensorSource,
    key: &str,
    out_features: usize,
) -> Result<bool, FormatError> {
    let name = format!("{key}.bias");
    if lookup(source, &name)?.is_none() {
        return Ok(false);
    }
    require_shape(
        source,
        &name,
        &FLOATS,
        &[out_features],
        "one value per output",
    )?;
    Ok(true)
}
