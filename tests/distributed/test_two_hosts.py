"""The quickstart's stages on two hosts: two network namespaces of this machine, joined by a virtual cable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launched import LAUNCH, ROOT, free_port, own_environment

STAGES = ("task_agnostic", "domain_agnostic", "task")
STEPS = 6
SCRIPT = [str(ROOT / "scripts" / "run_gkd.py"), "evaluate=['toy_city:night']", "baselines=[]", "source_test=false"]
SETTINGS = (f"max_steps={STEPS}", "batch_size=8", "logging_steps=1", "save_steps=3", "image_size=32", "workers=0")
SCRIPT += [f"stages.{stage}.{setting}" for stage in STAGES for setting in SETTINGS]
SCRIPT += ["stages.task_agnostic.query_warmup_steps=3", "stages.task.window=32", "stages.task.stride=32"]
SCRIPT += [f"data.toy_city.{name}" for name in ("size=32", "pool_images=32", "train_images=16", "test_images=4")]


@dataclass
class Host:
    """Where one launcher runs. `prefix`: of its commands. `interface`: to the other host."""

    address: str
    prefix: list[str]
    interface: str

    def sent(self) -> int:
        """Bytes that left for the other host."""
        show = [*self.prefix, "ip", "-s", "-j", "link", "show", "dev", self.interface]
        return json.loads(subprocess.run(show, check=True, capture_output=True, text=True).stdout)[0]["stats64"]["tx"][
            "bytes"
        ]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two namespaces with an address each; they see nothing of this machine's own network."""
    names = [f"gkd{os.getpid()}{letter}" for letter in "ab"]
    found = [Host(f"10.77.0.{n}", ["ip", "netns", "exec", name], "cable") for n, name in enumerate(names, start=1)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, host in zip(names, found, strict=True):
                ip("-n", name, "addr", "add", f"{host.address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here, which takes root and iproute2: {error}")
        yield found
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start(arguments: list[str], out: Path, prefix: list[str], **variables: str) -> subprocess.Popen:
    log = (out.parent / f"{out.name}.{len(list(out.parent.glob('*.log')))}.log").open("w")
    return subprocess.Popen(
        [*prefix, *LAUNCH, *arguments, *SCRIPT, f"output_dir={out}"],
        env=own_environment(**variables),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(launchers: list[subprocess.Popen], logs: Path) -> None:
    try:
        for launcher in launchers:
            launcher.wait(timeout=240)
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
        told = "\n".join(path.read_text()[-3000:] for path in sorted(logs.glob("*.log")))
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), told


def curve(out: Path, stage: str) -> list[dict[str, float]]:
    state = json.loads((out / "stages" / stage / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [{k: v for k, v in entry.items() if k.startswith("loss")} for entry in state["log_history"]]


def test_two_hosts_train_what_one_does(hosts: list[Host], tmp_path: Path) -> None:
    """With as many processes: the batch statistics of the quickstart's student hang on their number alone."""
    apart, together = tmp_path / "apart", tmp_path / "together"
    preset = ["--config_file", str(ROOT / "scripts" / "accelerate" / "multinode.yaml"), "--num_processes", "2"]
    preset += ["--main_process_ip", hosts[0].address, "--main_process_port", "29531"]
    finish(
        [
            start([*preset, "--machine_rank", str(rank)], apart, host.prefix, GLOO_SOCKET_IFNAME=host.interface)
            for rank, host in enumerate(hosts)
        ],
        tmp_path,
    )
    ddp = ["--config_file", str(ROOT / "scripts" / "accelerate" / "ddp.yaml"), "--num_processes", "2"]
    finish([start([*ddp, "--main_process_port", str(free_port())], together, [])], tmp_path)

    weights = load_file(apart / "stages" / "task_agnostic" / "model" / "model.safetensors")
    assert weights.keys() == load_file(together / "stages" / "task_agnostic" / "model" / "model.safetensors").keys()
    # Each of the steps took the student's gradients over the cable, both ways.
    gradients = STEPS * sum(4 * weight.numel() for weight in weights.values())
    assert all(host.sent() > gradients for host in hosts), [host.sent() for host in hosts]
    for stage in STAGES:
        arguments = torch.load(
            apart / "stages" / stage / f"checkpoint-{STEPS}" / "training_args.bin", weights_only=False
        )
        assert (arguments.world_size, arguments.per_device_train_batch_size) == (2, 4)
        losses = curve(apart, stage)
        assert len(losses) == STEPS and len({entry["loss"] for entry in losses}) > 1
        for ours, expected in zip(losses, curve(together, stage), strict=True):
            assert ours == pytest.approx(expected, abs=1e-5), stage
    reports = [json.loads((out / "report.json").read_text())["targets"] for out in (apart, together)]
    assert reports[0]["toy_city:night"]["images"] == 4 and reports[0] == reports[1]
