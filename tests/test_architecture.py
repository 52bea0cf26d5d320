"""The import law: who may import whom, and what may not be loaded by an import alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"shared", "textalign", "visionalign", "diffusionalign", "scripts"}
CORE = {"shared", "shared.cache", "shared.errors", "shared.http", "shared.hub", "shared.secrets"}

# what a module under this prefix may import of the suite; the longest prefix counts
ALLOWED = {
    "shared.cache": set(),
    "shared.errors": set(),
    "shared.http": {"shared.errors"},
    "shared.hub": {"shared.errors"},
    "shared.secrets": set(),
    "shared.objectives": {"shared.objectives"},
    "shared.builtin": CORE | {"shared.builtin"},
    "shared.data": CORE | {"shared.data", "shared.objectives", "shared.builtin", "shared.policies.base"},
    "shared.rewards": CORE | {"shared.rewards", "shared.objectives", "shared.data", "shared.builtin"},
    "shared.policies": CORE | {"shared.policies", "shared.objectives"},
    "shared.runtime": CORE | {"shared.runtime", "shared.objectives", "shared.builtin"},
    "shared.trainers": {"shared"},
    "shared": set(),
    "textalign": {"textalign", "shared"},
    "visionalign": {"visionalign", "shared"},
    "diffusionalign": {"diffusionalign", "shared"},
}


def modules():
    for package in ("shared", "textalign", "visionalign", "diffusionalign"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def within(name, prefixes):
    return any(name == prefix or (prefix not in CORE and name.startswith(prefix + ".")) for prefix in prefixes)


def test_import_law():
    broken = []
    for module, path in modules():
        prefix = max((p for p in ALLOWED if module == p or module.startswith(p + ".")), key=len)
        for name in imports(path):
            if name.split(".")[0] not in OWN:
                continue
            allowed = ALLOWED[prefix] if prefix != "shared.trainers" else {name if name.startswith("shared") else ""}
            if prefix in ("textalign", "visionalign", "diffusionalign") and name.startswith("shared"):
                continue
            if not within(name, allowed):
                broken.append(f"{module} imports {name}")
    assert not broken, "\n".join(broken)


def test_objectives_import_torch_alone():
    standard = sys.stdlib_module_names
    for path in (ROOT / "shared" / "objectives").glob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top == "torch" or top in standard or name.startswith("shared.objectives"), f"{path.name}: {name}"


LIGHT = ["textalign", "visionalign", "diffusionalign", "shared.runtime.parser", "shared.data.loading"]
HEAVY = {"torch", "transformers", "diffusers", "datasets"}


@pytest.mark.parametrize("package", LIGHT)
def test_import_is_light(package):
    code = f"import {package}, sys; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["textalign", "visionalign", "diffusionalign"])
def test_a_stray_folder_named_shared_is_named(package, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\nimport {package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "ImportError" in done.stderr and str(tmp_path / "shared") in done.stderr


def test_files_stay_small():
    large = {}
    for module, path in modules():
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 400:
            large[module] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80:
                large[f"{module}.{node.name}"] = node.end_lineno - node.lineno + 1
    assert not large, large
