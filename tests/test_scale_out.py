"""`docs/scale-out.md` is true: its blocks, in order, in one directory, on a Ray cluster of two nodes; every way gives the same texts."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from cost_model.hardware.hardware import Hardware
from scripts.checkpoints.shapes import SIZES
from scripts.make_checkpoint import make_checkpoint
from tests.support.paths import ROOT

GUIDE = ROOT / "docs" / "scale-out.md"
_BLOCK = re.compile(r"^```(bash|python|yaml)\n# ([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROWS = 60
TOKEN = Path.home() / ".ray" / "auth_token"
#: A scheduler of one machine: the tasks of the array, one after another.
SBATCH = """#!/bin/bash
set -eu
for word; do case $word in --array=0-*) last=${word#--array=0-};; esac; command=$word; done
export SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_MAX=$last SLURM_ARRAY_TASK_COUNT=$((last + 1)) SLURM_ARRAY_JOB_ID=1
for task in $(seq 0 $last); do SLURM_ARRAY_TASK_ID=$task bash -euc "$command"; done
"""

pytestmark = pytest.mark.slow


def blocks():
    """The code of each block by what its first line says, up to a colon or a comma."""
    found = _BLOCK.findall(GUIDE.read_text("utf-8"))
    return {re.split("[:,]", title)[0]: code for _, title, code in found}


class Guide:
    """Follows the page in a directory."""

    def __init__(self, directory):
        self.directory, self.blocks = directory, blocks()
        tools = directory / "tools"
        tools.mkdir()
        for name, text in {"python": f'#!/bin/sh\nexec {sys.executable} "$@"\n', "sbatch": SBATCH}.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "GPU_MEM": "0.1",
            "CPU_MEM": "0.3",
            "NODES": "2",
            "OMP_NUM_THREADS": "1",
            "HOME": str(directory),
            # Ray uses one where there is one, and looks for it in the home directory.
            **({"RAY_AUTH_TOKEN_PATH": str(TOKEN)} if TOKEN.exists() else {}),
        }

    def run(self, title, **environment):
        """Runs a block, having written the file that its command names."""
        return self.bash(self.blocks[title], **environment)

    def bash(self, code, **environment):
        for name in re.findall(r"\b\w+\.py\b", code):
            (self.directory / name).write_text(self.blocks[f"file {name}"])
        done = subprocess.run(
            ["bash", "-euc", code],
            cwd=self.directory,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    def texts(self, name):
        """Texts by id of a file of lines, or of a directory of such."""
        path = self.directory / name
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        lines = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
        assert len(lines) == ROWS
        return {line["custom_id"]: _text(line) for line in lines}


def _text(line):
    if "generated_text" in line:
        assert not line.get("__inference_error__")
        return line["generated_text"]
    return line["response"]["body"]["choices"][0]["text"]


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The directory with a model, requests, the machine's rates, a plan, and the output of one machine."""
    made = Guide(tmp_path_factory.mktemp("shared"))
    make_checkpoint(made.directory / "model", SIZES["tiny"], dtype=torch.float32)
    Hardware.preset("cpu").save(made.directory / "machine.json")
    rows = [{"custom_id": str(row), "prompt": f"Row {row} says {row * row % 97}"} for row in range(ROWS)]
    (made.directory / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.run("plan")
    made.run("one machine")
    return made


def test_the_page_has_these_blocks():
    assert list(blocks()) == [
        "yours",
        "measure",
        "plan",
        "one machine",
        "slurm",
        "ray nodes",
        "file ray_job.py",
        "ray",
        "server",
        "file http_job.py",
        "http",
        "file sky.yaml",
    ]


def test_shards_of_an_array(guide):
    guide.run("slurm")
    assert guide.texts("slurm.jsonl") == guide.texts("out.jsonl")


def test_shards_of_rented_nodes(guide):
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load(guide.blocks["file sky.yaml"])
    nodes = str(recipe["num_nodes"])
    for rank in range(recipe["num_nodes"]):
        shown = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_NODES": nodes, "SHARED": str(guide.directory)}
        guide.bash(recipe["run"], **shown)
    guide.bash("python -m flexmoe.merge -o sky.jsonl sky.shard-*-of-2.jsonl")
    assert guide.texts("sky.jsonl") == guide.texts("out.jsonl")


@pytest.fixture(scope="module")
def address():
    """Of a cluster of two nodes on this machine, each of which says that it has a GPU."""
    pytest.importorskip("ray", reason="needs the extra: pip install 'flexmoe[ray]'")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 150 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def test_ray(guide, address):
    guide.run("ray", RAY_ADDRESS=address)
    assert guide.texts("ray-out") == guide.texts("out.jsonl")


def test_ray_through_the_server(guide, address):
    with server(guide) as port:
        guide.blocks["file http_job.py"] = guide.blocks["file http_job.py"].replace(":8000/", f":{port}/")
        guide.run("http", RAY_ADDRESS=address)
    assert guide.texts("http-out") == guide.texts("out.jsonl")


@contextmanager
def server(guide):
    """The server of the page, on a port that is free; gives the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shlex.split(
        guide.blocks["server"]
        .replace("8000", str(port))
        .replace("$GPU_MEM", guide.environment["GPU_MEM"])
        .replace("$CPU_MEM", guide.environment["CPU_MEM"])
    )
    running = subprocess.Popen([sys.executable, *command[1:]], cwd=guide.directory, env=guide.environment)
    try:
        for _ in range(300):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        yield port
    finally:
        running.terminate()
        running.wait(60)


def test_the_calculation_is_the_planners():
    text = GUIDE.read_text("utf-8")
    [code] = re.findall(r"^```python\n(from flexmoe import Workload, plan\n.*?)^print", text, re.MULTILINE | re.DOTALL)
    row = next(line for line in text.splitlines() if line.startswith("| 100 | 10,000 "))
    _, _, each, hours, node_hours, of_all, _ = (cell.strip().replace(",", "") for cell in row.strip("|").split("|"))
    names = {}
    exec(code, names)
    found = names["part"].prediction
    assert float(each) == pytest.approx(found.tokens_per_s, rel=0.03)
    assert float(hours) == pytest.approx(found.job_s / 3600, rel=0.03)
    assert float(node_hours) == pytest.approx(100 * float(hours), rel=0.01)
    assert float(of_all) == pytest.approx(100 * float(each), rel=0.01)
