#!/usr/bin/env bash
# Run the suite as other machines would: with the kernels of older processors, other numbers of threads, and
# surroundings that a developer's own machine does not have. Settings that have nothing to do with each other
# share a run. Arguments go to pytest:
#
#     bash tests/other_machines.sh
#     bash tests/other_machines.sh -k weights
#
# Each run prints its failures and one line with pytest's summary; the exit code is 1 if any test failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
threads=$(env -u OMP_NUM_THREADS python -c "import torch; print(torch.get_num_threads())")
log=$(mktemp) failed=0 arguments=("$@")
trap 'rm -f "$log"' EXIT

# run NAME FOLDER VARIABLE=VALUE ...: the suite, started in that folder, under these variables
run() {
    local name=$1 folder=$2
    (cd "$folder" && env "${@:3}" python -m pytest -q "$root" "${arguments[@]}") > "$log" 2>&1 || failed=1
    grep -aE "^(FAILED|ERROR)" "$log"
    echo "$name: $(tail -n 1 "$log")"
}

# torch's own kernels without AVX; below a file nobody can write, not even root
run "no AVX in torch, 1 thread, no home" "$root" OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default \
    HOME=/dev/null/home XDG_CACHE_HOME=

# a processor with AVX2 and without AVX-512, as each library has to be told
run "AVX2 everywhere, 2 threads, from another folder" / OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 \
    DNNL_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

run "4 threads, LANG=C" "$root" OMP_NUM_THREADS=4 LANG=C LC_ALL=C

run "torch's own number of threads, $threads" "$root" OMP_NUM_THREADS="$threads"

exit "$failed"
