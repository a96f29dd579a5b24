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
. "$(dirname "$0")/common.sh"
recorded=tests/simt/resources.txt
record=
[ "${1:-}" = --record ] && record=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
use_hip
use_cuda
clang-22 --version | head -1
"$cu13/bin/nvcc" --version | grep release
export work cu13 hiprtc=/usr/lib/x86_64-linux-gnu/libamdhip64.so.5

# Each function below takes `ARCH KIB` and writes $work/COMPILER-ARCH.table, one line a kernel: COMPILER ARCH KERNEL vgprs
# agprs sgprs static_lds scratch vgpr_spills (CUDA: registers 0 0 shared stack spill_bytes). SGPR spills go to lanes of
# VGPRs, which are counted, not to memory.

with_clang() {
    local arch=${1% *} kib=${1#* } log=$work/clang-${1% *}.log table=$work/clang-${1% *}.table
    clang-22 -x hip --offload-arch="$arch" --cuda-device-only --no-gpu-bundle-output -nogpuinc -nogpulib -std=c++17 -O3 \
        -Wall -Werror -Wno-error=pass-failed -DPOLYMLA_SMEM_KIB="$kib" -I backends/hip -I backends/portable \
        -Rpass-analysis=kernel-resource-usage -o "$work/$arch.co" backends/portable/portable.cu 2>"$log" ||
        { cat "$log"; exit 1; }
    awk -v arch="$arch" '
        function number(s) { sub(/.*: */, "", s); sub(/ .*/, "", s); return s }
        { sub(/ *\[-Rpass.*/, "") }
        /Function Name:/ { name = number($0); agpr = 0 }
        / VGPRs:/ { vgpr = number($0) }
        / AGPRs:/ { agpr = number($0) }
        /TotalSGPRs:/ { sgpr = number($0) }
        /ScratchSize/ { scratch = number($0) }
        /VGPRs Spill:/ { spill = number($0) }
        /LDS Size/ { print "clang", arch, name, vgpr, agpr, sgpr, number($0), scratch, spill }' "$log" >"$table"
    # The matrix units must be in use where there are any, and nowhere else.
    llvm-objdump-22 -d "$work/$arch.co" >"$work/$arch.asm"
    local has=fma wanted=mfma
    grep -q 'v_mfma_f32_16x16x16' "$work/$arch.asm" && has=mfma
    [ "$arch" = gfx906 ] && wanted=fma
    [ $has = $wanted ] || { echo "$arch: code has $has; $wanted is expected"; exit 1; }
    echo "clang $arch: $has, $(wc -l <"$table") kernels"
}

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

# In child processes: Debian's hiprtc aborts on what it does not know.
with_hiprtc() {
    local arch=${1% *} kib=${1#* }
    python3 "$work/rtc.py" "$hiprtc" hiprtc "$work/rtc-$arch.co" hip --offload-arch="$arch" -std=c++17 -O3 "-DPOLYMLA_SMEM_KIB=$kib"
    # Its code objects are plain ELF; the kernels' resources are in their notes.
    llvm-readelf-22 --notes "$work/rtc-$arch.co" >"$work/rtc-$arch.notes"
    awk -v arch="$arch" '
        / \.agpr_count:/ { agpr = $NF }
        / \.group_segment_fixed_size:/ { lds = $NF }
        / \.name: +polymla/ { name = $NF }
        / \.private_segment_fixed_size:/ { scratch = $NF }
        / \.sgpr_count:/ { sgpr = $NF }
        / \.vgpr_count:/ { vgpr = $NF }
        / \.vgpr_spill_count:/ { print "hiprtc", arch, name, vgpr, agpr + 0, sgpr, lds, scratch, $NF; agpr = 0 }' \
        "$work/rtc-$arch.notes" >"$work/hiprtc-$arch.table"
}

with_nvcc() {
    local arch=${1% *} kib=${1#* } log=$work/nvcc-${1% *}.log table=$work/nvcc-${1% *}.table
    PATH=$cu13/bin:$PATH "$cu13/bin/nvcc" -std=c++17 -O3 -gencode "arch=compute_$arch,code=sm_$arch" "-DPOLYMLA_SMEM_KIB=$kib" \
        -I backends/cuda -I backends/portable -Werror all-warnings -Xptxas -v,-warn-spills,-warn-lmem-usage \
        -cubin -o "$work/sm_$arch.cubin" backends/portable/portable.cu >"$log" 2>&1 || { cat "$log"; exit 1; }
    awk -v arch="sm_$arch" '
        /Function properties for/ { name = $NF }
        /bytes stack frame/ { stack = $1; spill = $5 + $9 }
        /Used [0-9]+ registers/ {
            shared = 0
            if (match($0, /[0-9]+ bytes smem/)) shared = substr($0, RSTART) + 0
            match($0, /Used [0-9]+/)
            print "nvcc", arch, name, substr($0, RSTART + 5, RLENGTH - 5), 0, 0, shared, stack, spill
        }' "$log" >"$table"
    "$cu13/bin/cuobjdump" -sass "$work/sm_$arch.cubin" >"$work/sm_$arch.asm"
    local wanted=yes instruction found
    [ "$arch" = 75 ] && wanted=no
    for instruction in HMMA LDSM LDGSTS; do
        found=no
        grep -q "$instruction" "$work/sm_$arch.asm" && found=yes
        [ $found = $wanted ] || { echo "sm_$arch: $instruction in the code: $found; expected: $wanted"; exit 1; }
    done
    echo "nvcc sm_$arch: $(wc -l <"$table") kernels"
}

with_nvrtc() {
    local arch=${1% *} kib=${1#* }
    python3 "$work/rtc.py" "$cu13/lib/libnvrtc.so.13" nvrtc "$work/rtc-$arch.cubin" cuda "--gpu-architecture=sm_$arch" \
        -std=c++17 "-DPOLYMLA_SMEM_KIB=$kib"
}

export -f with_clang with_hiprtc with_nvcc with_nvrtc
compile() { "with_${1%% *}" "${1#* }"; }
# The longest first.
printf '%s\n' 'nvcc 90a 227' 'nvcc 100a 227' 'nvcc 80 163' 'nvcc 86 99' 'nvcc 89 99' 'nvcc 120 99' 'nvcc 75 64' \
    'nvrtc 90a 227' 'nvrtc 80 163' 'hiprtc gfx906 64' 'hiprtc gfx90a 64' \
    'clang gfx950 163' 'clang gfx942 64' 'clang gfx90a 64' 'clang gfx906 64' | parallel compile

table=$work/table
sort "$work"/*-*.table >"$table"
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
