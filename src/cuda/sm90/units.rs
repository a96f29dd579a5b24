// Which compilations make the kernels of this backend: name, source file, defines. Included by build.rs too.

use super::Unit;

macro_rules! decode {
    ($name:literal, $elem:literal, $rope:literal, $form:literal) => {
        (
            concat!("decode_", $name),
            "decode.cu",
            &[
                concat!("POLYMLA_DECODE_NAME=polymla_decode_", $name),
                concat!("POLYMLA_DECODE_ELEM=", $elem),
                concat!("POLYMLA_DECODE_ROPE=", $rope),
                concat!("POLYMLA_DECODE_FORM=", $form),
            ],
        )
    };
}

pub(crate) const UNITS: &[Unit] = &[
    ("schedule", "schedule.cu", &[]),
    ("combine", "combine.cu", &[]),
    decode!("bf16_d576_tma", "Bf16", "true", "TMA"),
    decode!("bf16_d576_gather", "Bf16", "true", "GATHERED"),
    decode!("bf16_d576_few", "Bf16", "true", "FEW_ROWS"),
    decode!("bf16_d512_tma", "Bf16", "false", "TMA"),
    decode!("bf16_d512_gather", "Bf16", "false", "GATHERED"),
    decode!("bf16_d512_few", "Bf16", "false", "FEW_ROWS"),
    decode!("f16_d576_tma", "F16", "true", "TMA"),
    decode!("f16_d576_gather", "F16", "true", "GATHERED"),
    decode!("f16_d576_few", "F16", "true", "FEW_ROWS"),
    decode!("f16_d512_tma", "F16", "false", "TMA"),
    decode!("f16_d512_gather", "F16", "false", "GATHERED"),
    decode!("f16_d512_few", "F16", "false", "FEW_ROWS"),
];
