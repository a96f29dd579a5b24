//! Tensors of any form, in memory of exactly their size.

use arbitrary::Arbitrary;
use half::{bf16, f16};
use polymla::tensor::contiguous_strides;
use polymla::{DType, MlaError, TensorView, TensorViewMut};

/// How one tensor departs from the plain one.
#[derive(Arbitrary, Debug, Clone)]
pub enum Form {
    Dense,
    /// Gaps of these many elements after each dimension.
    Gaps([u8; 4]),
    /// Dimensions ordered by these keys, gaps of one element.
    Permuted([u8; 4]),
    /// Any strides.
    Strides([u16; 4]),
    /// One stride is enormous.
    Huge(u8, u64),
    /// One dimension is longer or shorter.
    Shape(u8, i8),
    /// The memory is too small by so many elements.
    Short(u8),
    /// Another element type.
    Type(u8),
}

/// Memory of exactly `len` elements.
enum Memory {
    Bf16(Box<[bf16]>),
    F16(Box<[f16]>),
    F32(Box<[f32]>),
    I32(Box<[i32]>),
}

pub struct Tensor {
    memory: Memory,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// Most elements a tensor may take; beyond, its memory is too small and the view says so.
const MOST: usize = 1 << 17;

fn extent(shape: &[usize], strides: &[usize]) -> usize {
    if shape.contains(&0) {
        return 0;
    }
    let last: u128 = shape.iter().zip(strides).map(|(n, s)| (*n as u128 - 1) * *s as u128).sum();
    usize::try_from(last + 1).unwrap_or(usize::MAX).min(MOST)
}

impl Tensor {
    /// `inner`: the last dimension stays innermost, as rows of inputs must be.
    pub fn new(dtype: DType, shape: &[usize], form: &Form, inner: bool) -> Tensor {
        let (mut dtype, mut shape, mut short) = (dtype, shape.to_vec(), 0);
        let rank = shape.len();
        if let Form::Shape(dim, change) = form {
            let n = &mut shape[*dim as usize % rank];
            *n = n.saturating_add_signed(isize::from(*change % 3));
        }
        let mut strides = contiguous_strides(&shape)[..rank].to_vec();
        match form {
            Form::Dense | Form::Shape(..) => {}
            Form::Gaps(gaps) => {
                for d in (0..rank.saturating_sub(1)).rev() {
                    strides[d] =
                        strides[d + 1].saturating_mul(shape[d + 1].max(1)).saturating_add(gaps[d] as usize % 8);
                }
            }
            Form::Permuted(keys) => {
                let mut order: Vec<usize> = (0..rank).collect();
                order.sort_by_key(|d| if inner && *d + 1 == rank { -1 } else { i32::from(keys[*d]) });
                let mut stride = 1;
                for d in order {
                    strides[d] = stride;
                    stride = stride.saturating_mul(shape[d].max(1)).saturating_add(1);
                }
            }
            Form::Strides(any) => strides.iter_mut().zip(any).for_each(|(s, a)| *s = *a as usize % 700),
            Form::Huge(dim, stride) => strides[*dim as usize % rank] = *stride as usize,
            Form::Short(n) => short = *n as usize,
            Form::Type(t) => dtype = [DType::Bf16, DType::F16, DType::F32, DType::I32][*t as usize % 4],
        }
        let len = extent(&shape, &strides).saturating_sub(short);
        let memory = match dtype {
            DType::Bf16 => Memory::Bf16(vec![bf16::NAN; len].into()),
            DType::F16 => Memory::F16(vec![f16::NAN; len].into()),
            DType::F32 => Memory::F32(vec![f32::NAN; len].into()),
            _ => Memory::I32(vec![i32::MAX - 3; len].into()),
        };
        Tensor { memory, shape, strides }
    }

    pub fn view(&self, name: &'static str) -> Result<TensorView<'_>, MlaError> {
        match &self.memory {
            Memory::Bf16(m) => TensorView::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::F16(m) => TensorView::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::F32(m) => TensorView::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::I32(m) => TensorView::from_slice_strided(name, m, &self.shape, &self.strides),
        }
    }

    pub fn view_mut(&mut self, name: &'static str) -> Result<TensorViewMut<'_>, MlaError> {
        match &mut self.memory {
            Memory::Bf16(m) => TensorViewMut::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::F16(m) => TensorViewMut::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::F32(m) => TensorViewMut::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::I32(m) => TensorViewMut::from_slice_strided(name, m, &self.shape, &self.strides),
        }
    }

    pub fn at(&self, index: &[usize]) -> usize {
        let wide: u128 = index.iter().zip(&self.strides).map(|(i, s)| *i as u128 * *s as u128).sum();
        usize::try_from(wide).unwrap_or(usize::MAX)
    }

    pub fn set(&mut self, index: &[usize], x: f64) {
        if index.iter().zip(&self.shape).any(|(i, n)| i >= n) {
            return;
        }
        let at = self.at(index);
        match &mut self.memory {
            Memory::Bf16(m) => m.get_mut(at).map_or((), |e| *e = bf16::from_f64(x)),
            Memory::F16(m) => m.get_mut(at).map_or((), |e| *e = f16::from_f64(x)),
            Memory::F32(m) => m.get_mut(at).map_or((), |e| *e = x as f32),
            Memory::I32(m) => m.get_mut(at).map_or((), |e| *e = x as i32),
        }
    }

    pub fn untouched(&self) -> bool {
        match &self.memory {
            Memory::Bf16(m) => m.iter().all(|x| x.is_nan()),
            Memory::F16(m) => m.iter().all(|x| x.is_nan()),
            Memory::F32(m) => m.iter().all(|x| x.is_nan()),
            Memory::I32(m) => m.iter().all(|x| *x == i32::MAX - 3),
        }
    }
}
