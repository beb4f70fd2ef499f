"""A page of runs that go on: how far they are, the time left, and the address where it is served."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from headgate.errors import ConfigError
from headgate.experiments.compare import Comparison
from headgate.experiments.report import write_report
from headgate.experiments.report.live import Server, fingerprint, follow, is_finished, own_port
from headgate.experiments.report.progress import duration, progress, seconds_left, share_done
from headgate.experiments.report.reading import read_study
from headgate.experiments.run_directory import RunDirectory

from .conftest import SKILL, make_comparison, recipe, write_run

SEEDS = [1, 2, 3]


def begun(folder: Path) -> Comparison:
    """A comparison of which nothing has run: its outline alone, as ``execute`` writes it first."""
    comparison = Comparison(recipe(folder, SEEDS))
    comparison._note({name: {} for name in comparison.arms})
    return comparison


def started(run: RunDirectory, step: int, steps: int) -> None:
    """A run that has trained ``step`` steps at 10 tokens a step and 5 tokens a second."""
    row = {"step": step, "loss": 1.0, "trained_tokens": 10.0 * step, "tokens_per_second": 5.0, "flops": 1.0}
    run.metrics_file.write_text(json.dumps(row) + "\n")


def test_a_comparison_of_which_nothing_has_run_has_a_page(tmp_path: Path) -> None:
    comparison = begun(tmp_path)
    page = write_report(comparison.folder, refresh=7).page.read_text()
    assert '<meta http-equiv="refresh" content="7">' in page
    assert page.count(">0 of 3<") == len(SKILL) and "not known yet" in page
    assert not is_finished(comparison.folder)


def test_time_left_is_what_the_pace_so_far_gives(tmp_path: Path) -> None:
    """30 steps of 2 seconds each: after 10 of them 40 s are left of this run, and 60 s of each that has not begun."""
    comparison = begun(tmp_path)
    arm = comparison.arms["lora"].model_copy(update={"seed": 1})
    directory = RunDirectory.of(arm)
    directory.open(arm)
    started(directory, 10, 30)
    found = {each.arm: each for each in progress(read_study(comparison.folder))}
    lora = found["lora"]
    assert (lora.complete, lora.running, lora.planned) == (0, 1, 3)
    assert lora.share == pytest.approx(1 / 9) and lora.seconds_left == pytest.approx(40 + 2 * 60)
    assert found["schema_bank"].seconds_left == pytest.approx(3 * 60), (
        "an arm that waits takes the others' pace"
    )
    whole = seconds_left(list(found.values()))
    assert whole == pytest.approx(sum(each.seconds_left or 0 for each in found.values()))
    page = write_report(comparison.folder, refresh=5).page.read_text()
    assert "0 of 3, 1 running" in page
    assert "Not complete, and shown only" not in page, "that runs go on is no warning"
    assert "Not complete, and shown only" in write_report(comparison.folder).page.read_text()


def test_the_share_done_by_steps_by_a_stream_and_by_epochs() -> None:
    assert share_done({"training": {"max_steps": 40}}, {"step": 10}) == 0.25
    stream = {"data": {"stream": [{"steps": 60}, {"steps": 40}]}, "training": {"max_steps": None}}
    assert share_done(stream, {"step": 25}) == 0.25
    assert share_done({"training": {"epochs": 4}}, {"step": 9, "epoch": 1.0}) == 0.25
    assert share_done({"training": {"max_steps": 0}}, {"step": 0}) == 0.0
    assert [duration(s) for s in (None, 40, 720, 12600)] == ["not known yet", "40 s", "12 min", "3.5 h"]


def test_a_finished_comparison_has_neither_progress_nor_refresh(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path, SEEDS)
    assert is_finished(folder)
    page = write_report(folder).page.read_text()
    assert "How far it is" not in page and "http-equiv" not in page


def test_it_follows_a_comparison_to_its_end(tmp_path: Path) -> None:
    """The page is served from the first outline on, says more as runs end, and stops asking when the verdict stands."""
    comparison = begun(tmp_path)
    said: list[str] = []
    thread = threading.Thread(target=follow, args=(comparison.folder, 0, 1, said.append), daemon=True)
    thread.start()

    def asked(what: str) -> bool:
        if not said:
            return False
        try:
            with urllib.request.urlopen(said[0].split()[1], timeout=5) as answer:
                return what in answer.read().decode()
        except urllib.error.URLError:
            return False

    def comes(what: str) -> bool:
        limit = time.monotonic() + 200
        while time.monotonic() < limit:
            if asked(what):
                return True
            time.sleep(0.2)
        return False

    assert comes("0 of 3")
    before = fingerprint(comparison.folder)
    write_run(comparison.arms["lora"].model_copy(update={"seed": 1}), SKILL["lora"])
    assert fingerprint(comparison.folder) != before
    assert comes("1 of 3")
    make_comparison(tmp_path, SEEDS)
    thread.join(400)
    assert not thread.is_alive(), "every run is complete and the page was asked for"
    assert "http-equiv" not in (comparison.folder / "report" / "index.html").read_text()


def test_it_is_served_to_this_machine_alone(tmp_path: Path) -> None:
    (tmp_path / "report" / "figures").mkdir(parents=True)
    (tmp_path / "secret").write_text("not here")
    server = Server(tmp_path, 0)
    try:
        early = urllib.request.urlopen(server.address).read().decode()  # before anything has been drawn
        assert 'http-equiv="refresh"' in early and "figures" not in early
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(server.address + "figures/")
        (tmp_path / "report" / "index.html").write_text("here")
        assert server.http.server_address[0] == "127.0.0.1"
        assert urllib.request.urlopen(server.address).read() == b"here"
        assert server.seen.wait(5)  # it is noted after the page has gone out
        for request in (
            urllib.request.Request(server.address + "../secret"),
            urllib.request.Request(server.address, headers={"Host": "elsewhere.example"}),
        ):
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(request)
        with pytest.raises(ConfigError, match="choose another one"):
            Server(tmp_path, int(server.address.rsplit(":", 1)[1].strip("/")))
    finally:
        server.close()


def test_where_the_folders_port_is_taken_another_is_said_and_used(tmp_path: Path) -> None:
    """``compare --live`` has no --port: a second one of the same folder, or any program there, must not cost it its page."""
    taken = Server(tmp_path, own_port(tmp_path))
    said: list[str] = []
    try:
        follow(tmp_path, None, 1, said.append, stopped=lambda: True)
    finally:
        taken.close()
    assert len(said) == 2 and f"port {own_port(tmp_path)} is taken" in said[0]
    assert said[1].startswith("live: http://127.0.0.1:") and f":{own_port(tmp_path)}/" not in said[1]


def test_a_folder_keeps_its_port(tmp_path: Path) -> None:
    assert own_port(tmp_path) == own_port(tmp_path / "x" / "..") and 8400 <= own_port(tmp_path) < 9400
    with pytest.raises(ConfigError, match=r"--port 99999: .*choose another one"):
        Server(tmp_path, 99_999)
    with pytest.raises(ConfigError, match="at least one second"):
        follow(tmp_path, 0, 0)
