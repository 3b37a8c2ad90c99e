"""Figures of a device that lacks some of them."""

from types import SimpleNamespace

import pynvml
import torch

from hfsft.train.measuring import joules


def test_a_card_that_does_not_count_energy(monkeypatch):
    def not_supported(handle):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID"):
        monkeypatch.setattr(f"pynvml.{name}", lambda *args: None)
    card = SimpleNamespace(uuid="0")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    monkeypatch.setattr("pynvml.nvmlDeviceGetTotalEnergyConsumption", lambda handle: 5000)
    assert joules(torch.device("cuda")) == 5.0
    monkeypatch.setattr("pynvml.nvmlDeviceGetTotalEnergyConsumption", not_supported)
    assert joules(torch.device("cuda")) is None
