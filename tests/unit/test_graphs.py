"""The device that graphs run on: another one where it is there, and the CPU with a reason."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from structlog.testing import capture_logs

from recsys.schema import InputError
from recsys.serving.deployment import load_verified
from recsys.serving.graphs import PROVIDERS, open_graph
from recsys.serving.messages import RecommendRequest
from recsys.serving.settings import DEVICES, ServeSettings
from tiny_bundles import write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny-1")


def absent(device: str) -> bool:
    return PROVIDERS[device][0] not in onnxruntime.get_available_providers()


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_without_the_provider_the_cpu_answers_and_the_log_says_why(
    bundle: Path, device: str
) -> None:
    if not absent(device):
        pytest.skip(f"onnxruntime has {device} here")
    with capture_logs() as said:
        engine = load_verified(bundle, device)
    warned = next(line for line in said if line["event"] == "device_unavailable")
    assert (warned["device"], warned["graph"], warned["log_level"]) == (
        *(device, "encoder.onnx", "warning"),
    )
    assert f"expected {PROVIDERS[device][0]}" in warned["reason"]
    assert "onnxruntime-gpu" in warned["reason"]
    assert engine.retrieval.session.get_providers() == ["CPUExecutionProvider"]
    asked = [RecommendRequest(history=["i9"])]
    items = [item.item_id for item in engine.recommend(asked)[0].items]
    assert items == [item.item_id for item in load_verified(bundle).recommend(asked)[0].items]


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed without its libraries, as onnxruntime-gpu on a machine without CUDA."""
    there = [*PROVIDERS["cuda"]]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    with capture_logs() as said:
        session = open_graph(bundle / "encoder.onnx", 1, "cuda")
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert "CUDAExecutionProvider is installed, but does not start" in said[0]["reason"]


def test_no_graph_is_an_error_on_any_device(tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"nonsense")
    for device in DEVICES:
        with pytest.raises(InputError, match="not a readable ONNX graph"):
            open_graph(tmp_path / "encoder.onnx", 1, device)


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(InputError, match=r"device='cdua' is unknown.*did you mean 'cuda'"):
        ServeSettings(device="cdua")
