"""wandb and TensorBoard: checked before a run starts, `step` as the x axis, and no failure of theirs ends a run."""

import io
import json
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import train
from config import UserError
from tests.tiny import log_lines as lines
from tests.tiny import train_flags as flags
from training.settings import TrainConfig
from training.tracking import Tracker


@pytest.mark.slow
def test_wandb_keeps_its_run(tools, tmp_path, monkeypatch):
    """Offline: the id is made once and used again on resume; the files wandb writes hold our values at our steps."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    extra = ("--report-to", "wandb", "--wandb-project", "toy")
    train.main(flags(tools["data"], tmp_path, *extra, steps=2))
    identity = (tmp_path / "run/wandb-id.txt").read_text()
    train.main(flags(tools["data"], tmp_path, *extra, steps=4))
    assert (tmp_path / "run/wandb-id.txt").read_text() == identity
    written = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(written) == 2
    for _ in range(100):  # wandb's own process writes the files, and may be behind
        records = [record for file in written for record in wandb_records(file)]
        history = [
            {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        if len(history) == 4:
            break
        time.sleep(0.2)
    metrics = [
        (record.metric.name, record.metric.glob_name, record.metric.step_metric)
        for record in records
        if record.WhichOneof("record_type") == "metric"
    ]
    assert [record["step"] for record in history] == [1, 2, 3, 4]
    assert metrics[:2] == [("step", "", ""), ("", "*", "step")]
    assert [record["loss"] for record in history] == pytest.approx([line["loss"] for line in lines(tmp_path)])


def wandb_records(file: Path) -> list:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format around protobuf records."""
    from wandb.proto import wandb_internal_pb2

    data, at, record, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little left in the block for a record's header
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            record = b""
            found.append(message)
    return found


class FakeWandb(ModuleType):
    """The part of wandb that a tracker uses; keeps what it is given."""

    Error, Image = type("Error", (Exception,), {}), str

    def __init__(self, **settings):
        super().__init__("wandb")
        self.calls, self.failing = [], ()
        settings = SimpleNamespace(**{"mode": "online", "base_url": "http://localhost:9", "api_key": None} | settings)
        self.setup = lambda: SimpleNamespace(settings=settings)
        for name in ("init", "define_metric", "log", "finish", "login"):
            setattr(self, name, partial(self._call, name))

    def _call(self, function, *args, **kwargs):
        self.calls.append((function, args, kwargs))
        if function in self.failing:
            raise self.Error(f"{function} failed.\nDetails")
        return self


def test_wandb_has_step_as_its_axis(tools, tmp_path, monkeypatch, capsys):
    """`step` is a value and the x axis, never wandb's own step, which refuses what a resumed run repeats. A run whose
    tracker fails while it trains says so once and ends well; an empty file of the id is replaced."""
    wandb = FakeWandb(mode="offline")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/wandb-id.txt").touch()
    train.main(flags(tools["data"], tmp_path, "--report-to", "wandb", "--sampling-steps", "4", "--preview-steps", "2"))
    names = [name for name, _, _ in wandb.calls]
    assert names == ["init", "define_metric", "define_metric", *["log"] * 5, "finish"]
    assert wandb.calls[0][2]["id"] == (tmp_path / "run/wandb-id.txt").read_text() != ""
    assert [(args, kwargs) for name, args, kwargs in wandb.calls if name == "define_metric"] == [
        (("step",), {}),
        (("*",), {"step_metric": "step"}),
    ]
    logged = [args[0] for name, args, kwargs in wandb.calls if name == "log" and not kwargs]
    assert [values["step"] for values in logged] == [1, 2, 3, 4, 4]
    assert logged[4]["preview"] == str(tmp_path / "run/previews/step_0000004.png")
    capsys.readouterr()

    wandb.failing = ("log", "finish")
    train.main(flags(tools["data"], tmp_path, "--report-to", "wandb", name="failing"))
    assert capsys.readouterr().out.count("warning: wandb could not be written, training goes on: log failed.\n") == 1
    assert [line["step"] for line in lines(tmp_path, "failing")] == [1, 2, 3, 4]

    wandb.failing = ("init",)
    with pytest.raises(
        UserError, match="--report-to wandb: init failed: set WANDB_MODE=offline, or choose --report-to"
    ):
        train.main(flags(tools["data"], tmp_path, "--report-to", "wandb", name="refused"))


@pytest.mark.parametrize("proxy", [None, "http://proxy:3128"])
def test_wandb_is_checked_before_anything_is_loaded(tools, tmp_path, monkeypatch, proxy):
    """No package, no network, no key, a wrong key: one sentence each, although the dataset does not exist."""

    def start():
        train.main(flags(tmp_path / "nowhere", tmp_path, "--report-to", "wandb"))

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for absent in (None, ModuleType("wandb")):  # the second is a folder ./wandb of earlier runs
        monkeypatch.setitem(sys.modules, "wandb", absent)
        with pytest.raises(
            UserError, match="--report-to wandb: the package wandb is not installed: pip install wandb, or"
        ):
            start()
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"http://localhost:{server.getsockname()[1]}"
        monkeypatch.setitem(sys.modules, "wandb", FakeWandb(base_url=address))
        if proxy is None:
            with pytest.raises(UserError, match="localhost cannot be reached: set WANDB_MODE=offline and upload later"):
                start()
        else:
            monkeypatch.setenv("HTTPS_PROXY", proxy)  # which reaches servers that this machine cannot
        server.listen()
        with pytest.raises(
            UserError, match="no API key: run `wandb login` or set WANDB_API_KEY, or set WANDB_MODE=offline"
        ):
            start()
        wandb = FakeWandb(base_url=address, api_key="k")
        wandb.failing = ("login",)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        with pytest.raises(UserError, match="--report-to wandb: login failed: run `wandb login --relogin`"):
            start()
        assert wandb.calls == [("login", (), {"verify": True})]
        wandb.failing = ()
        with pytest.raises(FileNotFoundError, match="nowhere"):
            start()
    assert not (tmp_path / "run").exists()


def test_tensorboard_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        UserError, match="--report-to tensorboard: the package tensorboard is not installed: pip install"
    ):
        train.main(flags(tmp_path / "nowhere", tmp_path, "--report-to", "tensorboard"))


def test_tensorboard(tools, tmp_path):
    """The other tracker: the same values at the same steps, over a resume."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (2, 4):
        train.main(flags(tools["data"], tmp_path, "--report-to", "tensorboard", steps=steps))
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [e.step for e in losses] == [1, 2, 3, 4]
    assert [e.value for e in losses] == pytest.approx([line["loss"] for line in lines(tmp_path)], rel=1e-6)


def test_a_full_disk_at_the_end(tmp_path):
    """What could not be written before closing either is reported, not raised, and the tracker is closed all the same."""

    class Full(io.StringIO):
        def close(self):
            raise OSError(28, "No space left on device")

    tracker = Tracker(tmp_path, TrainConfig(), 0)
    closed = []
    tracker._stream.close()
    tracker._stream, tracker._external = Full(), SimpleNamespace(close=lambda: closed.append(True))
    tracker.close()
    assert closed == [True]
