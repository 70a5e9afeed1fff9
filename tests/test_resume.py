"""A run that is killed goes on where it was and ends with the same bytes; nothing half-made is ever at ``--out``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from commands import ENVIRONMENT, KILL, Launcher, Result, launcher, listing
from gramian.errors import GramianError
from gramian.models import journal

COMPRESS = ("--keep", 0.1, "--heal", 15, "--rate", 1e-4)
TIMED = {"report.json", "report.html"}
"""Files that tell how long things took; everything else is the same in every run."""


@pytest.fixture(scope="session")
def launch() -> Launcher:
    return launcher()


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    file = tmp_path_factory.mktemp("few") / "text.txt"
    file.write_text("\n\n".join(text[:160] for text in texts[:20]), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def whole(
    encoder_directory: Path, few: Path, launch: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = launch("compress", encoder_directory, "--data", few, *COMPRESS, "--out", out, before=PATCHED)
    assert done.code == 0, done.err
    assert os.listdir(out.parent) == ["out"]
    quality = json.loads((out / "report.json").read_text())["quality"]
    # Healing came closer on the calibration texts, or the start would have been put back.
    assert quality["held_out"]["relative_error"] != quality["before_healing"]["relative_error"]
    return listing(out)


# What runs in the child before the command: less waiting (timing only fills the report), healing that keeps its state
# often, and the means to kill itself.
PATCHED = (
    KILL
    + """
from pathlib import Path
import gramian.models.job as job, gramian.models.journal as journal, gramian.models.heal as healing
job._speed = lambda *args: []
healing.heal.__kwdefaults__["every"] = 5
"""
)
MOMENTS = {
    # Before anything is worth keeping.
    "while collecting": "job.collect = on_call(1, job.collect)",
    "Grams half written": """
def torn(path, content, write=journal.write):
    Path(path.with_name(path.name + ".partial")).write_bytes(content[: len(content) // 2])
    kill()
journal.write = torn""",
    # The n-th file of the journal is whole, the next is not there: the Grams, the plan, some of the fitted entries.
    "after the Grams": "os.rename = on_call(1, os.rename, 'after')",
    "after the plan": "os.rename = on_call(2, os.rename, 'after')",
    "after one entry": "os.rename = on_call(3, os.rename, 'after')",
    "between entries": "os.rename = on_call(6, os.rename)",
    "after fitting": "job.all_features = on_call(1, job.all_features)",
    "early in healing": "healing._loss = on_call(4, healing._loss)",
    "late in healing": "healing._loss = on_call(14, healing._loss)",
    "after healing": "job.Job._report = on_call(1, job.Job._report)",
    # Saving.
    "before saving": "job.Job._publish = on_call(1, job.Job._publish)",
    "weights saved, not published": "job.Loaded.save = on_call(1, job.Loaded.save, 'after')",
    "report half written": """
def torn(path, content, write=journal.write):
    if path.name == "report.json":
        path.write_bytes(content[:100])
        kill()
    write(path, content)
journal.write = torn""",
    "before publishing": """
def publish(old, new, rename=os.rename):
    if Path(new).name == "out":
        kill()
    rename(old, new)
os.rename = publish""",
}


def check(out: Path, whole: dict[str, bytes]) -> None:
    found = listing(out)
    assert set(found) == set(whole)
    different = [name for name in found if name not in TIMED and found[name] != whole[name]]
    assert not different


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    moment: str, whole: dict[str, bytes], encoder_directory: Path, few: Path, launch: Launcher, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("compress", encoder_directory, "--data", few, *COMPRESS, "--out", out)
    killed = launch(*command, before=PATCHED + MOMENTS[moment])
    assert killed.code == -signal.SIGKILL, killed
    assert not out.exists()
    (work,) = tmp_path.iterdir()
    assert work.name.startswith(".out.gramian-")
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("*.sealed")}
    collected = "job.collect = kill" if (work / "grams.sealed").exists() else ""  # what is there is not made again
    planned = "job.make_plan = kill" if (work / "plan.json").exists() else ""
    assert bool(kept) == bool(collected) == (moment not in list(MOMENTS)[:2])
    done = launch(*command, before="\n".join([PATCHED, collected, planned]))
    assert done.code == 0, done.err
    assert os.listdir(tmp_path) == ["out"]
    check(out, whole)


def test_killed_again_and_again(
    whole: dict[str, bytes], encoder_directory: Path, few: Path, launch: Launcher, tmp_path: Path
) -> None:
    """Every life ends after some new files; the run still ends."""
    out = tmp_path / "out"
    command = ("compress", encoder_directory, "--data", few, *COMPRESS, "--out", out)
    lives = 0
    while not out.exists():
        lives += 1
        assert lives < 20
        done = launch(*command, before=PATCHED + f"os.rename = on_call({1 + lives}, os.rename, 'after')")
        assert done.code in (0, -signal.SIGKILL), done.err
    assert lives > 3
    check(out, whole)


def test_a_kill_from_outside(
    whole: dict[str, bytes], encoder_directory: Path, few: Path, launch: Launcher, tmp_path: Path
) -> None:
    """A process of its own, killed by another one as soon as the journal has grown a little."""
    out = tmp_path / "out"
    command = [str(x) for x in ("compress", encoder_directory, "--data", few, *COMPRESS, "--out", out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "gramian.cli.main", *command], stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list(tmp_path.glob(".out.gramian-*/built/*.sealed")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not out.exists()
    done = launch(*command, before=PATCHED)
    assert done.code == 0, done.err
    check(out, whole)


def test_an_interrupt_keeps_the_journal_and_says_so(
    whole: dict[str, bytes], encoder_directory: Path, few: Path, launch: Launcher, tmp_path: Path
) -> None:
    command = ("compress", encoder_directory, "--data", few, *COMPRESS, "--out", tmp_path / "out")
    before = """
def interrupt(*args, loss=healing._loss, calls=iter(range(100))):
    if next(calls) == 8:
        raise KeyboardInterrupt
    return loss(*args)
healing._loss = interrupt"""
    done = launch(*command, before=PATCHED + before)
    assert done.code == 130
    assert done.err.splitlines()[-1] == "interrupted; run the same command again to go on"
    (work,) = tmp_path.iterdir()
    assert (work / "grams.sealed").exists()
    assert launch(*command, before=PATCHED + "job.collect = kill").code == 0
    check(tmp_path / "out", whole)


# What is reused and what is not -------------------------------------------------------------------------------------


@pytest.fixture
def halted(encoder_directory: Path, few: Path, launch: Launcher, tmp_path: Path) -> Path:
    """The work directory of a run that was killed after two fitted entries."""
    command = ("compress", encoder_directory, "--data", few, *COMPRESS, "--out", tmp_path / "out")
    assert launch(*command, before=PATCHED + "os.rename = on_call(4, os.rename, 'after')").code == -9
    (work,) = tmp_path.iterdir()
    assert sorted(p.name for p in work.rglob("*.sealed")) == ["00000.sealed", "00001.sealed", "grams.sealed"]
    return work


def test_other_settings_models_and_texts_have_a_journal_of_their_own(
    halted: Path, encoder_directory: Path, few: Path, launch: Launcher, tmp_path: Path
) -> None:
    stop = PATCHED + "job.make_plan = kill"  # a journal that is found has a plan; one that is not comes here
    base = {"--data": few, "--out": tmp_path / "out", **dict(zip(COMPRESS[::2], COMPRESS[1::2], strict=True))}
    assert (
        launch("compress", encoder_directory, *flat(base), before=PATCHED + "job.collect = kill; job.heal = kill").code
        == -9
    )
    assert list(tmp_path.iterdir()) == [halted]
    other = tmp_path / "other.txt"
    other.write_text(few.read_text() + "\n\nOne more paragraph.\n\nAnd another one.")
    changes = [
        {"--keep": 0.11},
        {"--seed": 1},
        {"--rate": 2e-3},
        {"--heal": 16},
        {"--data": other},
        {"--cost": "flops"},
    ]
    changes += [{"--exclude": "*.query"}, {"--structures": "skeleton"}, {"--out": tmp_path / "elsewhere"}]
    for number, change in enumerate(changes, 2):
        assert launch("compress", encoder_directory, *flat({**base, **change}), before=stop).code == -9, change
        assert len(list(tmp_path.glob(".*.gramian-*"))) == number, change
    assert len(list(tmp_path.glob(".elsewhere.gramian-*"))) == 1


def flat(options: dict[str, object]) -> list[object]:
    return [part for pair in options.items() for part in pair]


def test_two_runs_side_by_side_do_not_meet(
    whole: dict[str, bytes], encoder_directory: Path, few: Path, launch: Launcher, tmp_path: Path
) -> None:
    for name in ("a", "out"):  # both stopped half-way, in one folder
        command = ("compress", encoder_directory, "--data", few, *COMPRESS, "--out", tmp_path / name)
        assert launch(*command, before=PATCHED + "job.heal = kill").code == -9
    assert len(list(tmp_path.iterdir())) == 2
    command = ("compress", encoder_directory, "--data", few, *COMPRESS, "--out", tmp_path / "out")
    assert launch(*command, before=PATCHED).code == 0
    check(tmp_path / "out", whole)
    assert len(list(tmp_path.glob(".a.gramian-*/built/*.sealed"))) > 4  # the other's journal is untouched


def test_the_same_command_twice_at_once(halted: Path, encoder_directory: Path, few: Path, launch: Launcher) -> None:
    import fcntl

    before = listing(halted)
    with open(halted / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = launch("compress", encoder_directory, "--data", few, *COMPRESS, "--out", halted.parent / "out")
    refuse(done, str(halted), "running already", "wait")
    assert listing(halted) == before


# Damage -------------------------------------------------------------------------------------------------------------


def refuse(done: Result, *words: str) -> None:
    assert done.code == 2, (done.out, done.err)
    lines = [line for line in done.err.splitlines() if not line.endswith(" ...")]  # what it was at
    assert len(lines) == 1, done.err
    assert lines[0].startswith("gramian: ")
    for word in words:
        assert word in lines[0], done.err


@pytest.mark.parametrize("name", ["grams.sealed", "plan.json", "built/00001.sealed"])
def test_a_damaged_journal_is_named(
    name: str, halted: Path, whole: dict[str, bytes], encoder_directory: Path, few: Path, launch: Launcher
) -> None:
    file = halted / name
    content = file.read_bytes()
    out = halted.parent / "out"
    command = ("compress", encoder_directory, "--data", few, *COMPRESS, "--out", out)
    damages = [content[:-7], b""]
    if name != "plan.json":  # a person's file; every byte of the others is under seal
        damages.append(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    for damage in damages:
        file.write_bytes(damage)
        refuse(launch(*command, before=PATCHED), str(file), "damaged journal", "remove this file")
        assert not out.exists()
    file.unlink()  # the remedy
    assert launch(*command, before=PATCHED).code == 0
    check(out, whole)


def test_sealed_files(tmp_path: Path) -> None:
    path = tmp_path / "a.sealed"
    assert journal.recall(path) is None
    tensors = {"x": torch.randn(3, 4).mT, "codes": torch.arange(5, dtype=torch.uint8), "none": torch.zeros(0)}
    journal.keep(path, tensors, {"name": "ä", "value": 0.1})
    found, description = journal.recall(path) or ({}, {})
    assert description == {"name": "ä", "value": 0.1}
    assert set(found) == set(tensors)
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in tensors.items())
    assert os.listdir(tmp_path) == ["a.sealed"]
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(journal.DamagedJournalError, match=r"a\.sealed: damaged journal"):
            journal.recall(path)


def test_the_workspace_goes_when_nothing_in_it_is_worth_keeping(tmp_path: Path) -> None:
    work = tmp_path / "made/too/work"

    def leave(error: BaseException, *names: str) -> list[str]:
        def run() -> None:
            with journal.workspace(work, "first"):
                for name in names:
                    (work / name).write_text("x")
                raise error

        with pytest.raises(type(error)):
            run()
        return sorted(os.listdir(work)) if work.exists() else os.listdir(tmp_path)

    disk = GramianError("cannot be saved")
    disk.__cause__ = OSError(28, "No space left on device")
    assert leave(GramianError("bad"), "first") == []  # it would come again
    assert leave(KeyboardInterrupt(), "second") == []
    assert leave(OSError(28, "No space left on device")) == []
    assert leave(OSError(28, "No space left on device"), "first") == ["first", "lock"]
    assert leave(disk) == ["first", "lock"]
    assert leave(journal.DamagedJournalError("damaged")) == ["first", "lock"]
    assert leave(KeyboardInterrupt()) == ["first", "lock"]
    with journal.workspace(work, "first"), pytest.raises(GramianError, match="running already"):
        journal.workspace(work, "first").__enter__()
    assert sorted(os.listdir(work)) == ["first", "lock"]
    assert leave(GramianError("bad")) == ["made"]


FULL = """
import builtins, errno
room = [{room}]
def full(number):
    room[0] -= number
    if room[0] < 0:
        raise OSError(errno.ENOSPC, "No space left on device")
def opened(path, mode="r", *args, open=open, **kwargs):
    file = open(path, mode, *args, **kwargs)
    if "w" in mode and "b" in mode:
        write = file.write
        class File:
            def __getattr__(self, name): return getattr(file, name)
            def __enter__(self): return self
            def __exit__(self, *args): file.close()
            def write(self, content):
                full(len(content))
                return write(content)
        return File()
    return file
journal.open = opened
"""


@pytest.mark.parametrize("moment", ["Grams", "entries", "report", "weights"])
def test_a_full_disk(
    moment: str, whole: dict[str, bytes], encoder_directory: Path, few: Path, launch: Launcher, tmp_path: Path
) -> None:
    out = tmp_path / "a/out"
    command = ("compress", encoder_directory, "--data", few, *COMPRESS, "--out", out)
    fill = "import errno\ndef full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')\n"
    before = (
        PATCHED
        + {
            "Grams": FULL.format(room=1000),
            "entries": fill
            + """
def write(path, content, write=journal.write):
    full() if path.name == "00002.sealed" else write(path, content)
journal.write = write""",
            "report": fill
            + "job.json.dumps, dumps = (lambda *a, **k: full() if 'allow_nan' in k else dumps(*a, **k)), job.json.dumps",
            "weights": fill + "import transformers; transformers.PreTrainedModel.save_pretrained = full",
        }[moment]
    )
    done = launch(*command, before=before)
    refuse(done, "--out", "No space left on device")
    assert not out.exists()
    if moment == "Grams":
        assert not list(tmp_path.iterdir())
    else:
        done = launch(*command, before=PATCHED + "job.collect = kill")  # room was made: it goes on
        assert done.code == 0, done.err
        check(out, whole)


def test_what_is_written_holds_no_time_and_no_place(whole: dict[str, bytes]) -> None:
    year = re.compile(rb"20[2-9]\d-\d\d")
    for name in set(whole) - TIMED:
        assert b"/tmp/" not in whole[name], name
        assert not year.search(whole[name]), name
    recipe = json.loads(whole["config.json"])["quantization_config"]["recipe"]
    assert recipe["keep"] == 0.1
    assert recipe["heal"] == 15
    assert not any("time" in key or "date" in key for key in recipe)
