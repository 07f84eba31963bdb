"""Loads the extension of the installed wheel without torch, and names the instruction sets it runs here."""

import importlib.metadata
import importlib.util

(path,) = (f.locate() for f in importlib.metadata.files("eft-kernels") if f.name.startswith("_cpu."))
spec = importlib.util.spec_from_file_location("eft_kernels._cpu", path)
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
found = []
for name in ("baseline", "avx2", "avx512"):
    try:
        found.append(extension.set_isa(name))
    except ValueError:
        pass
assert "baseline" in found
print(f"{path}: {', '.join(found)}; chosen: {extension.set_isa(None)}")
