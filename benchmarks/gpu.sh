#!/usr/bin/env bash
# All that needs a GPU, in one call of less than ten minutes and without network: builds in place with what the machine
# has, tests, looks for memory errors and races, measures, and prints a table.
#
#   PYTHON               interpreter with torch, triton, transformers, pytest and setuptools (python3)
#   OUT                  folder for gpu.log, rows.jsonl, generate.jsonl (benchmarks/out)
#   SUITE                what to measure, with options of `python -m benchmarks run` (gpu)
#   EFT_KERNELS_COMMIT   the commit, where there is no git
#
# Every step has a time limit, and one that fails hides none after it: the exit code is 1 at the end. Without a GPU the
# steps that need one are skipped.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "${OUT:-$root/benchmarks/out}")
cd "$root"
python=${PYTHON:-python3}
read -ra suite <<<"${SUITE:-gpu}"
deadline=570 # seconds for all steps
failures=0
log=$out/gpu.log

mkdir -p "$out"
rm -f "$out"/{rows,generate}.jsonl
: >"$log"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if git ls-files --error-unmatch benchmarks/gpu.sh >/dev/null 2>&1; then
  EFT_KERNELS_COMMIT=$(git rev-parse HEAD)
  export EFT_KERNELS_COMMIT
fi

line() { printf '%-12s %-28s %4s s\n' "$@" | tee -a "$log"; }
skip() { line "$1" "skipped: $2" 0; }

# step NAME SECONDS COMMAND...
step() {
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

step build 120 make build VENV= PYTHON="$python"
step versions 40 env PYTHON="$python" bash <<'EOF'
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
from benchmarks.sanitize import backends
print(*["gpu", *backends("cuda")] if torch.cuda.is_available() else [])' 2>>"$log" || true)"
if ((${#gpu[@]} == 0)); then why="no GPU here"; else why="no GPU backend but the reference"; fi

if ((${#gpu[@]})); then
  workers=()
  if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
  step tests 150 "$python" -m pytest tests/test_gpu.py -p no:cacheprovider -rs "${workers[@]}"
else
  skip tests "$why"
fi

for tool in memcheck racecheck initcheck; do
  if ((${#gpu[@]} < 2)); then
    skip "$tool" "$why"
  elif ! command -v compute-sanitizer >/dev/null; then
    skip "$tool" "no compute-sanitizer here"
  else # without the caching allocator every tensor has bounds of its own
    step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m benchmarks.sanitize cuda
  fi
done

if ((${#gpu[@]})); then
  step generate 120 "$python" -m benchmarks run --suite generate --draft-tokens 4 --rounds 3 --json "$out/generate.jsonl"
else
  skip generate "$why"
fi
if ((${#gpu[@]})) || [[ ${suite[0]} != gpu ]]; then
  step run "$deadline" "$python" -m benchmarks run --suite "${suite[@]}" --json "$out/rows.jsonl"
else
  skip run "$why"
fi

for file in "$out"/{rows,generate}.jsonl; do
  if [[ -f $file ]]; then
    "$python" - "$file" <<'EOF' || failures=$((failures + 1))
import sys

from benchmarks import report

shapes = report.newest(report.read(sys.argv[1]))
centre = {s: g for s, g in shapes.items() if report.CENTRE.items() <= s._asdict().items() and s.op == "sample"
          and s.variant in ("plain", "top_p")}
written = {s: g for s, g in shapes.items() if s.op == "generate"}
if written:
    print("\n" + "\n".join(report.generate_table(written)))
elif centre:
    _, header, lines = report.cells(centre)
    print("\n" + "\n".join(report.table(header, lines, left=1)))
EOF
  fi
done
echo "$failures of the steps failed; all they printed: $log"
exit $((failures > 0))
