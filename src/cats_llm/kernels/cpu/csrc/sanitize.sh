#!/bin/sh
# Builds the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without torch, and runs their own test.
set -e
root=$(cd "$(dirname "$0")/../../../../.." && pwd)
build=${BUILD_DIR:-$root/build/sanitize}
cmake -S "$root" -B "$build" -DCATS_SANITIZE=ON
cmake --build "$build" --parallel
"$build/src/cats_llm/kernels/cpu/csrc/kernels_test" "$@"
