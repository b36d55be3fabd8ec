"""Shards of teacher tokens: what is read is what was written, whoever wrote it, and damage is named and left out."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gkd_hf.distillation import token_places, token_store
from gkd_hf.distillation.token_places import TokenPlaces
from gkd_hf.distillation.token_store import TokenStore, token_bytes
from gkd_hf.errors import InputError

PATCHES, WIDTH = 4, 8


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def tokens(number: int, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1 + PATCHES, width, generator=generator).to(torch.bfloat16)


def filled(folder: Path, numbers: range, writer: str = "0", shard_views: int = 3) -> TokenStore:
    store = TokenStore(folder, writer=writer, shard_bytes=shard_views * token_bytes(PATCHES, WIDTH))
    for number in numbers:
        store.add(key(number), tokens(number))
    return store


def assert_holds(store: TokenStore, numbers: range) -> None:
    found, read = store.read([key(number) for number in numbers], PATCHES, WIDTH)
    assert found == [True] * len(numbers)
    assert torch.equal(read, torch.stack([tokens(number) for number in numbers]))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    store = filled(tmp_path / "deep" / "cache", range(8))
    assert len(shards(store.folder)) == 2  # of three views each; two more wait
    assert_holds(store, range(8))
    store.flush()
    assert_holds(store, range(8))
    again = TokenStore(store.folder)
    assert_holds(again, range(7, -1, -1))
    assert len(again) == 8
    assert again.num_bytes == 8 * token_bytes(PATCHES, WIDTH)
    found, _ = again.read([key(3), key(99)], PATCHES, WIDTH)
    assert found == [True, False]


def test_a_shard_is_a_safetensors_file(tmp_path: Path) -> None:
    filled(tmp_path, range(3))
    (path,) = shards(tmp_path)
    content = load_file(path)
    assert content["tokens"].dtype == torch.bfloat16
    assert torch.equal(content["tokens"], torch.stack([tokens(number) for number in range(3)]))
    assert [bytes(row.tolist()) for row in content["keys"]] == [key(number) for number in range(3)]
    assert not list(tmp_path.glob(".*"))


def test_processes_find_what_others_write_meanwhile(tmp_path: Path) -> None:
    ranks = [filled(tmp_path, range(3 * rank, 3 * rank + 3), str(rank)) for rank in range(2)]
    for store in ranks:
        assert_holds(store, range(6))
    ranks[0].add(key(7), tokens(7))
    assert ranks[1].read([key(7)], PATCHES, WIDTH)[0] == [False]
    ranks[0].flush()
    assert_holds(ranks[1], range(7, 8))
    assert {path.name.split("-")[1] for path in shards(tmp_path)} == {"0", "1"}


def test_a_view_that_two_processes_wrote_is_one(tmp_path: Path) -> None:
    first, second = (TokenStore(tmp_path, writer=str(rank)) for rank in range(2))
    first.add(key(0), tokens(0))
    second.add(key(0), tokens(1))
    for store in (first, second):
        store.flush()
        store.add(key(0), tokens(2))
    assert len(shards(tmp_path)) == 2
    fresh = TokenStore(tmp_path)
    fresh.look()
    assert len(fresh) == 1


def test_tokens_of_another_shape_are_not_taken(tmp_path: Path) -> None:
    store = filled(tmp_path, range(3))
    assert store.read([key(0)], PATCHES, 2 * WIDTH)[0] == [False]
    store.add(key(9), tokens(9, 2 * WIDTH))
    store.flush()
    assert torch.equal(store.read([key(9)], PATCHES, 2 * WIDTH)[1][0], tokens(9, 2 * WIDTH))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def garbled_header(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"not JSON")


def empty(path: Path) -> None:
    os.truncate(path, 0)


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [cut, garbled_header, empty, foreign])
def test_a_damaged_shard_is_named_and_left_out(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, range(3))
    damage(shards(tmp_path)[0])
    whole = filled(tmp_path, range(3, 6))
    with caplog.at_level(logging.WARNING):
        found, _ = TokenStore(tmp_path).read([key(number) for number in range(6)], PATCHES, WIDTH)
    assert found == [False] * 3 + [True] * 3
    broken = next(path for path in shards(tmp_path) if path not in [shard.path for shard in whole._shards])
    assert caplog.text.count(f"{broken} is damaged") == 1
    assert "computed again" in caplog.text


def test_flipped_bytes_are_found_when_they_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path, range(3))
    shard = store._shards[0]
    with open(shard.path, "r+b") as file:
        file.seek(shard.begin + shard.row_bytes + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    fresh = TokenStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert fresh.read([key(0), key(1), key(2)], PATCHES, WIDTH)[0] == [True, False, False]
        assert fresh.read([key(0)], PATCHES, WIDTH)[0] == [False]  # nothing of that file any more
    assert caplog.text.count(f"{shard.path} is damaged") == 1
    fresh.add(key(1), tokens(1))
    assert_holds(fresh, range(1, 2))


@pytest.mark.parametrize("reason", [OSError(errno.ENOSPC, "No space left on device"), "safetensors"])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing_behind(
    reason: OSError | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        if isinstance(reason, OSError):
            raise reason
        raise token_store.SafetensorError("I/O error: No space left on device (os error 28)")

    store = filled(tmp_path / "cache", range(2))
    monkeypatch.setattr(token_store, "save_file", full)
    with pytest.raises(InputError, match=r"cannot be written to '.*cache' \(.*No space left on device.*\): make room"):
        store.flush()
    assert not any((tmp_path / "cache").iterdir())


def test_what_killed_processes_were_writing_is_removed_after_an_hour(tmp_path: Path) -> None:
    store = filled(tmp_path, range(3))
    old, new = tmp_path / ".writing-tokens-0-a.safetensors", tmp_path / ".writing-tokens-1-b.safetensors"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (0, 0))
    store.clear_leftovers()
    assert not old.exists()
    assert new.exists()
    assert_holds(TokenStore(tmp_path), range(3))  # and is no shard


def read_in_child(store: TokenStore) -> bool:
    store.prefetch([key(0), key(1), key(99)])
    found, read = store.read([key(0), key(1)], PATCHES, WIDTH)
    return all(found) and torch.equal(read, torch.stack([tokens(0), tokens(1)]))


def test_workers_read_what_their_parent_opened(tmp_path: Path) -> None:
    store = filled(tmp_path, range(3))
    assert_holds(store, range(3))
    assert len(pickle.dumps(store)) < 500
    assert read_in_child(pickle.loads(pickle.dumps(store)))
    child = get_context("fork").Process(target=lambda: sys.exit(not read_in_child(store)))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert_holds(store, range(3))


def test_more_shards_than_files_that_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "_OPEN_FILES", 2)
    store = filled(tmp_path, range(12), shard_views=1)
    for _ in range(2):
        assert_holds(store, range(12))
    assert len(store._files) == 2


def test_a_text_beside_the_shards_is_written_whole_and_its_leftovers_are_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [TokenStore(tmp_path) for _ in range(2)]
    written = []

    def killed(source: Path, target: Path) -> None:
        written.append(source)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        for store in stores:  # of one process id, as on two hosts
            with pytest.raises(KeyboardInterrupt):
                store.write_text("identity.json", "{}")
    assert len(set(written)) == len(list(tmp_path.iterdir())) == 2
    for path in written:
        os.utime(path, (0, 0))
    stores[0].write_text("identity.json", "{}")
    stores[0].clear_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == ["identity.json"]


def test_places_are_those_of_a_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of few different bytes, zeros and high ones among them, so that many begin or end alike."""
    monkeypatch.setattr(token_places, "_UNSORTED", 50)
    generator = torch.Generator().manual_seed(0)
    places, expected = TokenPlaces(), {}
    for shard in range(40):
        digits = torch.randint(3, (17, 6), generator=generator).tolist()
        keys = [bytes([0, 255, 7][digit] for digit in row) + bytes(10) for row in digits]
        places.add(b"".join(keys), shard)
        for row, each in enumerate(keys):
            expected.setdefault(each, (shard, row))
        if shard == 30:
            places.drop(3)
            expected = {each: place for each, place in expected.items() if place[0] != 3}
    assert len(places._keys) > 100
    assert len(places) == len(expected)
    assert {each: places.get(each) for each in expected} == expected
    assert bytes([1] * 16) not in places
    assert places.get(bytes([255] * 16)) is None
