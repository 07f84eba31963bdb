"""Two copies of the package in one process, as `kernels` of Hugging Face loads one."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eft_kernels as eft
from tools import hub


def arguments():
    g = torch.Generator().manual_seed(3)
    return [torch.randn(4, 1000, generator=g) for _ in range(3)], [1.0, 1.0, -1.0]


def imported(name: str, folder: Path):
    path = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(folder)])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path):
    (cpu, _) = hub.write(tmp_path / "repository")
    yield imported("another_copy", cpu)
    for name in [n for n in sys.modules if n.partition(".")[0] == "another_copy"]:
        del sys.modules[name]


def test_a_copy_beside_the_package(copy):
    """Its backends and operators are its own, its tokens the same."""
    logits, weights = arguments()
    options = dict(top_p=0.9, seed=7, position=0)
    want = eft.sample(logits, weights, **options)
    assert torch.equal(copy.sample(logits, weights, **options).tokens, want.tokens)
    assert {name: row["available"] for name, row in copy.backends().items()} == {
        name: row["available"] for name, row in eft.backends().items()
    }
    assert all(
        name.startswith("another_copy.")
        for name in (copy.dispatch.choose("auto", logits[0].device).__name__, copy.ops.__name__)
    )
    assert copy.ops.NAMESPACE == "another_copy" and eft.ops.NAMESPACE == "eft_kernels"
    assert torch.ops.another_copy.sample.default is not torch.ops.eft_kernels.sample.default

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.name())
            return function(*args, **kwargs or {})

    with Seen():
        tokens = copy.sample(logits, weights, **options).tokens
    assert torch.equal(tokens, want.tokens) and Seen.names[0] == "another_copy::sample"


CODE = """
import sys, torch, kernels
from pathlib import Path
copy = kernels.get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert copy.__name__ != "eft_kernels" and "eft_kernels" not in sys.modules
logits = [torch.randn(4, 1000, generator=torch.Generator().manual_seed(j)) for j in range(3)]
out, same = (copy.sample(logits, [1.0, 1.0, -1.0], seed=7, position=0, backend=b) for b in ("auto", "reference"))
assert torch.equal(out.tokens, same.tokens) and hasattr(torch.ops, copy.ops.NAMESPACE)
print("loaded", copy.ops.NAMESPACE)
"""


def test_kernels_of_hugging_face_loads_it(tmp_path):
    """In an environment of its own, for transformers behaves differently where `kernels` is installed."""
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "install", "--no-deps"]
    if subprocess.run([*pip, "--target", packages, "kernels==0.17.*"], capture_output=True).returncode:
        pytest.skip("kernels cannot be installed here")
    hub.write(tmp_path / "repository")
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(packages)!r})\n" + CODE, tmp_path / "repository"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0 and run.stdout.startswith("loaded eft_kernels_cpu"), run.stdout + run.stderr


def test_the_folder_is_refused_where_something_is(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(hub.Refused, match="is not empty"):
        hub.write(tmp_path)
    shutil.rmtree(tmp_path)
