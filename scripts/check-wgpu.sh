#!/usr/bin/env bash
# The WGSL backend without a GPU: every variant through naga; golden files, random problems and a browser's limits on
# Mesa's software Vulkan (lavapipe); examples/web in headless Chromium. Installs Debian's packages where they are
# missing, and says so; POLYMLA_REQUIRE_BROWSER=1 makes the absence of Chromium a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

icd=/usr/share/vulkan/icd.d/lvp_icd.x86_64.json
need=()
[ -e "$icd" ] || need+=(mesa-vulkan-drivers)
ldconfig -p | grep -q 'libvulkan\.so\.1' || need+=(libvulkan1)
if [ ${#need[@]} -gt 0 ]; then
    echo "installing ${need[*]}"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
fi

# Another driver of this machine may be better, but results here should not depend on what it is.
export VK_ICD_FILENAMES="$icd" XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"
# Not what the caller requires: builds here have other backends.
export POLYMLA_REQUIRE=cpu,wgpu
echo "== the WGSL kernels: shaders, limits, errors, every path"
cargo test --features cli,wgpu --test wgpu
echo "== the suites that every backend passes"
cargo test --features cli,wgpu --test golden --test random --test files
echo "== the library's own tests"
cargo test --features cli,wgpu --lib -- wgpu:: conformance::
echo "== the same files in a browser"
if ! command -v chromium >/dev/null; then
    echo "installing chromium"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends chromium >/dev/null || true
fi
if command -v chromium >/dev/null; then
    python3 scripts/check_web.py
elif [ -n "${POLYMLA_REQUIRE_BROWSER:-}" ]; then
    echo "chromium is required and could not be installed" >&2
    exit 1
else
    echo "SKIP the browser: chromium could not be installed"
fi
