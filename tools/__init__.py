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

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
