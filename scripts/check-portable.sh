#!/usr/bin/env bash
# Tier T1 of the portable kernels, on any Linux machine without a GPU: every architecture's own compiler makes its code
# from backends/portable, and registers, shared memory, scratch and spills are no more than recorded.
#
#   clang 22        gfx906 gfx90a gfx942 gfx950     no ROCm headers or libraries
#   hiprtc 5.2      gfx906 gfx90a                   Debian's libamdhip64, in a child process (it aborts on what it does not know)
#   nvcc 13.0       sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120
#   NVRTC 13.0      sm_80 sm_90                     the run-time road
#
# usage: scripts/check-portable.sh [--record]      --record writes tests/simt/resources.txt anew
#
# Missing compilers are installed: clang, lld, llvm and libamdhip64-dev by apt-get (root), nvcc and NVRTC as Python wheels
# into the git-ignored .cache/ (POLYMLA_TOOLCHAINS names another folder). What is in use is printed.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=${POLYMLA_TOOLCHAINS:-$PWD/.cache}
recorded=tests/simt/resources.txt
record=
[ "${1:-}" = --record ] && record=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# need COMMAND_OR_FILE PACKAGE...
need() {
    local what=$1
    shift
    if ! command -v "$what" >/dev/null && [ ! -e "$what" ]; then
        echo "installing $* by apt-get"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    fi
    command -v "$what" >/dev/null || [ -e "$what" ] || { echo "$what is not there after installing $*" >&2; exit 1; }
}
need clang-22 clang-22 lld-22 llvm-22
hiprtc=/usr/lib/x86_64-linux-gnu/libamdhip64.so.5
need $hiprtc libamdhip64-dev
cu13=$tools/cuda/nvidia/cu13
if [ ! -e "$cu13/bin/nvcc" ] || [ ! -e "$cu13/lib/libnvrtc.so.13" ]; then
    echo "installing nvcc and NVRTC 13.0 into $tools/cuda"
    mkdir -p "$tools/cuda"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --upgrade \
        --target "$tools/cuda" nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
        nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 \
        nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
fi
clang-22 --version | head -1
"$cu13/bin/nvcc" --version | grep release

# One line a kernel: COMPILER ARCH KERNEL vgprs agprs sgprs static_lds scratch vgpr_spills (CUDA: registers 0 0 shared stack
# spill_bytes). SGPR spills go to lanes of VGPRs, which are counted, not to memory.
table=$work/table
: >"$table"

echo "== clang"
for target in gfx906:64 gfx90a:64 gfx942:64 gfx950:163; do
    arch=${target%:*} kib=${target#*:}
    clang-22 -x hip --offload-arch="$arch" --cuda-device-only --no-gpu-bundle-output -nogpuinc -nogpulib -std=c++17 -O3 \
        -Wall -Werror -Wno-error=pass-failed -DPOLYMLA_SMEM_KIB="$kib" -I backends/hip -I backends/portable \
        -Rpass-analysis=kernel-resource-usage -o "$work/$arch.co" backends/portable/portable.cu 2>"$work/log" ||
        { cat "$work/log" >&2; exit 1; }
    awk -v arch="$arch" '
        function number(s) { sub(/.*: */, "", s); sub(/ .*/, "", s); return s }
        { sub(/ *\[-Rpass.*/, "") }
        /Function Name:/ { name = number($0); agpr = 0 }
        / VGPRs:/ { vgpr = number($0) }
        / AGPRs:/ { agpr = number($0) }
        /TotalSGPRs:/ { sgpr = number($0) }
        /ScratchSize/ { scratch = number($0) }
        /VGPRs Spill:/ { spill = number($0) }
        /LDS Size/ { print "clang", arch, name, vgpr, agpr, sgpr, number($0), scratch, spill }' "$work/log" >>"$table"
    # The matrix units must be in use where there are any, and nowhere else.
    llvm-objdump-22 -d "$work/$arch.co" >"$work/asm"
    if grep -q 'v_mfma_f32_16x16x16' "$work/asm"; then has=mfma; else has=fma; fi
    case $arch in gfx906) wanted=fma ;; *) wanted=mfma ;; esac
    [ $has = $wanted ] || { echo "$arch: code has $has; $wanted is expected" >&2; exit 1; }
    echo "$arch: $has, $(grep -c "^clang $arch " "$table") kernels"
done

echo "== hiprtc (child processes)"
cat >"$work/rtc.py" <<'PY'
# rtc.py LIBRARY PREFIX OUT DIALECT OPTION...: compiles portable.cu with headers handed over by name, as a host does.
import ctypes, pathlib, sys
library, prefix, out, dialect, *options = sys.argv[1:]
lib = ctypes.CDLL(library)
call = lambda name, *args: getattr(lib, prefix + name)(*args)
folders = [pathlib.Path("backends") / dialect, pathlib.Path("backends/portable")]
headers = {f.name: f.read_bytes() for folder in folders for f in folder.glob("*.h")}
source = pathlib.Path("backends/portable/portable.cu").read_bytes()
n = len(headers)
program = ctypes.c_void_p()
strings = lambda values: (ctypes.c_char_p * len(values))(*values)
assert call("CreateProgram", ctypes.byref(program), source, b"portable.cu", n, strings(list(headers.values())),
            strings([name.encode() for name in headers])) == 0
code = call("CompileProgram", program, len(options), strings([o.encode() for o in options]))
size = ctypes.c_size_t()
call("GetProgramLogSize", program, ctypes.byref(size))
log = ctypes.create_string_buffer(size.value + 1)
call("GetProgramLog", program, log)
if code:
    sys.exit(log.value.decode())
kind = "CUBIN" if prefix == "nvrtc" else "Code"
assert call(f"Get{kind}Size", program, ctypes.byref(size)) == 0
module = ctypes.create_string_buffer(size.value)
assert call(f"Get{kind}", program, module) == 0
pathlib.Path(out).write_bytes(module.raw)
print(f"{options[0]}: {size.value} bytes")
PY
for arch in gfx906 gfx90a; do
    python3 "$work/rtc.py" $hiprtc hiprtc "$work/rtc-$arch.co" hip --offload-arch=$arch -std=c++17 -O3 -DPOLYMLA_SMEM_KIB=64
    # Its code objects are plain ELF; the kernels' resources are in their notes.
    llvm-readelf-22 --notes "$work/rtc-$arch.co" >"$work/notes"
    awk -v arch=$arch '
        / \.agpr_count:/ { agpr = $NF }
        / \.group_segment_fixed_size:/ { lds = $NF }
        / \.name: +polymla/ { name = $NF }
        / \.private_segment_fixed_size:/ { scratch = $NF }
        / \.sgpr_count:/ { sgpr = $NF }
        / \.vgpr_count:/ { vgpr = $NF }
        / \.vgpr_spill_count:/ { print "hiprtc", arch, name, vgpr, agpr + 0, sgpr, lds, scratch, $NF; agpr = 0 }' \
        "$work/notes" >>"$table"
done

echo "== nvcc"
for target in 75:64 80:163 86:99 89:99 90a:227 100a:227 120:99; do
    arch=${target%:*} kib=${target#*:}
    PATH=$cu13/bin:$PATH "$cu13/bin/nvcc" -std=c++17 -O3 -gencode arch=compute_$arch,code=sm_$arch -DPOLYMLA_SMEM_KIB=$kib \
        -I backends/cuda -I backends/portable -Werror all-warnings -Xptxas -v,-warn-spills,-warn-lmem-usage \
        -cubin -o "$work/sm_$arch.cubin" backends/portable/portable.cu >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    awk -v arch=sm_$arch '
        /Function properties for/ { name = $NF }
        /bytes stack frame/ { stack = $1; spill = $5 + $9 }
        /Used [0-9]+ registers/ {
            shared = 0
            if (match($0, /[0-9]+ bytes smem/)) shared = substr($0, RSTART) + 0
            match($0, /Used [0-9]+/)
            print "nvcc", arch, name, substr($0, RSTART + 5, RLENGTH - 5), 0, 0, shared, stack, spill
        }' "$work/log" >>"$table"
    "$cu13/bin/cuobjdump" -sass "$work/sm_$arch.cubin" >"$work/asm"
    for instruction in HMMA LDSM LDGSTS; do
        found=no
        grep -q "$instruction" "$work/asm" && found=yes
        wanted=yes
        [ $arch = 75 ] && wanted=no
        [ $found = $wanted ] || { echo "sm_$arch: $instruction in the code: $found; expected: $wanted" >&2; exit 1; }
    done
    echo "sm_$arch: $(grep -c "^nvcc sm_$arch " "$table") kernels"
done

echo "== NVRTC"
for target in 80:163 90a:227; do
    arch=${target%:*} kib=${target#*:}
    LD_LIBRARY_PATH=$cu13/lib python3 "$work/rtc.py" "$cu13/lib/libnvrtc.so.13" nvrtc "$work/rtc-$arch.cubin" cuda --gpu-architecture=sm_$arch \
        -std=c++17 -DPOLYMLA_SMEM_KIB=$kib
done

sort -o "$table" "$table"
if [ -n "$record" ]; then
    {
        echo "# Written by scripts/check-portable.sh --record: compiler, architecture, kernel, VGPRs (CUDA: registers), AGPRs,"
        echo "# SGPRs, static shared memory, scratch or stack bytes, spills. A check fails where a number is above these."
        cat "$table"
    } >$recorded
    echo "recorded $(wc -l <"$table") kernels in $recorded"
fi
echo "== resources against $recorded"
awk '
    /^#/ { next }
    { key = $1 " " $2 " " $3 }
    NR == FNR { for (i = 4; i <= 9; ++i) limit[key, i] = $i; known[key] = 1; next }
    {
        seen[key] = 1
        if (!(key in known)) { print key ": not recorded"; bad = 1; next }
        for (i = 4; i <= 9; ++i)
            if ($i > limit[key, i]) { print key ": column " i " is " $i "; recorded is " limit[key, i]; bad = 1 }
        if ($9 > 0) { print key ": " $9 " spilled"; bad = 1 }
        ++count
    }
    END {
        for (key in known) if (!(key in seen)) { print key ": recorded but not built"; bad = 1 }
        if (!bad) print count " kernels within their records, no spills"
        exit bad
    }' $recorded "$table"
