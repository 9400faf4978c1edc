"""Scripts and recipes: linted, and run where they can run here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from linting import lint
from recsys.artifacts import Workspace
from recsys.cli import main
from recsys.launch import configure

CHECKOUT = Path(__file__).parents[2]
TRAINING = CHECKOUT / "training"
MANIFESTS = sorted(TRAINING.glob("kubernetes/*.yaml"))
SCRIPTS = [
    *sorted(CHECKOUT.glob("scripts/*.sh")),
    *sorted(TRAINING.glob("*.sh")),
    *sorted(TRAINING.glob("*.sbatch")),
    CHECKOUT / ".ci" / "run",
]
JOB = yaml.safe_load((TRAINING / "kubernetes" / "train.yaml").read_text())
WORKER = JOB["spec"]["pytorchReplicaSpecs"]["Worker"]
TINY = ["trainer.accelerator=cpu", "trainer.max_epochs=2", "logger=csv", "model.dim=8"]
PYTORCH_JOB = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"},
    "spec.elasticPolicy": {"maxReplicas", "maxRestarts", "metrics", "minReplicas", "rdzvBackend"}
    | {"nProcPerNode", "rdzvConf", "rdzvHost", "rdzvId", "rdzvPort", "standalone"},
    "spec.runPolicy": {"activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "managedBy"}
    | {"schedulingPolicy", "suspend", "ttlSecondsAfterFinished"},
    "spec.pytorchReplicaSpecs": {"Master", "Worker"},
    "spec.pytorchReplicaSpecs.Worker": {"replicas", "restartPolicy", "template"},
}
"""The keys that Kubeflow's training operator 1.9 knows (its generated models, attribute_map)."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) or script.parent.name == ".ci"
    assert "set -euo pipefail" in script.read_text()
    lint("shellcheck", script)


def test_every_recipe_is_in_the_readme() -> None:
    text = (TRAINING / "README.md").read_text()
    for path in TRAINING.rglob("*.*"):
        if path.name != "README.md" and "__pycache__" not in path.parts:
            assert f"`{path.relative_to(TRAINING)}`" in text, path.name


# --- Kubernetes -------------------------------------------------------------------------------


def test_manifests_fit_their_schemas(tmp_path: Path) -> None:
    template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "worker"}}
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump(template | {"template": WORKER["template"]}))
    known = [path for path in MANIFESTS if path.name != "train.yaml"]
    lint("kubernetes-validate", "--strict", tmp_path / "pods.yaml", *known)


@pytest.mark.parametrize("where", PYTORCH_JOB)
def test_the_operator_knows_every_key(where: str) -> None:
    node: Any = JOB
    for name in filter(None, where.split(".")):
        node = node[name]
    assert node
    assert set(node) <= PYTORCH_JOB[where]


def test_pytorch_job() -> None:
    assert (JOB["apiVersion"], JOB["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    policy, pod = JOB["spec"]["elasticPolicy"], WORKER["template"]["spec"]
    assert policy["minReplicas"] == policy["maxReplicas"] == WORKER["replicas"]
    assert isinstance(JOB["spec"]["nprocPerNode"], str)
    (container,) = pod["containers"]
    assert container["name"] == "pytorch", "the operator looks for it"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == JOB["spec"]["nprocPerNode"]
    lint("shellcheck", "--shell=sh", "-", text=container["args"][0])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_pods_are_plain_users_on_one_volume(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    if manifest["kind"] == "PersistentVolumeClaim":
        assert manifest["spec"]["accessModes"] == ["ReadWriteMany"]
        return
    pod = (WORKER if manifest == JOB else manifest["spec"])["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    claims = [one["persistentVolumeClaim"] for one in pod["volumes"] if "emptyDir" not in one]
    assert claims == [{"claimName": "recsys-workspace"}]
    (container,) = pod["containers"]
    assert container["image"].startswith("recsys-train:")
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {one["name"] for one in container["volumeMounts"]} == {
        one["name"] for one in pod["volumes"]
    }


def test_the_settings_of_the_jobs_exist() -> None:
    prepare = yaml.safe_load((TRAINING / "kubernetes" / "prepare.yaml").read_text())
    (container,) = prepare["spec"]["template"]["spec"]["containers"]
    verb, *overrides = container["args"]
    assert verb == "prepare"
    assert configure(overrides).data.path == "/workspace/events"


# --- run here ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, ring_csv: Path) -> Workspace:
    """A workspace with a dataset, `latest`."""
    root = tmp_path_factory.mktemp("recipes") / "workspace"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_HOME", str(root))
        assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
        return Workspace()


@pytest.fixture
def shop(prepared: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The workspace that the scripts use, too; what a test adds to it stays."""
    monkeypatch.setenv("RECSYS_HOME", str(prepared.root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return prepared


def start(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).parent
    path = f"{env.pop('FIRST', '')}{os.pathsep}{beside}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        env={**os.environ, "PATH": path, **env},
        capture_output=True,
        text=True,
    )


needs_processes = pytest.mark.skipif(
    not (CHECKOUT / "configs" / "trainer" / "ddp.yaml").is_file(), reason="trainer=ddp is not here"
)


STAND_INS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
    "scontrol": 'case $1 in show) echo localhost;; *) echo "$@" >> "$SCONTROL_LOG";; esac',
}
"""SLURM's commands on one machine: run it here; name this machine, note a requeue."""


def slurm(folder: Path, home: Path, *words: str, **stand_ins: str) -> str:
    """Run the script of the batch job on this machine, two processes; return what it printed."""
    folder.mkdir(exist_ok=True)
    for name, text in {**STAND_INS, **stand_ins}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    env = {"FIRST": str(folder), "SCONTROL_LOG": str(folder / "log"), "RECSYS_HOME": str(home)}
    env |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "7"}
    env |= {"PROCESSES": "2", "RESTARTS": "0"}
    done = start("bash", TRAINING / "slurm.sbatch", *words, **env)
    assert done.returncode == 0 or stand_ins, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(
    not (CHECKOUT / "configs" / "trainer" / "ddp.yaml").is_file(), reason="trainer=ddp is not here"
)
def test_slurm_and_torchrun_train_and_go_on(shop: Workspace, tmp_path: Path) -> None:
    """The same job three times: a new run, the same one cut off before its end, and finished."""
    manifest = shop.folder("run") / "shop" / "manifest.json"
    assert "Made   run shop" in slurm(tmp_path / "slurm", shop.root, "shop", *TINY)
    epochs = json.loads(manifest.read_text())["history"]
    manifest.unlink()
    assert "Made   run shop" in slurm(tmp_path / "slurm", shop.root, "shop", *TINY)
    assert json.loads(manifest.read_text())["history"] == epochs, "gone on with, not begun again"
    assert "run shop is finished" in slurm(tmp_path / "slurm", shop.root, "shop", *TINY)


def test_slurm_asks_for_what_it_uses() -> None:
    text = (TRAINING / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert asked["ntasks-per-node"] == "1", "torchrun starts the others"
    assert "requeue" in asked
    assert asked["signal"].startswith("B:USR1@"), "the shell is told before the time is up"
    assert asked["open-mode"] == "append"
    _, _, body = text.partition("set -euo pipefail")
    assert "#SBATCH" not in body, "sbatch reads none below the first command"
    assert "trap again USR1" in body


def test_slurm_queues_again_when_its_time_is_up(tmp_path: Path) -> None:
    """The script as it is, with a training that is still busy when USR1 comes."""
    slurm(tmp_path / "slurm", tmp_path, "any", srun="kill -USR1 $PPID\nsleep 0.2")
    assert (tmp_path / "slurm" / "log").read_text() == "requeue 7\n"


def test_a_sweep_runs(shop: Workspace) -> None:
    assert shutil.which("recsys", path=str(Path(sys.executable).parent))
    done = start(TRAINING / "sweep.sh", "latest", "2", "trainer=cpu", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = shop.root.glob("sweeps/*/optimization_results.yaml")
    assert 0 <= yaml.safe_load(found.read_text())["best_value"] <= 1
    assert done.stdout.count("· test, 120 users") == 2
