from pathlib import Path

import pytest
import torch
from torch import Tensor

from medseg.prompt.embeddings import EmbeddingCache, embedding_key


def tensor(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((1, 4, 8, 8), value).to(dtype)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_cache_on_the_same_folder_returns_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    key, given = embedding_key(slice=1), tensor(0.1, dtype)
    EmbeddingCache(tmp_path).put(key, given)
    found = EmbeddingCache(tmp_path).get(key)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, given)


def test_a_key_depends_on_every_part() -> None:
    parts = {"scene": "a", "window": (0.0, 1.0), "axis": 0, "index": 3, "field": (0, 0, 4, 4), "size": 256}
    changed = {"scene": "b", "window": (0.0, 2.0), "axis": 1, "index": 4, "field": (0, 0, 4, 5), "size": 512}
    keys = {embedding_key(**{**parts, name: value}) for name, value in changed.items()}
    assert len(keys | {embedding_key(**parts)}) == 7


def test_memory_keeps_what_was_used_last() -> None:
    size = tensor(0).nbytes
    cache = EmbeddingCache(memory_bytes=2 * size)
    for key in ("aa", "bb"):
        cache.put(key, tensor(1))
    assert cache.get("aa") is not None
    cache.put("cc", tensor(1))
    assert [key for key in ("aa", "bb", "cc") if cache.get(key) is not None] == ["aa", "cc"]


def test_a_tensor_put_twice_counts_once() -> None:
    cache = EmbeddingCache(memory_bytes=2 * tensor(0).nbytes)
    for _ in range(5):
        cache.put("aa", tensor(1))
    cache.put("bb", tensor(1))
    assert cache.get("aa") is not None


def test_the_disk_keeps_what_was_used_last(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path).put("aa00", tensor(1))
    size = files(tmp_path)[0].stat().st_size
    cache = EmbeddingCache(tmp_path, memory_bytes=0, disk_bytes=2 * size)
    cache.put("bb00", tensor(1))
    assert cache.get("aa00") is not None
    cache.put("cc00", tensor(1))
    assert [path.stem for path in files(tmp_path)] == ["aa00", "cc00"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "swap"])
def test_a_damaged_file_is_removed_and_not_believed(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EmbeddingCache(tmp_path)
    cache.put("aa00", tensor(1))
    cache.put("bb00", tensor(2))
    path = files(tmp_path)[0]
    data = path.read_bytes()
    flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    other = files(tmp_path)[1].read_bytes()
    damaged = {"cut": data[:-10], "flip": flipped, "empty": b"", "text": b"x" * 400, "swap": other}[damage]
    path.write_bytes(damaged)
    fresh = EmbeddingCache(tmp_path)
    assert fresh.get("aa00") is None
    assert not path.exists()
    assert "computed again" in caplog.text
    fresh.put("aa00", tensor(1))
    again = EmbeddingCache(tmp_path).get("aa00")
    assert again is not None
    assert torch.equal(again, tensor(1))


def test_a_folder_that_takes_no_files_costs_no_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = EmbeddingCache(blocked / "cache")
    cache.put("aa00", tensor(1))
    assert cache.get("aa00") is not None
    assert "in memory only" in caplog.text


def test_a_cleared_cache_is_empty_on_disk_too(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    cache.put("aa00", tensor(1))
    cache.clear()
    assert cache.get("aa00") is None
    assert not files(tmp_path)
