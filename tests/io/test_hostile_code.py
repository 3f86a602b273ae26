"""Nothing that is read is run."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from pathlib import Path

import pytest
from helpers.hostile import READERS
from helpers.worlds import make_tokenizer

from trl_sae_audit import AuditError
from trl_sae_audit.cli.main import main
from trl_sae_audit.data.opener import iterate_rows
from trl_sae_audit.data.texts import read_texts

PACKAGE = Path(__file__).parents[2] / "trl_sae_audit"
RUNS_WHAT_IT_READS = re.compile(
    r"\b(torch|joblib)\.load\(|\b(np|numpy)\.load\((?!.*allow_pickle=False)|yaml\.(unsafe_|full_)?load\(|allow_pickle=True|weights_only=False|"
    r"trust_remote_code=True|^\s*(import|from) (pickle|dill|marshal|shelve|joblib)\b",
    re.MULTILINE,
)


def test_nothing_in_the_package_unpickles_or_loads_yaml_with_code():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if (
            path.name == "pickles.py"
        ):  # its refusal names the command with which one converts a pickle oneself
            text = text.replace("import torch, safetensors.torch as s", "").replace("torch.load(", "", 1)
        assert not RUNS_WHAT_IT_READS.search(text), path
    assert RUNS_WHAT_IT_READS.search("import pickle")
    assert RUNS_WHAT_IT_READS.search("x = torch.load(path)")
    assert RUNS_WHAT_IT_READS.search("x = np.load(path)")


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (Path(self.marker).touch, ())


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.cost < 20])
def test_a_pickle_in_place_of_a_file_is_not_unpickled(tmp_path, name):
    reader = READERS[name]
    (tmp_path / "input").mkdir()
    reader.write(tmp_path / "input")
    for file in sorted(path for path in (tmp_path / "input").rglob("*") if path.is_file()):
        content = file.read_bytes()
        file.write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
        with contextlib.suppress(AuditError):
            reader.read(tmp_path / "input")
        file.write_bytes(content)
        assert not (tmp_path / "marker").exists()


def test_a_script_beside_a_dataset_is_not_run(tmp_path, capsys):
    marker = tmp_path / "marker"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(AuditError):
        list(iterate_rows(tmp_path / "data"))
    with pytest.raises(AuditError):
        read_texts(tmp_path / "data", make_tokenizer())
    assert not marker.exists()


def test_options_from_a_file_do_not_set_the_environment(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("env:\n  SOMETHING_HOSTILE: '1'\noutput_dir: x\n")
    assert main(["audit", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "must be one value" in capsys.readouterr().err
    assert "SOMETHING_HOSTILE" not in os.environ
