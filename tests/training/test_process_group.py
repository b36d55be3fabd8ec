"""What a process says of its group: which errors tell of a peer that is gone, and whether all share a folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import distributed

from gkd_hf.errors import InputError
from gkd_hf.training import ending, process_group

GONE = [
    RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4242\nmore"),
    RuntimeError("[gloo/transport/tcp/pair.cc:145] read [10.0.0.2]:4242: Connection reset by peer"),
    RuntimeError(
        "DDP expects same model across all ranks, but Rank 1 has 73 params, while rank 0 has inconsistent 0 params."
    ),
    distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error"
    ),
    distributed.DistNetworkError("failed to recv, got 0 bytes"),
    RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 15000ms for recv operation to complete"),
    distributed.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//store_based_barrier_key:1"),
]
OTHERS = [
    RuntimeError(
        "DDP expects same model across all ranks, but Rank 1 has 73 params, while rank 0 has inconsistent 70 params."
    ),
    RuntimeError("[gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"),
    distributed.DistBackendError(
        "NCCL error in: init.cc:99, invalid usage. Duplicate GPU detected : rank 0 and rank 1"
    ),
    distributed.DistNetworkError("The server socket has failed to listen: EADDRINUSE, address already in use"),
    RuntimeError("DataLoader timed out after 10 seconds"),
    ValueError("gloo: Connection closed by peer"),
]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second of two, and the first is done."""

    def left(code: int) -> None:
        raise SystemExit(code)

    state = SimpleNamespace(process_index=1, is_main_process=False)
    for module, name, value in (
        (process_group, "several", lambda: True),
        (process_group, "PartialState", lambda: state),
        (process_group, "of_main_process", lambda value: "run"),
        (process_group, "wait_patiently", lambda: None),
        (process_group, "HEAD_START", 0.0),
        (process_group, "SHARED_DELAY", 0.1),
        (ending, "several", lambda: True),
        (ending, "leave", left),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("error", [*GONE, *OTHERS], ids=lambda error: str(error)[-20:])
@pytest.mark.usefixtures("two")
def test_every_error_is_told(error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    """A peer that is gone with one line, which holds the error's first; anything else with its trace."""

    def run() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        ending.exit_code(run)
    told = capfd.readouterr().err
    assert str(error).splitlines()[0] in told
    if error in GONE:
        assert told.count("\n") == 1 and "Traceback" not in told
        hung = "no answer from another process in time" in told
        assert hung == ("time" in str(error).lower()) and ended.value.code == (2 if hung else 1)
        assert hung or told.startswith("process 1: another process of the run ended")
    else:
        assert "Traceback" in told and ended.value.code == 1


@pytest.mark.usefixtures("two")
def test_each_process_tries_the_folder_itself(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of the main process is not seen by process 1"):
        process_group.check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []
    of_main = tmp_path / ".seen-run-0"
    of_main.touch()
    process_group.check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == [of_main]
    with pytest.raises(InputError, match="cannot be written by process 1"):
        process_group.check_shared(of_main / "below a file")


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".seen-0123").touch()
    process_group.check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []
