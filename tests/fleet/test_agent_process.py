"""The agent as a device runs it: its own process, and none of the packages that a device does not have."""

import asyncio
import os
import sys

import numpy as np
from whole_fleet import coordinator_here, make_fleet, until

from fedtide.wire.signatures import SigningKey

NOT_ON_A_DEVICE = (
    *("torch", "onnx", "onnxscript", "sklearn", "scipy", "matplotlib"),
    *("safetensors", "prometheus_client", "rich"),
)
SHIM = 'raise ModuleNotFoundError("no module named {0!r} on a device", name="{0}")\n'


def device_environment(path):
    """An environment in which importing what a device lacks fails."""
    for name in NOT_ON_A_DEVICE:
        (path / name).mkdir(parents=True)
        (path / name / "__init__.py").write_text(SHIM.format(name))
    return {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}


async def run(environment, *arguments):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


def test_the_shim_hides_what_a_device_lacks(tmp_path):
    environment = device_environment(tmp_path / "shim")
    tries = [f"try: import {name}\nexcept ModuleNotFoundError: print({name!r})" for name in NOT_ON_A_DEVICE]
    assert asyncio.run(run(environment, "-c", "\n".join(tries))) == (0, "\n".join([*NOT_ON_A_DEVICE, ""]))


def test_an_agent_without_torch_contributes_updates(digits, broker, tmp_path):
    fleet = make_fleet(tmp_path, digits, broker.port, devices=0, goal=2)
    environment = device_environment(tmp_path / "shim")
    np.savez(tmp_path / "examples.npz", x=digits.train.inputs[0], y=digits.train.targets)
    folder, log = tmp_path / "pump-7", tmp_path / "agent.log"

    async def scenario():
        code, output = await run(
            environment, "-m", "fedtide", "agent", "init", str(folder), "--fleet", fleet.name,
            "--device", "pump-7", "--broker", f"127.0.0.1:{fleet.port}", "--coordinator-key", str(fleet.key),
            "--data", str(tmp_path / "examples.npz"),
        )  # fmt: skip
        assert code == 0, output
        public = SigningKey.load(folder / "device.key").public
        (fleet.directory.roster / "pump-7.pub").write_text(f"{public}\n")
        async with coordinator_here(fleet) as (service, _running):
            with log.open("wb") as file:
                agent = await asyncio.create_subprocess_exec(
                    *(
                        sys.executable,
                        "-m",
                        "fedtide",
                        "agent",
                        "run",
                        "--config",
                        str(folder / "agent.toml"),
                    ),
                    env=environment,
                    stderr=file,
                )
            try:
                await until(lambda: service.status("").updates.applied >= 2, 40, log.read_text)
                assert service.status("").devices[0].online
                agent.terminate()
                assert await agent.wait() == 0, log.read_text()
                await until(lambda: not service.status("").devices[0].online, 10, log.read_text)
            finally:
                if agent.returncode is None:
                    agent.kill()
                    await agent.wait()
            return service.status("running")

    seen = asyncio.run(scenario())
    assert (seen.devices[0].device, seen.devices[0].rejected) == ("pump-7", 0)
    assert seen.updates.applied >= 2
    assert "Traceback" not in log.read_text()
