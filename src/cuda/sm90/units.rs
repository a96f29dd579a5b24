// Which compilations make the kernels of this backend: name, source file, defines. Included by build.rs too.

use super::Unit;

macro_rules! decode {
    ($name:literal, $elem:literal, $rope:literal, $cluster:literal, $gather:literal) => {
        (
            concat!("decode_", $name),
            "decode.cu",
            &[
                concat!("POLYMLA_DECODE_NAME=polymla_decode_", $name),
                concat!("POLYMLA_DECODE_ELEM=", $elem),
                concat!("POLYMLA_DECODE_ROPE=", $rope),
                concat!("POLYMLA_DECODE_CLUSTER=", $cluster),
                concat!("POLYMLA_DECODE_GATHER=", $gather),
            ],
        )
    };
}

pub(crate) const UNITS: &[Unit] = &[
    ("schedule", "schedule.cu", &[]),
    ("combine", "combine.cu", &[]),
    decode!("bf16_d576_tma", "Bf16", "true", "1", "false"),
    decode!("bf16_d576_tma_x2", "Bf16", "true", "2", "false"),
    decode!("bf16_d576_gather", "Bf16", "true", "1", "true"),
    decode!("bf16_d512_tma", "Bf16", "false", "1", "false"),
    decode!("bf16_d512_tma_x2", "Bf16", "false", "2", "false"),
    decode!("bf16_d512_gather", "Bf16", "false", "1", "true"),
    decode!("f16_d576_tma", "F16", "true", "1", "false"),
    decode!("f16_d576_tma_x2", "F16", "true", "2", "false"),
    decode!("f16_d576_gather", "F16", "true", "1", "true"),
    decode!("f16_d512_tma", "F16", "false", "1", "false"),
    decode!("f16_d512_tma_x2", "F16", "false", "2", "false"),
    decode!("f16_d512_gather", "F16", "false", "1", "true"),
];
