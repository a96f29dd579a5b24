#!/usr/bin/env bash
# The WGSL backend without a GPU: every variant through naga; golden files, random problems and a browser's limits on
# Mesa's software Vulkan (lavapipe); examples/web in headless Chromium. Installs Debian's packages where they are
# missing, and says so; POLYMLA_REQUIRE_BROWSER=1 makes the absence of Chromium a failure.
. "$(dirname "$0")/common.sh"

use_vulkan
tests --test wgpu --test golden --test random --test files
tests --lib -- wgpu:: conformance::
use_browser
if command -v chromium >/dev/null; then
    python3 scripts/check_web.py
elif [ -n "${POLYMLA_REQUIRE_BROWSER:-}" ]; then
    echo "chromium is required and could not be installed" >&2
    exit 1
else
    echo "SKIP the browser: chromium could not be installed"
fi
