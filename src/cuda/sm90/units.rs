// Which compilations make the kernels of this backend: name, source file, defines. Included by build.rs too.

use super::Unit;

pub(crate) const UNITS: &[Unit] =
    &[("schedule", "schedule.cu", &[]), ("combine", "combine.cu", &[]), ("decode", "decode.cu", &[])];
