"""How speed is measured: what `eft-kernels bench` and `eft-kernels demo` need, and benchmarks/ of a checkout builds on.

Data flows one way: inputs, baselines -> shapes -> run -> rows (JSON lines) -> rows as tables | compare.

| file | holds |
|---|---|
| inputs.py | logits: peaked, flat, and those of the family in examples/ |
| baselines.py | the implementations beside ours, a record each |
| shapes.py | operations with their variants, bytes and issue slots; what is measured, and by us |
| device.py | what a row says of the device; cores, bandwidth, timers, launches, memory |
| run.py | no number without a green gate; then interleaved timing, a row for each implementation |
| rows.py | rows read, grouped by shape, as cells of a table; measures nothing |
| compare.py | rows against rows: faster, slower, or noise; measures nothing |
"""
