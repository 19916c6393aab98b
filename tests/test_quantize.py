"""llama.cpp's quantizer behind quantize_gguf: every type it offers, and nothing in place unless it worked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import MakeCheckpoint, MakeGGUF
from melt_edge.errors import BackendError, ConfigError, FormatError
from melt_edge.export.gguf import export_gguf
from melt_edge.export.quantize import QUANTIZE_TYPES, check_type, quantize_gguf
from melt_edge.runtime.gguf_check import check_gguf, config_from_gguf
from tiny import tiny_config

# 256 values a row, so that K-quants are not replaced by their fall-backs
WIDE = {"hidden_size": 256, "head_dim": 64}
EXPECTED = {"q4_k_m": {"Q4_K", "Q6_K"}, "q6_k": {"Q6_K"}, "q8_0": {"Q8_0"}, "bf16": {"BF16"}, "iq4_xs": {"IQ4_XS"}}


@pytest.mark.parametrize("model_type", ["melt", "ouro"])
@pytest.mark.parametrize("type", list(QUANTIZE_TYPES))
def test_every_type_is_made_and_keeps_what_must_stay_exact(
    make_gguf: MakeGGUF, tmp_path: Path, model_type: str, type: str
) -> None:
    source = make_gguf(tiny_config(model_type, **WIDE))
    target = quantize_gguf(source, tmp_path / "q.gguf", type)
    before, after = check_gguf(source), check_gguf(target)
    assert config_from_gguf(after) == config_from_gguf(before)
    assert after.metadata["general.file_type"] == int(QUANTIZE_TYPES[type][0])
    for key, value in before.metadata.items():
        if key not in ("general.file_type", "general.quantization_version"):
            assert after.metadata[key] == value, key
    for tensor in after.tensors:
        vector = "norm" in tensor.name or tensor.name.endswith("bias") or tensor.name.startswith("exit_gate")
        assert (tensor.type == "F32") == (vector or type == "f32"), tensor
    assert EXPECTED.get(type, set()) <= {tensor.type for tensor in after.tensors}


def test_narrow_rows_fall_back_instead_of_failing(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    target = quantize_gguf(make_gguf(tiny_config("melt", hidden_size=48, head_dim=16)), tmp_path / "q.gguf", "q4_k_m")
    assert {tensor.type for tensor in check_gguf(target).tensors} & {"F16", "Q5_0", "Q8_0"}


def test_export_makes_k_quants_and_leaves_nothing_else(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    seen: list[str] = []
    report = export_gguf(
        make_checkpoint(tiny_config("melt", **WIDE), dtype="BF16"),
        tmp_path / "m.gguf",
        type="Q4_K_M",
        progress=lambda done, total, what: seen.append(what),
    )
    assert (report.type, report.verified) == ("q4_k_m", True)
    assert os.listdir(tmp_path) == ["m.gguf"]
    assert list(dict.fromkeys(seen)) == ["checking", "writing", "quantising"]
    assert check_gguf(tmp_path / "m.gguf").metadata["general.file_type"] == 15


def test_quantising_twice_needs_to_be_asked_for(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    source = make_gguf(tiny_config("melt", **WIDE), type="q8_0")
    with pytest.raises(FormatError, match=r"quantised already \(Q8_0\)"):
        quantize_gguf(source, tmp_path / "q.gguf", "q4_0")
    assert os.listdir(tmp_path) == []
    quantize_gguf(source, tmp_path / "q.gguf", "q4_0", allow_requantize=True)


def test_what_cannot_be_quantised(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    source = make_gguf(tiny_config("melt"))
    out = tmp_path / "q.gguf"
    for type, words in (("iq2_xxs", "importance matrix"), ("q9_9", "expected one of"), ("", "expected one of")):
        with pytest.raises(ConfigError, match=words):
            quantize_gguf(source, out, type)
    with pytest.raises(ConfigError, match="also the file to read"):
        quantize_gguf(source, source, "q8_0", force=True)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"damaged\.gguf"):
        quantize_gguf(damaged, out, "q8_0")
    with pytest.raises(FormatError):
        quantize_gguf(tmp_path / "nowhere.gguf", out, "q8_0")
    out.write_bytes(b"old")
    with pytest.raises(ConfigError, match="exists already"):
        quantize_gguf(source, out, "q8_0")
    assert out.read_bytes() == b"old"
    assert check_type("Q4_K_M") == "q4_k_m"


def test_a_full_disk_is_an_error_and_leaves_the_old_file(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the native writer must not report success."""
    source = make_gguf(tiny_config("melt", **WIDE))
    out = tmp_path / "q.gguf"
    out.write_bytes(b"old")
    code = (
        "import resource, signal, sys\n"
        "from melt_edge.export.quantize import quantize_gguf\n"
        "from melt_edge.errors import BackendError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try:\n"
        "    quantize_gguf(sys.argv[1], sys.argv[2], 'q8_0', force=True)\n"
        "except BackendError as err:\n"
        "    print(err)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "could not write it as q8_0" in result.stdout
    assert out.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["q.gguf"]


def test_a_killed_quantizer_leaves_the_old_file(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    source = make_gguf(tiny_config("melt", hidden_size=512, head_dim=128, layers=8))
    out = tmp_path / "q.gguf"
    out.write_bytes(b"old")
    code = (
        "import sys\nfrom melt_edge.export import quantize\nquantize._POLL_SECONDS = 0.001\n"
        "quantize.quantize_gguf(sys.argv[1], sys.argv[2], 'iq4_xs', force=True, n_threads=1,\n"
        "    progress=lambda done, total, what: done > 100_000 and print('growing', flush=True))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(out)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "growing\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert out.read_bytes() == b"old"


def test_the_librarys_reason_is_told(make_gguf: MakeGGUF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZE_TYPES, "q8_0", (999, 8.5))
    with pytest.raises(BackendError, match="invalid output file type 999"):
        quantize_gguf(make_gguf(tiny_config("melt")), tmp_path / "q.gguf", "q8_0")
    assert os.listdir(tmp_path) == []
