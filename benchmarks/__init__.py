"""Suites, reports and results, on the harness of eft_kernels/bench.

`python -m benchmarks list` says what can be measured.

| file | holds |
|---|---|
| registry.py | suites of shapes |
| generate.py | end to end: our generation against transformers' |
| pairs.py, pair_models.py | speculation on pairs of models beside what arithmetic says; those models, from a seed |
| vllm_speed.py, vllm_engine.py | tokens a second in vLLM; an engine in a process of its own (tests/vllm use it) |
| provenance.py | which sources made a row; rows that become results |
| report.py, plots.py | rows as tables, goals met or missed, plots; measures nothing |
| compare.py | rows against rows, on the command line |
| results/, findings/ | rows by device; a page for each finding |

To add an implementation: a record in eft_kernels/bench/baselines.py. A variant or an operation: a row of OPS in
eft_kernels/bench/shapes.py (and its call in the baselines that have it). A suite: a function in registry.py.
"""
