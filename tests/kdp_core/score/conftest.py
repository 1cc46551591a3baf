"""The hub, replaced where it would be asked."""
import socket
import zipfile

import datasets
import huggingface_hub
import pytest

from kdp_core.score.benchmarks import BENCHMARKS
from tests.kdp_core.score.hub import CMMLU, HUB_ITEMS


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, stubbed where it would be asked: it gives tiny items of the right form. A list of what was asked for."""
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options))
        found = next(task for task, entry in BENCHMARKS.items() if entry.hub[:2] == (path, name))
        items = datasets.Dataset.from_list(HUB_ITEMS[found])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev", "prompt"), items))

    def download(path, filename, **options):
        asked.append((path, None, {key: options[key] for key in ("revision",)}))
        with zipfile.ZipFile(tmp_path / filename, "w") as archive:
            for split in ("dev", "test"):
                archive.writestr(f"{split}/agronomy.csv", CMMLU)
        return str(tmp_path / filename)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a task reached for the network"))
    return asked
