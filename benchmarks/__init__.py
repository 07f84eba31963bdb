"""The room where speed is measured; `python -m benchmarks list` says what can be.

Data flows one way: inputs, baselines -> registry -> run -> rows (JSON lines) -> report | compare.

| file | holds |
|---|---|
| inputs.py | logits: peaked, flat, and those of the family in examples/ |
| baselines.py | the implementations beside ours, a record each |
| registry.py | operations with their variants, bytes and issue slots; suites of shapes |
| device.py | what a row says of the device; cores, bandwidth, timers, launches, memory |
| run.py | no number without a green gate; then interleaved timing, a row for each implementation |
| generate.py | end to end: our generation against transformers' |
| report.py, plots.py | rows as tables, goals met or missed, plots; measures nothing |
| compare.py | rows against rows: faster, slower, or noise; measures nothing |
| tune.py | how the Triton kernels' launches are cut best, on the GPU that is here |
| gpu.sh, sanitize.py | everything that needs a GPU; docs/gpu-status.md says what has been verified |
| results/, findings/ | rows by device; a page for each finding |

To add an implementation: a record in baselines.py. A variant or an operation: a row of OPS in registry.py (and its
call in the baselines that have it). A suite: a function in registry.py.
"""
