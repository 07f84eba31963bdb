"""Developer tools, each a command; none is installed. `python -m tools --help` lists them.

| file | holds |
|---|---|
| machine_code.py | SASS, PTX and AMD assembly: instructions, control-flow graph, loops, loads, occupancy |
| sass.py | what the CUDA kernels compile to, against the marks in their sources |
| aot.py | what the Triton kernels compile to, for GPUs that are not here |
| tune.py, launch_config.py | the best launch configurations of Triton and CUDA kernels, on this GPU |
| sanitize.py | small cases through every backend, for compute-sanitizer |
| coupled.py | in which precision coupled speculation gives plain decoding's texts |
| hub.py | a folder that Hugging Face's `kernels` loads |
| gpu.sh | everything that needs a GPU, in one call |
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def finish(rows: list[dict], text: str, args) -> int:
    """Saves rows and their tables where ``args`` says so, prints the tables; the exit code: 1 with findings."""
    if args.json:
        args.json.write_text("".join(json.dumps(r) + "\n" for r in rows))
    if args.markdown:
        args.markdown.write_text(text)
    print(text)
    return int(any(r["findings"] for r in rows))
