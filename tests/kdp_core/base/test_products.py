"""float32 products: whichever library makes them, their error is that of float32."""
import subprocess
import sys

import pytest
import torch

from kdp_core.base import products


@pytest.fixture(autouse=True)
def pytorchs_own_choice():
    torch.set_float32_matmul_precision("highest")


def test_products_have_the_error_of_float32():
    products.choose()
    for shape in ((1, 300, 40), (7, 64, 64), (256, 1536, 576)):
        assert products._error(*shape) < products.ERROR


def test_a_second_call_changes_nothing():
    products.choose()
    before = torch.get_float32_matmul_precision()
    assert before in ("medium", "highest")
    products.choose()
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("vendor", "precision"), [("AuthenticAMD", "medium"), ("GenuineIntel", "highest")])
def test_only_processors_of_amd_use_onednn(monkeypatch, tmp_path, vendor, precision):
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(products, "_error", lambda *shape: 1e-7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(products.platform, "processor", lambda: f"AMD64 Family 25 Model 1, {vendor}")
    products.choose()
    assert torch.get_float32_matmul_precision() == precision
    torch.set_float32_matmul_precision("highest")
    products.CPUINFO.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    products.choose()
    assert torch.get_float32_matmul_precision() == precision


def test_inexact_products_are_not_used(monkeypatch):
    monkeypatch.setattr(products, "_amd", lambda: True)
    monkeypatch.setattr(products, "_error", lambda *shape: 3e-3)
    products.choose()
    assert torch.get_float32_matmul_precision() == "highest"


def test_newer_settings_of_the_user_are_left_alone():
    code = """import torch
from kdp_core.base import products
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
products.choose()
products.attention(64)
print(torch.backends.mkldnn.matmul.fp32_precision)"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "bf16"


def test_a_gpu_keeps_its_precision(monkeypatch):
    monkeypatch.setattr(products, "_amd", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    products.choose()
    assert torch.get_float32_matmul_precision() == "highest"


def test_bfloat16_has_a_larger_error():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(128, 576, generator=generator), torch.randn(576, 192, generator=generator)
    exact = a.double() @ b.double()
    assert ((a.bfloat16() @ b.bfloat16()).double() - exact).norm() / exact.norm() > products.ERROR


@pytest.mark.parametrize(("precision", "tokens", "fused"), [
    ("highest", 128, True), ("medium", 128, False), ("medium", products.SHORT + 1, True)])
def test_short_sequences_avoid_the_fused_attention_if_onednn_is_used(monkeypatch, precision, tokens, fused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_float32_matmul_precision(precision)
    with products.attention(tokens):
        assert torch.backends.cuda.flash_sdp_enabled() == fused
    assert torch.backends.cuda.flash_sdp_enabled()
