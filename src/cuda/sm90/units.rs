// Which compilations make the kernels of this backend: name, source file, defines. Included by build.rs too.

use super::Unit;

macro_rules! decode {
    ($name:literal, $elem:literal, $rope:literal, $gather:literal) => {
        (
            concat!("decode_", $name),
            "decode.cu",
            &[
                concat!("POLYMLA_DECODE_NAME=polymla_decode_", $name),
                concat!("POLYMLA_DECODE_ELEM=", $elem),
                concat!("POLYMLA_DECODE_ROPE=", $rope),
                concat!("POLYMLA_DECODE_GATHER=", $gather),
            ],
        )
    };
}

pub(crate) const UNITS: &[Unit] = &[
    ("schedule", "schedule.cu", &[]),
    ("combine", "combine.cu", &[]),
    decode!("bf16_d576_tma", "Bf16", "true", "false"),
    decode!("bf16_d576_gather", "Bf16", "true", "true"),
    decode!("bf16_d512_tma", "Bf16", "false", "false"),
    decode!("bf16_d512_gather", "Bf16", "false", "true"),
    decode!("f16_d576_tma", "F16", "true", "false"),
    decode!("f16_d576_gather", "F16", "true", "true"),
    decode!("f16_d512_tma", "F16", "false", "false"),
    decode!("f16_d512_gather", "F16", "false", "true"),
];
