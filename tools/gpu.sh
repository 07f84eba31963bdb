#!/usr/bin/env bash
# All that needs a GPU, in one call of less than ten minutes and without network: builds in place with what the machine
# has, tests, compares a million rows with the CPU, looks for memory errors and races, tunes, measures, prints tables.
#
#   PYTHON               interpreter with torch, triton, transformers, pytest and setuptools (python3)
#   OUT                  folder for gpu.log, rows.jsonl, generate.jsonl, launch_config.jsonl, tune.jsonl, tune.txt (build/gpu)
#   SUITE                what to measure, with options of `python -m benchmarks run` (gpu)
#   STEPS                only these, apart by spaces: build versions tests equality memcheck racecheck initcheck launch_config
#                        tune run generate (all)
#   EFT_KERNELS_COMMIT   the commit, where there is no git
#
# Every step has a time limit, and one that fails hides none after it: the exit code is 1 at the end. Without a GPU the
# steps that need one are skipped. Nothing runs beside a step that measures. The steps' limits leave `run` 45 seconds of
# the 570 at least; it begins no shape that it has no time for, and says how many those are.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "${OUT:-$root/build/gpu}")
cd "$root"
python=${PYTHON:-python3}
read -ra suite <<<"${SUITE:-gpu}"
deadline=570 # seconds for all steps
failures=0
log=$out/gpu.log

mkdir -p "$out"
rm -f "$out"/{rows,generate,launch_config,tune}.jsonl "$out"/tune.txt
: >"$log"
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if git ls-files --error-unmatch tools/gpu.sh >/dev/null 2>&1; then
  EFT_KERNELS_COMMIT=$(git rev-parse HEAD)
  export EFT_KERNELS_COMMIT
fi

steps="build versions tests equality memcheck racecheck initcheck launch_config tune run generate"
for name in ${STEPS:-}; do
  if [[ " $steps " != *" $name "* ]]; then
    echo "STEPS: got $name, allowed are $steps" >&2
    exit 2
  fi
done

line() { printf '%-12s %-28s %4s s\n' "$@" | tee -a "$log"; }
wanted() { [[ -z ${STEPS:-} || " $STEPS " == *" $1 "* ]]; }
skip() { if wanted "$1"; then line "$1" "skipped: $2" 0; fi; }

# step NAME SECONDS COMMAND...
step() {
  wanted "$1" || return 0
  local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) rc=0 result=ok before
  before=$(wc -l <"$log")
  shift 2
  printf '\n== %s: %s\n' "$name" "$*" >>"$log"
  limit=$((left < limit ? left : limit))
  if ((limit > 0)); then
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || rc=$?
  else
    rc=124
  fi
  case $rc in
    0) ;;
    124 | 137) result="FAILED: over $((limit > 0 ? limit : 0)) s" ;;
    *) result="FAILED: exit code $rc" ;;
  esac
  if ((rc)); then
    failures=$((failures + 1))
    tail -n +$((before + 1)) "$log" | tail -n 20 | sed 's/^/    /'
  fi
  line "$name" "$result" $((SECONDS - start))
}

# beside NAME SECONDS COMMAND...: a step in the background, for those that measure nothing; `meet` waits for all of them
# and tells of each in turn
names=() pids=()
beside() {
  wanted "$1" || return 0
  (log=$parts/$1.log failures=0 && : >"$log" && step "$@" >"$parts/$1.said" && exit "$failures") &
  names+=("$1") pids+=($!)
}
meet() {
  local i
  for i in "${!names[@]}"; do
    wait "${pids[i]}" || failures=$((failures + 1))
    cat "$parts/${names[i]}.said"
    cat "$parts/${names[i]}.log" >>"$log"
  done
  names=() pids=()
}

# both extensions, the CUDA one for this GPU alone; an old one must not stand in for one that does not build
if command -v nvcc >/dev/null && arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1); then
  arch=${arch/./}
  export EFT_KERNELS_CUDA=1 EFT_KERNELS_CUDA_ARCHS=${arch/#90/90a}
  if wanted build; then rm -f eft_kernels/_cuda*.so; fi
fi
step build 120 bash -c 'make build VENV= PYTHON="$0" && { [[ -z ${EFT_KERNELS_CUDA:-} ]] || ls eft_kernels/_cuda*.so; }' \
  "$python"
step versions 20 env PYTHON="$python" bash <<'EOF'
date -u
echo "commit ${EFT_KERNELS_COMMIT:-unknown}"
nvidia-smi
for tool in nvcc compute-sanitizer ncu; do
  if command -v "$tool"; then "$tool" --version | tail -n 3; else echo "$tool: not here"; fi
done
"$PYTHON" -m eft_kernels doctor
EOF
sed -n '/^== versions/,$p' "$log" | grep -E '^(commit|eft-kernels)|^  (python|torch|triton|transformers) |NVIDIA' || true

# "gpu" and the compiled backends that run on it
read -ra gpu <<<"$("$python" -c '
import torch
from tools.sanitize import backends
print(*["gpu", *backends("cuda")] if torch.cuda.is_available() else [])' 2>>"$log" || true)"
if ((${#gpu[@]} == 0)); then why="no GPU here"; else why="no GPU backend but the reference"; fi

# A test's kernels compile in it, a second each, about a thousand of them, into a cache on disk: on as many cores as
# there are, a case's tests after each other in one process. What follows finds them there.
if ((${#gpu[@]})); then
  workers=()
  if "$python" -c 'import xdist' 2>/dev/null; then
    cores=$(($(nproc) - 2))
    workers=(-n $((cores < 1 ? 1 : cores > 14 ? 14 : cores)) --dist worksteal)
  fi
  step tests 200 "$python" -m pytest tests/test_gpu.py -k "not equality" -p no:cacheprovider -rs --durations=10 \
    "${workers[@]}"
else
  skip tests "$why"
fi

if ((${#gpu[@]} < 2)); then
  skip equality "$why"
else
  beside equality 80 "$python" -m pytest tests/test_gpu.py -k equality -s -rs -p no:cacheprovider
fi
for tool in memcheck racecheck initcheck; do
  if ((${#gpu[@]} < 2)); then
    skip "$tool" "$why"
  elif ! command -v compute-sanitizer >/dev/null; then
    skip "$tool" "no compute-sanitizer here"
  else # without the caching allocator every tensor has bounds of its own
    beside "$tool" 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m tools sanitize cuda
  fi
done
meet
grep -E 'mismatches in [0-9]+ rows' "$log" || true

if [[ " ${gpu[*]} " == *" cuda "* ]]; then
  step launch_config 50 "$python" -m tools launch_config --seconds 35 --json "$out/launch_config.jsonl"
else
  skip launch_config "no CUDA backend here"
fi
if [[ " ${gpu[*]} " != *" triton "* ]]; then
  skip tune "$why"
else
  step tune 60 bash -o pipefail -c '"$0" -m tools tune --seconds 40 --json "$1.jsonl" | tee "$1.txt"' \
    "$python" "$out/tune"
fi
if ((${#gpu[@]})) || [[ ${suite[0]} != gpu ]]; then
  left=$((deadline - SECONDS))
  if ((${#gpu[@]})) && wanted generate; then left=$((left - 75)); fi
  step run "$left" "$python" -m benchmarks run --suite "${suite[@]}" --json "$out/rows.jsonl" \
    --seconds $((left > 40 ? left - 40 : 0))
else
  skip run "$why"
fi
if ((${#gpu[@]})); then
  step generate 75 "$python" -m benchmarks run --suite generate --draft-tokens 4 --rounds 3 \
    --json "$out/generate.jsonl"
else
  skip generate "$why"
fi

grep -E '^\| (B,|\*?\*?[0-9]+ \|)' "$log" | grep -A20 'direct =\|streamed =\|room =\|peel =\|early =\|ask =' || true
if [[ -f $out/tune.txt ]]; then grep -E '^(config\.|    )' "$out/tune.txt" || true; fi
for file in "$out"/{rows,generate}.jsonl; do
  if [[ -s $file ]]; then
    "$python" - "$file" <<'EOF' || failures=$((failures + 1))
import sys

from benchmarks import report

rows = report.read(sys.argv[1])
shapes = report.newest(rows)
centre = {s: g for s, g in shapes.items() if report.CENTRE.items() <= s._asdict().items() and s.op == "sample"
          and s.variant in ("plain", "top_p")}
written = {s: g for s, g in shapes.items() if s.op == "generate"}
if written:
    print("\n" + "\n".join(report.generate_table(written)))
elif centre:
    _, header, lines = report.cells(centre)
    print("\n" + "\n".join(report.table(header, lines, left=1)))
    if rows[-1]["device_kind"] == "cuda":
        print("\n".join(report.table(["goal", "wanted", "measured", "verdict"], report.goals(shapes, "cuda"), left=1)))
EOF
  fi
done
echo "$failures of the steps failed; all they printed: $log"
exit $((failures > 0))
