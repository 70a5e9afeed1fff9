"""What importing gramian costs and reaches: light, layered, nothing unpickled, and known to transformers in time."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gramian

SOURCE = Path(gramian.__file__).parent

# Importing these ----------------------------------------------------------------------------------------------------


def fresh(code: str, *arguments: str) -> str:
    """Standard output of `code` in a new interpreter; it must end well and say nothing on standard error."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def test_importing_gramian_imports_neither_torch_nor_transformers() -> None:
    loaded = fresh("import gramian, sys; print(*sys.modules)").split()
    heavy = {"torch", "numpy", "transformers", "safetensors", "tokenizers", "rich", "click"}
    assert not heavy & set(loaded)
    assert {name for name in loaded if name.split(".")[0] == "gramian"} == {
        "gramian",
        "gramian.errors",
        "gramian.models",
        "gramian.models.import_hook",
    }


def test_gramian_on_top_of_torch_is_a_handful_of_modules() -> None:
    code = """
import torch, sys
before = set(sys.modules)
import gramian
print(len(set(sys.modules) - before))
gramian.Operator, gramian.fit, gramian.StructuredLinear, gramian.collect, gramian.compress
new = set(sys.modules) - before
print("transformers" in new, "matplotlib" in new, "sentence_transformers" in new, "scipy" in new)
"""
    count, *reached = fresh(code).split()
    assert int(count) <= 8
    assert reached == ["False"] * 4


def test_every_public_name_resolves() -> None:
    for name in gramian.__all__:
        assert getattr(gramian, name) is not None, name
    assert set(gramian.__all__) == set(dir(gramian))
    assert set(gramian._WHERE) == set(gramian.__all__) - {"GramianError", "__version__"}
    with pytest.raises(AttributeError, match=r"gramian.*no attribute 'Opperator'"):
        gramian.Opperator  # noqa: B018


# One process that has the heavy libraries under transformers already and forks for each order of imports, so that
# transformers, gramian and sentence_transformers are new to every child.
ORDERS = """
import json, os, sys
import torch, torch._dynamo, torch.distributed.fsdp, scipy.stats, scipy.optimize, sklearn.metrics
assert not {"transformers", "gramian"} & set(sys.modules)
for index, code in enumerate(json.loads(sys.argv[1])):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.dup2(1, 2)  # one stream, in order
        try:
            exec(code, {})
            auto = sys.modules["transformers.quantizers.auto"]
            known = "gramian" in auto.AUTO_QUANTIZER_MAPPING and "gramian" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
            hooked = any(type(f).__module__ == "gramian.models.import_hook" for f in sys.meta_path)
            print("registered" if known and not hooked else f"known {known}, hooked {hooked}")
        except BaseException as error:
            print(repr(error))
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print("END", index)
"""
FIRST = [
    # Naming AutoModel loads nothing of the quantizers; using it does.
    "from transformers import AutoConfig, AutoModel; AutoModel.from_config(AutoConfig.for_model('bert', hidden_size=12))",
    "from transformers import PreTrainedModel",
    "from transformers import BertModel",
    "import transformers.quantizers",
    "import sentence_transformers",
]


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_registration_succeeds_whatever_is_imported_first() -> None:
    orders = [f"{a}\n{b}" for other in FIRST for a, b in (("import gramian", other), (other, "import gramian"))]
    # gramian's own modules that work with models, before anything of transformers.
    orders.append("import gramian.models.job\nfrom transformers import PreTrainedModel")
    orders.append("import gramian.models.huggingface")
    out = fresh(ORDERS, json.dumps(orders))
    answers = [part.strip() for part in out.split("END")]
    answers = [answers[0], *(answer.partition("\n")[2].strip() for answer in answers[1:-1])]
    assert dict(zip(orders, answers, strict=True)) == dict.fromkeys(orders, "registered")


# The floors ---------------------------------------------------------------------------------------------------------

FLOORS = {
    "errors": -1,
    "modes": -1,
    "files": 0,
    "linalg": 0,
    "ops": 0,
    "execution": 1,
    "grams": 1,
    "fitting": 1,
    "nn": 2,
    "compression": 3,
    "sequence": 3,
    "spectra": 3,
    "models": 4,
    "adapt": 5,
    "report": 6,
    "cli": 6,
    "testing": 6,
}
SIDEWAYS = {("ops", "linalg"), ("cli", "report")}
"""Packages on one floor do not import each other, but for these: operators use the dense functions, the command line
shows reports. ``fitting`` takes plain Gram tensors and needs no ``grams``."""


def modules() -> list[Path]:
    found = sorted(SOURCE.rglob("*.py"))
    assert len(found) > 40
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import; say which module is meant"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_nothing_imports_upward() -> None:
    for path in modules():
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts == ("__init__",):
            continue  # the package's front door names everything, when it is asked for
        here = parts[0]
        for line, name in imports(path):
            if not name.startswith("gramian."):
                continue
            there = name.split(".")[1]
            if there == "__version__" or there == here:
                continue
            allowed = FLOORS[there] < FLOORS[here] or (here, there) in SIDEWAYS
            assert allowed, f"{path.relative_to(SOURCE)}:{line}: {here} must not import {there}"


def test_the_floors_name_every_package() -> None:
    found = {p.name.removesuffix(".py") for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert found - {"__init__"} == set(FLOORS)


def test_transformers_is_imported_late() -> None:
    """Only the module that the hook runs once transformers is there may import it at the top."""
    for path in modules():
        tree = parsed(path)
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [alias.name if isinstance(n, ast.Import) else str(n.module) for n in top for alias in n.names]
        heavy = [name for name in names if name.split(".")[0] in ("transformers", "sentence_transformers", "peft")]
        if path.name == "huggingface.py":
            # ... and then no more of it than is there by the time the quantizers are.
            assert all(name.startswith(("transformers.quantizers.", "transformers.utils")) for name in heavy)
        else:
            assert not heavy, f"{path.relative_to(SOURCE)} imports {heavy} at the top"


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every attribute or name that is read, e.g. "torch.linalg.eigh"."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute | ast.Name):
            yield node.lineno, ast.unparse(node)


def test_nothing_is_unpickled() -> None:
    for path in modules():
        if path.is_relative_to(SOURCE / "testing"):
            continue  # the contract suite checks that operators survive pickle, on bytes that it has just made
        unsafe = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        for line, name in imports(path):
            assert name.split(".")[0] not in unsafe, f"{path.relative_to(SOURCE)}:{line}: {name}"
        for line, name in calls(path):
            assert name not in ("torch.load", "torch.hub.load", "torch.jit.load", "numpy.load", "np.load"), (
                f"{path.relative_to(SOURCE)}:{line}: {name}"
            )
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.keyword) and node.arg == "use_safetensors":
                assert ast.unparse(node.value) == "True"
            assert not (isinstance(node, ast.keyword) and node.arg == "weights_only")


def test_decompositions_are_made_in_one_place() -> None:
    spectral = ("eigh", "eigvalsh", "eig", "eigvals", "svd", "svdvals", "svd_lowrank", "pca_lowrank", "lobpcg")
    for path in modules():
        if path.is_relative_to(SOURCE / "linalg"):
            continue
        for line, name in calls(path):
            owner, _, last = name.rpartition(".")
            bad = last in spectral and (owner in ("torch", "torch.linalg", "numpy.linalg", "np.linalg", "scipy.linalg"))
            assert not bad, f"{path.relative_to(SOURCE)}:{line}: {name}; use gramian.linalg"
        for line, name in imports(path):
            bad = name.startswith("torch.linalg.") or name == "torch.linalg"
            assert not bad, f"{path.relative_to(SOURCE)}:{line}: {name}; use gramian.linalg"


def test_packages_import_alone() -> None:
    """None counts on another having been imported before: no hidden cycles."""
    names = [".".join(("gramian", *p.relative_to(SOURCE).with_suffix("").parts)) for p in modules()]
    names = [name.removesuffix(".__init__") for name in names if name.endswith(".__init__") or ".models." in name]
    code = """
import json, os, sys
import torch, safetensors.torch, click, rich
import transformers.quantizers, transformers.utils.quantization_config
for name in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            __import__(name)
        except BaseException as error:
            print(name, repr(error))
            sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""
    assert not fresh(code, json.dumps(names))


def test_the_version_is_one() -> None:
    from importlib.metadata import version

    assert importlib.import_module("gramian").__version__ == version("gramian")
