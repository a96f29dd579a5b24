//! Tensors that own their memory, and outputs whose memory is poisoned before a run.

use half::{bf16, f16};

use crate::call::Outputs;
use crate::error::{MlaError, Result};
use crate::problem::Problem;
use crate::tensor::{DType, TensorView, TensorViewMut, contiguous_strides};

/// A host tensor that owns its memory. Its address is aligned for its elements and for nothing more.
#[derive(Debug, Clone)]
pub struct HostTensor {
    // u64, so that the memory is aligned for every element type.
    words: Vec<u64>,
    dtype: DType,
    start: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// Elements from the first to the end of the last one.
fn extent(param: &'static str, shape: &[usize], strides: &[usize]) -> Result<usize> {
    let overflow = || MlaError::Overflow {
        param,
        value: format!("shape {shape:?} x strides {strides:?}"),
        limit: isize::MAX as u64 / 8,
    };
    if shape.contains(&0) {
        return Ok(0);
    }
    let mut last = 0usize;
    for (n, stride) in shape.iter().zip(strides) {
        let step = (n - 1).checked_mul(*stride).ok_or_else(overflow)?;
        last = last.checked_add(step).ok_or_else(overflow)?;
    }
    last.checked_add(1).filter(|e| *e <= isize::MAX as usize / 8).ok_or_else(overflow)
}

impl HostTensor {
    /// A tensor without gaps, from the bytes of its elements.
    ///
    /// # Errors
    /// [`MlaError::Overflow`]; [`MlaError::StrideOverrun`] where `bytes` is too short.
    pub fn from_bytes(param: &'static str, dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<Self> {
        let dense = contiguous_strides(shape);
        let mut tensor = Self::filled(param, dtype, shape, &dense[..shape.len().min(dense.len())], 0, &[0; 4])?;
        let needed = extent(param, shape, &tensor.strides)? * dtype.size();
        if bytes.len() < needed {
            return Err(MlaError::StrideOverrun { param, value: needed as u64, limit: bytes.len() as u64 });
        }
        tensor.bytes_mut()[..needed].copy_from_slice(&bytes[..needed]);
        Ok(tensor)
    }

    /// A tensor without gaps, from 32-bit integers.
    ///
    /// # Errors
    /// As [`from_bytes`](Self::from_bytes).
    pub fn from_i32(param: &'static str, shape: &[usize], values: &[i32]) -> Result<Self> {
        Self::from_bytes(param, DType::I32, shape, bytemuck::cast_slice(values))
    }

    /// A tensor with strides whose elements and gaps all hold `pattern` (its first bytes, as many as an element has),
    /// beginning `start` elements into its memory.
    ///
    /// # Errors
    /// [`MlaError::Rank`], [`MlaError::Overflow`].
    pub fn filled(
        param: &'static str,
        dtype: DType,
        shape: &[usize],
        strides: &[usize],
        start: usize,
        pattern: &[u8; 4],
    ) -> Result<Self> {
        if strides.len() != shape.len() {
            return Err(MlaError::Rank { param, value: strides.len(), limit: shape.len() });
        }
        let elements = extent(param, shape, strides)?.saturating_add(start);
        let words = elements.saturating_mul(dtype.size()).div_ceil(8);
        let word = match dtype.size() {
            2 => [pattern[0], pattern[1], pattern[0], pattern[1]],
            _ => *pattern,
        };
        let half_word = u64::from(u32::from_ne_bytes(word));
        let words = vec![half_word << 32 | half_word; words];
        Ok(HostTensor { words, dtype, start, shape: shape.to_vec(), strides: strides.to_vec() })
    }

    /// Its element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// Strides in elements, outermost first.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    /// The memory from the first element on, gaps included.
    pub fn bytes(&self) -> &[u8] {
        let bytes: &[u8] = bytemuck::cast_slice(&self.words);
        &bytes[(self.start * self.dtype.size()).min(bytes.len())..]
    }
    /// As [`bytes`](Self::bytes), for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let start = self.start * self.dtype.size();
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.words);
        let start = start.min(bytes.len());
        &mut bytes[start..]
    }

    /// The tensor to be read by a call.
    ///
    /// # Errors
    /// [`MlaError::Rank`].
    pub fn view(&self, param: &'static str) -> Result<TensorView<'_>> {
        let (shape, strides) = (&self.shape, &self.strides);
        match self.dtype {
            DType::Bf16 => TensorView::from_slice_strided::<bf16>(param, slice(self.bytes()), shape, strides),
            DType::F16 => TensorView::from_slice_strided::<f16>(param, slice(self.bytes()), shape, strides),
            DType::F32 => TensorView::from_slice_strided::<f32>(param, slice(self.bytes()), shape, strides),
            DType::I32 => TensorView::from_slice_strided::<i32>(param, slice(self.bytes()), shape, strides),
        }
    }

    /// The tensor to be written by a call.
    ///
    /// # Errors
    /// [`MlaError::Rank`].
    pub fn view_mut(&mut self, param: &'static str) -> Result<TensorViewMut<'_>> {
        let (shape, strides) = (self.shape.clone(), self.strides.clone());
        let dtype = self.dtype;
        let bytes = self.bytes_mut();
        match dtype {
            DType::Bf16 => TensorViewMut::from_slice_strided::<bf16>(param, slice_mut(bytes), &shape, &strides),
            DType::F16 => TensorViewMut::from_slice_strided::<f16>(param, slice_mut(bytes), &shape, &strides),
            DType::F32 => TensorViewMut::from_slice_strided::<f32>(param, slice_mut(bytes), &shape, &strides),
            DType::I32 => TensorViewMut::from_slice_strided::<i32>(param, slice_mut(bytes), &shape, &strides),
        }
    }

    /// Calls `body` with the index of every element and its byte offset within [`bytes`](Self::bytes), in row-major
    /// order.
    pub fn for_each_offset(&self, mut body: impl FnMut(&[usize], usize)) {
        if self.shape.contains(&0) {
            return;
        }
        let mut index = vec![0; self.shape.len()];
        loop {
            let element: usize = index.iter().zip(&self.strides).map(|(i, s)| i * s).sum();
            body(&index, element * self.dtype.size());
            let mut dim = index.len();
            loop {
                if dim == 0 {
                    return;
                }
                dim -= 1;
                index[dim] += 1;
                if index[dim] < self.shape[dim] {
                    break;
                }
                index[dim] = 0;
            }
        }
    }

    /// Every element as f64, in row-major order without gaps.
    pub fn to_f64(&self) -> Vec<f64> {
        let bytes = self.bytes();
        let mut values = Vec::with_capacity(self.shape.iter().product());
        self.for_each_offset(|_, at| values.push(element_f64(self.dtype, &bytes[at..])));
        values
    }

    /// Every element's bytes, in row-major order without gaps.
    pub fn to_dense_bytes(&self) -> Vec<u8> {
        let (bytes, size) = (self.bytes(), self.dtype.size());
        let mut dense = Vec::with_capacity(self.shape.iter().product::<usize>() * size);
        self.for_each_offset(|_, at| dense.extend_from_slice(&bytes[at..at + size]));
        dense
    }

    /// Stores `value`, rounded to the element type, at an index. Nothing happens outside the shape.
    pub fn set(&mut self, index: &[usize], value: f64) {
        if index.len() != self.shape.len() || index.iter().zip(&self.shape).any(|(i, n)| i >= n) {
            return;
        }
        let element: usize = index.iter().zip(&self.strides).map(|(i, s)| i * s).sum();
        let (at, dtype) = (element * self.dtype.size(), self.dtype);
        let bytes = &mut self.bytes_mut()[at..];
        match dtype {
            DType::I32 => bytes[..4].copy_from_slice(&(value as i32).to_ne_bytes()),
            _ => store(dtype, &mut bytes[..dtype.size()], value as f32),
        }
    }

    /// Sets every element to what `value` says for its index.
    pub(super) fn fill(&mut self, mut value: impl FnMut(&[usize]) -> f32) {
        let (size, dtype) = (self.dtype.size(), self.dtype);
        let mut stores = Vec::new();
        self.for_each_offset(|index, at| stores.push((at, value(index))));
        let bytes = self.bytes_mut();
        for (at, x) in stores {
            store(dtype, &mut bytes[at..at + size], x);
        }
    }

    /// Copies columns `columns` of the last dimension into a new tensor of the same sizes otherwise, with the strides
    /// that `strides` derives from the new shape, gaps filled with `gap`.
    pub(super) fn columns(
        &self,
        param: &'static str,
        columns: std::ops::Range<usize>,
        strides: impl FnOnce(&[usize]) -> Vec<usize>,
        gap: &[u8; 4],
    ) -> Result<Self> {
        let mut shape = self.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = columns.len();
        }
        let mut to = Self::filled(param, self.dtype, &shape, &strides(&shape), 0, gap)?;
        to.paste(self, columns.start, 0);
        Ok(to)
    }

    /// Copies what `from` has from its column `from_column` on into this tensor's columns from `to_column` on, as far
    /// as both reach. The other dimensions must agree.
    pub(super) fn paste(&mut self, from: &HostTensor, from_column: usize, to_column: usize) {
        let last = self.shape.len() - 1;
        let count = (self.shape[last] - to_column).min(from.shape[last] - from_column);
        let (size, source) = (self.dtype.size(), from.bytes());
        let rows = HostTensor { words: vec![], shape: self.shape[..last].to_vec(), ..self.clone_header() };
        let mut copies = Vec::new();
        rows.for_each_offset(|index, _| {
            let offset = |t: &HostTensor| -> usize { index.iter().zip(&t.strides).map(|(i, s)| i * s).sum() };
            copies
                .push((offset(from) + from_column * from.strides[last], offset(self) + to_column * self.strides[last]));
        });
        let (from_step, to_step) = (from.strides[last], self.strides[last]);
        let target = self.bytes_mut();
        for (from_at, to_at) in copies {
            for c in 0..count {
                let (a, b) = ((from_at + c * from_step) * size, (to_at + c * to_step) * size);
                target[b..b + size].copy_from_slice(&source[a..a + size]);
            }
        }
    }

    fn clone_header(&self) -> HostTensor {
        HostTensor { words: vec![], dtype: self.dtype, start: 0, shape: vec![], strides: self.strides.clone() }
    }
}

/// The bytes as elements; what is left over at the end is cut off.
fn slice<T: bytemuck::Pod>(bytes: &[u8]) -> &[T] {
    bytemuck::cast_slice(&bytes[..bytes.len() / size_of::<T>() * size_of::<T>()])
}

fn slice_mut<T: bytemuck::Pod>(bytes: &mut [u8]) -> &mut [T] {
    let whole = bytes.len() / size_of::<T>() * size_of::<T>();
    bytemuck::cast_slice_mut(&mut bytes[..whole])
}

fn store(dtype: DType, bytes: &mut [u8], value: f32) {
    match dtype {
        DType::Bf16 => bytes.copy_from_slice(&bf16::from_f32(value).to_ne_bytes()),
        DType::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_ne_bytes()),
        DType::F32 => bytes.copy_from_slice(&value.to_ne_bytes()),
        DType::I32 => bytes.copy_from_slice(&(value as i32).to_ne_bytes()),
    }
}

fn element_f64(dtype: DType, bytes: &[u8]) -> f64 {
    match dtype {
        DType::Bf16 => bf16::from_ne_bytes([bytes[0], bytes[1]]).to_f64(),
        DType::F16 => f16::from_ne_bytes([bytes[0], bytes[1]]).to_f64(),
        DType::F32 => f64::from(f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
        DType::I32 => f64::from(i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
    }
}

/// A signalling NaN, which arithmetic does not make: found after a run, the element was not written.
pub(super) fn poison(dtype: DType) -> [u8; 4] {
    match dtype {
        DType::Bf16 => 0x7F9A_7F9Au32.to_ne_bytes(),
        DType::F16 => 0x7D5A_7D5Au32.to_ne_bytes(),
        DType::F32 => 0x7F9A_5A5Au32.to_ne_bytes(),
        DType::I32 => 0x5A5A_5A5Au32.to_ne_bytes(),
    }
}

/// The outputs of one call, every byte of them poison until a backend writes there.
#[derive(Debug, Clone)]
pub struct PoisonedOutputs {
    /// [b, s_q, h_q, head_dim_v].
    pub out: HostTensor,
    /// [b, h_q, s_q] f32.
    pub lse: HostTensor,
}

impl PoisonedOutputs {
    /// Outputs without gaps.
    ///
    /// # Errors
    /// [`MlaError::Overflow`].
    pub fn dense(problem: &Problem) -> Result<Self> {
        let out = [problem.b(), problem.s_q(), problem.h_q(), problem.head_dim_v()];
        let lse = [problem.b(), problem.h_q(), problem.s_q()];
        Self::strided(problem, &contiguous_strides(&out)[..4], &contiguous_strides(&lse)[..3])
    }

    /// Outputs with strides.
    ///
    /// # Errors
    /// [`MlaError::Rank`], [`MlaError::Overflow`].
    pub fn strided(problem: &Problem, out_strides: &[usize], lse_strides: &[usize]) -> Result<Self> {
        let out = [problem.b(), problem.s_q(), problem.h_q(), problem.head_dim_v()];
        let lse = [problem.b(), problem.h_q(), problem.s_q()];
        let dtype = problem.dtype();
        Ok(PoisonedOutputs {
            out: HostTensor::filled("out", dtype, &out, out_strides, 0, &poison(dtype))?,
            lse: HostTensor::filled("lse", DType::F32, &lse, lse_strides, 0, &poison(DType::F32))?,
        })
    }

    /// What a backend writes to.
    ///
    /// # Errors
    /// [`MlaError::Rank`].
    pub fn outputs(&mut self) -> Result<Outputs<'_>> {
        Ok(Outputs { out: self.out.view_mut("out")?, lse: self.lse.view_mut("lse")? })
    }

    /// Whether every byte still is as it was made: what must hold after an error.
    pub fn untouched(&self) -> bool {
        [&self.out, &self.lse].into_iter().all(|t| {
            let pattern = &poison(t.dtype)[..t.dtype.size()];
            t.bytes().chunks_exact(pattern.len()).all(|c| c == pattern)
        })
    }

    /// Checks that every element was written and nothing between the elements was.
    ///
    /// # Errors
    /// A sentence that names the first offender and the count.
    pub fn check_written(&self) -> std::result::Result<(), String> {
        for (name, tensor) in [("out", &self.out), ("lse", &self.lse)] {
            let size = tensor.dtype.size();
            let pattern = &poison(tensor.dtype)[..size];
            let bytes = tensor.bytes();
            let mut inside = vec![false; bytes.len() / size];
            let mut unwritten: Option<Vec<usize>> = None;
            let mut count = 0usize;
            tensor.for_each_offset(|index, at| {
                inside[at / size] = true;
                if bytes[at..at + size] == *pattern {
                    count += 1;
                    unwritten.get_or_insert_with(|| index.to_vec());
                }
            });
            if let Some(index) = unwritten {
                return Err(format!("{name} has {count} unwritten elements, the first at {index:?}"));
            }
            let gaps = bytes.chunks_exact(size).zip(&inside).enumerate();
            let mut bad = gaps.filter(|(_, (b, inside))| !**inside && *b != pattern).map(|(i, _)| i);
            if let Some(first) = bad.next() {
                let more = bad.count();
                return Err(format!(
                    "{name}: {} elements of the gaps between its rows were written, the first at offset {first}",
                    more + 1
                ));
            }
        }
        Ok(())
    }
}
