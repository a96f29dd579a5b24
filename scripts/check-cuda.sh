#!/usr/bin/env bash
# Checks the Hopper backend without a GPU: the crate builds with it and says why it is absent; its kernels compile under
# nvcc 13.0 and NVRTC 12.3, 12.9 and 13.0 within the recorded registers and spills; their code holds HGMMA and UTMALDG; emulated on this
# CPU they are right, and faults planted in them are noticed.
#
# usage: scripts/check-cuda.sh [--record]      --record writes tests/cuda/resources.txt anew
#
# Compilers are Python wheels, installed by pip into the git-ignored .cache/ when they are missing (about 350 MB once).
# POLYMLA_TOOLCHAINS names another folder for them.
. "$(dirname "$0")/common.sh"
if [ "${1:-}" = --record ]; then
    export POLYMLA_TEST_RECORD=1
fi

use_cuda
# Without a GPU the tests that need one print why they were skipped.
tests --test cuda -- --nocapture
tests --lib -- cuda

# has_tensor_cores CUBIN: every decode kernel in it holds HGMMA and a bulk copy.
has_tensor_cores() {
    local sass
    sass=$(mktemp)
    # To a file first: cuobjdump ends badly when its reader does.
    "$CUOBJDUMP" -sass "$1" >"$sass"
    # The gather form copies with cp.async (LDGSTS) instead of TMA.
    awk -v cubin="$(basename "$1" .cubin)" '
        function finish(   copy) {
            if (name == "") return
            copy = name ~ /_gather$/ ? "LDGSTS" : "UTMALDG"
            if (!seen["HGMMA"]) { print cubin, name ": no HGMMA" >"/dev/stderr"; bad = 1 }
            if (!seen[copy]) { print cubin, name ": no " copy >"/dev/stderr"; bad = 1 }
            kernels++
        }
        /Function : / { finish(); name = $NF; delete seen }
        match($0, /(HGMMA|UTMALDG|LDGSTS)/) { seen[substr($0, RSTART, RLENGTH)] = 1 }
        END { finish(); print cubin ":", kernels + 0, "kernels"; exit bad }' "$sass"
    rm "$sass"
}
export CUOBJDUMP=$cu13/bin/cuobjdump
found=$(ls "$POLYMLA_TEST_CUBINS"/*-decode*.cubin | parallel has_tensor_cores) || { echo "$found" >&2; exit 1; }
count=$(awk '{ sum += $(NF - 1) } END { print sum + 0 }' <<<"$found")
[ "$count" -ge 48 ] || { echo "$found"; echo "only $count of 12 decode kernels x 4 compilers" >&2; exit 1; }
echo "$count decode kernels hold HGMMA and UTMALDG (LDGSTS in the gather form)"
