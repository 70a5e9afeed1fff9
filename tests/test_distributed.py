"""Several processes give what one gives; one that dies ends the run, and the next run goes on from its journal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from commands import ENVIRONMENT, Result, launcher
from gramian.models.job import Job, Settings


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# Runs in a process that has imported everything: rank 0, which forks the others and waits for them.
TOGETHER = """
import json, os, signal, sys
from pathlib import Path
os.environ.update(WORLD_SIZE="{size}", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}")
others = []
rank = 0
for rank in range(1, {size}):
    child = os.fork()
    if not child:
        break
    others.append(child)
else:
    rank = 0
os.environ["RANK"] = str(rank)
from gramian.errors import GramianError
from gramian.models import distributed, job
from gramian.models.job import Job, Settings
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
code = 0
try:
    if True:
{body}
except GramianError as error:
    print(f"rank {{rank}}: {{type(error).__name__}}: {{error}}", file=sys.stderr, flush=True)
    code = 2
if rank:
    os._exit(code)
codes = [code] + [os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) for other in others]
print(json.dumps(codes), flush=True)
raise SystemExit(0)
"""


def together(body: str, size: int = 2) -> tuple[list[int], Result]:
    """Run code on every rank; exit codes by rank, and the streams."""
    lines = "\n".join(f"        {line}" for line in body.splitlines())
    done = launcher()("--version", before=TOGETHER.format(size=size, port=free_port(), body=lines))
    assert done.code == 0, done.err
    return json.loads(done.out.splitlines()[-1]), done


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(t[:120] for t in texts * 4), encoding="utf-8")  # several batches
    return file


SETTINGS = {"features": Settings(keep=0.4), "bytes": Settings(keep=0.3, cost="bytes", embeddings=True)}


@pytest.fixture(scope="session")
def single(encoder_directory: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process writes."""
    out = {}
    for name, settings in SETTINGS.items():
        out[name] = tmp_path_factory.mktemp("single") / "out"
        Job(str(encoder_directory), str(text), out[name], settings).run()
    return out


def compare(out: Path, reference: Path) -> None:
    a, b = (json.loads((d / "plan.json").read_text()) for d in (out, reference))
    for one, other in zip(a["entries"], b["entries"], strict=True):
        assert {**one, "predicted": 0} == {**other, "predicted": 0}
        assert one["predicted"] == pytest.approx(other["predicted"], rel=1e-6, abs=1e-12)
    found, expected = (load_file(d / "model.safetensors") for d in (out, reference))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        difference = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-30)
        assert difference <= 1e-6, (name, float(difference))


def job(model: Path, text: Path, out: Path, settings: Settings) -> str:
    return f"report = Job({str(model)!r}, {str(text)!r}, Path({str(out)!r}), {settings!r}).run()\n"


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_as_one_process(
    name: str, size: int, single: dict[str, Path], encoder_directory: Path, text: Path, tmp_path: Path
) -> None:
    body = job(encoder_directory, text, tmp_path / "out", SETTINGS[name]) + "assert bool(report) == (rank == 0)"
    codes, done = together(body, size)
    assert codes == [0] * size, done.err
    assert sorted(os.listdir(tmp_path)) == ["out"]
    compare(tmp_path / "out", single[name])


def test_work_is_shared(encoder_directory: Path, text: Path, tmp_path: Path) -> None:
    """Each rank runs its batches, computes its curves and fits its entries, and no other's."""
    body = f"""
counts = {{"batches": 0, "curves": 0, "fits": 0}}
def counted(key, function):
    def call(*args, **kwargs):
        counts[key] += 1
        return function(*args, **kwargs)
    return call
from gramian.models.workload import Workload
Workload._probe = counted("batches", Workload._probe)
distributed.priced_curve = counted("curves", distributed.priced_curve)
distributed.build_entry = counted("fits", distributed.build_entry)
{job(encoder_directory, text, tmp_path / "out", SETTINGS["features"])}
Path({str(tmp_path)!r}, str(rank)).write_text(json.dumps(counts))"""
    codes, done = together(body.strip())
    assert codes == [0, 0], done.err
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1))
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert first["fits"] + second["fits"] == len(plan["entries"])
    for key in first:
        assert 0 <= first[key] - second[key] <= 1
        assert second[key] > 0


def test_more_ranks_than_batches(tmp_path: Path, encoder_directory: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Paragraph number {i} is about functions and classes." for i in range(16)))
    Job(str(encoder_directory), str(file), tmp_path / "single", Settings(keep=0.5)).run()
    codes, done = together(job(encoder_directory, file, tmp_path / "out", Settings(keep=0.5)), 3)
    assert codes == [0, 0, 0], done.err
    compare(tmp_path / "out", tmp_path / "single")


DEATHS = {
    "collecting": "if rank == 1: distributed.collect_here = die",
    "planning": "if rank == 1: distributed.priced_curve = die",
    "fitting": "if rank == 1: distributed.build_entry = die",
    "first": "if rank == 0: distributed.build_entry = die",
}


@pytest.mark.parametrize("moment", DEATHS)
def test_a_rank_that_dies(
    moment: str, single: dict[str, Path], encoder_directory: Path, text: Path, tmp_path: Path
) -> None:
    body = job(encoder_directory, text, tmp_path / "out", SETTINGS["features"])
    if moment == "first":  # rank 0 keeps the journal; here it is the one that dies, and rank 1 that tells
        lines = f"if rank == 0:\n    os._exit(0) if os.fork() == 0 else None\n{DEATHS[moment]}\n{body}"
    killed = "first" if moment == "first" else "second"
    if killed == "first":
        code = TOGETHER.format(
            size=2, port=free_port(), body="\n".join(f"        {line}" for line in lines.splitlines())
        )
        done = launcher()("--version", before=code)
        assert done.code == -signal.SIGKILL
        work = next(tmp_path.glob(".out.gramian-*"))
    else:
        codes, done = together(f"{DEATHS[moment]}\n{body}")
        assert codes == [2, -signal.SIGKILL], done.err
        line = next(line for line in done.err.splitlines() if line.startswith("rank 0: "))
        assert line.startswith("rank 0: LostRankError: ")
        assert "another rank ended or does not answer" in line
        assert "run the same command again" in line
        assert not (tmp_path / "out").exists()
        work = next(tmp_path.glob(".out.gramian-*"), None)
    if moment != "collecting":
        assert work is not None
        assert (work / "grams.sealed").exists()
        again = "distributed.collect_here = die\n" + body
    else:
        assert work is None  # there was nothing worth keeping
        again = body
    codes, done = together(again)
    assert codes == [0, 0], done.err
    compare(tmp_path / "out", single["features"])


def test_a_bad_rank_is_told(encoder_directory: Path, text: Path, tmp_path: Path) -> None:
    """An error on one rank is told there; the others say that they lost it. Other settings are refused on all."""
    lines = """
def bad(*args, **kwargs):
    raise GramianError("layer x: NaN or Inf among the samples")
if rank == 1: distributed.collect_here = bad
"""
    codes, done = together(lines.strip() + "\n" + job(encoder_directory, text, tmp_path / "out", Settings()))
    assert codes == [2, 2]
    assert "rank 1: GramianError: layer x" in done.err
    assert "rank 0: LostRankError" in done.err
    body = job(encoder_directory, text, tmp_path / "out", Settings(keep=0.5)).replace(
        "keep=0.5", "keep=0.5 + rank / 10"
    )
    codes, done = together(body)
    assert codes == [2, 2]
    assert done.err.count("rank 1 has another model, text or settings than rank 0") == 2
    assert not list(tmp_path.iterdir())


def test_torchrun(single: dict[str, Path], encoder_directory: Path, text: Path, tmp_path: Path) -> None:
    """As users start it: two processes of the launcher, the second of which dies while fitting; then a run that ends."""
    script = tmp_path / "run.py"
    body = job(encoder_directory, text, tmp_path / "o" / "out", SETTINGS["features"])
    start = "import os, signal, sys\nfrom pathlib import Path\nfrom gramian.errors import GramianError\n"
    start += "from gramian.models import distributed\nfrom gramian.models.job import Job, Settings\n"
    death = "if os.environ['RANK'] == '1': distributed.build_entry = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
    end = (
        "try:\n    {}\nexcept GramianError as error:\n    print(error, file=sys.stderr, flush=True)\n    sys.exit(2)\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    for lines, code in ((start + death, 1), (start, 0)):
        script.write_text(lines + end.format(body.strip()))
        done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
        assert (done.returncode != 0) == bool(code), done.stderr
        if code:
            assert "run the same command again" in done.stderr
            assert list((tmp_path / "o").glob(".out.gramian-*/grams.sealed"))
    compare(tmp_path / "o" / "out", single["features"])
