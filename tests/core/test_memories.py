"""Where memories live: what is there is what was put there, and files leave nothing behind."""

import os
import random
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest
import torch

from clapping_ds.config import MemoryConfig
from clapping_ds.link import disk, memories
from clapping_ds.link.disk import DiskError, MappedFile, Staging
from clapping_ds.link.memories import Memories
from clapping_ds.link.message import Spec
from tests.core.test_channel import Ends

CPU = torch.device("cpu")
SHAPE = torch.Size((3, 40, 64))


def filled(number, shape=SHAPE):
    return torch.full(shape, float(number))


def test_a_file_holds_what_was_written_and_no_folder_shows_it(tmp_path):
    file = MappedFile(str(tmp_path))
    pieces = [file.new(num_bytes) for num_bytes in (1, 4096, 100_000, 7, 3 << 20)]
    for number, piece in enumerate(pieces):
        assert not piece.any()
        piece.fill_(number + 1)
    assert all(bool((piece == number + 1).all()) for number, piece in enumerate(pieces))
    assert [len(piece) for piece in pieces] == [1, 4096, 100_000, 7, 3 << 20]
    assert not list(tmp_path.iterdir())


def test_a_file_gives_what_was_freed_again_and_zeroed(tmp_path):
    file = MappedFile(str(tmp_path))
    first = file.new(5000)
    size = os.fstat(file._file.fileno()).st_size
    for _ in range(100):
        first.fill_(1)
        file.free(first)
        first = file.new(5000)
        assert not first.any()
    assert os.fstat(file._file.fileno()).st_size == size


def test_a_file_has_few_maps_however_many_pieces(tmp_path):
    file = MappedFile(str(tmp_path))
    pieces = [file.new(4096) for _ in range(1000)]
    assert len({id(file._pieces[piece.data_ptr()].pages) for piece in pieces}) < 15


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    disk.check_folder(str(tmp_path))
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=f"clapping.memory.folder = '{missing}' on .*: No such file"):
        disk.check_folder(missing)


def test_pieces_of_one_size_waste_nothing_and_pieces_of_many_fit_again(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LARGEST_GROWTH_BYTES", 1 << 20)
    file = MappedFile(str(tmp_path))
    kept = [file.new(520 << 10) for _ in range(40)]
    assert file._num_bytes < 1.3 * sum(map(len, kept))
    generator, sizes = random.Random(0), []
    live = [file.new(1 << 16) for _ in range(8)]
    for _ in range(1000):
        number = generator.randrange(8)
        file.free(live[number])
        live[number] = file.new(generator.randrange(1 << 15, 1 << 18))
        sizes.append(file._num_bytes)
    assert sizes[-1] - sizes[0] < 12 << 20


def test_a_file_that_cannot_double_grows_by_what_is_needed(tmp_path, monkeypatch):
    room, real = [10 << 20], os.posix_fallocate

    def allocate(descriptor, start, num_bytes):
        if num_bytes > room[0]:
            raise OSError(28, "No space left on device")
        room[0] -= num_bytes
        real(descriptor, start, num_bytes)

    monkeypatch.setattr(disk.os, "posix_fallocate", allocate)
    file = MappedFile(str(tmp_path))
    pieces = [file.new(1 << 20) for _ in range(10)]
    assert len(pieces) == 10
    with pytest.raises(DiskError, match="beside 10485760"):
        file.new(1 << 20)


def test_what_is_left_over_is_used_and_counted(tmp_path):
    file = MappedFile(str(tmp_path))
    pieces = [file.new(num_bytes) for _ in range(20) for num_bytes in (3 << 18, 1 << 13)]
    held = sum(disk.round_up(len(piece)) for piece in pieces)
    assert file._num_bytes == held + file.unused_bytes
    for piece in pieces:
        file.free(piece)
    assert file.unused_bytes == file._num_bytes


def test_a_piece_is_freed_after_what_is_still_written_there(staging):
    memory, is_done = torch.zeros(SHAPE), Future()
    staging.copy_of(memory).copy_(filled(1))
    staging.write(memory, is_done.result)
    staging.read(memory)
    waiting = threading.Thread(target=staging.settle)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    is_done.set_result(None)
    waiting.join()
    assert torch.equal(memory, filled(1))


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 100_000, 1 << 30, (1 << 30) + 1])
def test_sizes_are_whole_pages_and_a_quarter_larger_at_most(num_bytes):
    size = disk.round_up(num_bytes)
    assert size % 4096 == 0
    assert num_bytes <= size < max(1.25 * num_bytes, 4097) + 4096
    assert disk.round_up(size) == size


def test_a_full_disk_is_an_error_when_memory_is_asked_for(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    file = MappedFile(str(tmp_path))
    monkeypatch.setattr(disk.os, "posix_fallocate", refuse)
    with pytest.raises(DiskError, match="no room for 4096 bytes beside 0"):
        file.new(10)


@pytest.mark.parametrize("device", ["same", "cpu", "disk"])
def test_on_the_cpu_codecs_work_in_the_memory_itself(tmp_path, device):
    folder = str(tmp_path) if device == "disk" else None
    held = Memories(CPU, MemoryConfig(device=device, folder=folder, dtype="bfloat16"))
    memory = held.new(SHAPE, torch.float32)
    assert (memory.shape, memory.dtype, memory.any().item()) == (SHAPE, torch.bfloat16, False)
    held.read(memory)
    assert held.fetch(memory) is memory
    held.put_back(memory)
    held.end()
    held.settle()
    held.free(memory)


@pytest.fixture
def staging(monkeypatch):
    """Its pinned memory is plain: this machine may have no GPU."""
    real = torch.empty_like
    monkeypatch.setattr(disk.torch, "empty_like", lambda like, pin_memory: real(like))
    return Staging()


def test_what_is_written_is_what_is_read_next_though_the_device_takes_its_time(staging):
    memory, is_done = torch.zeros(SHAPE), Future()
    staging.copy_of(memory).copy_(filled(1))
    staging.write(memory, is_done.result)
    staging.read(memory)
    assert not memory.any()
    is_done.set_result(None)
    assert torch.equal(staging.copy_of(memory), filled(1))
    assert torch.equal(memory, filled(1))


def test_others_are_read_while_the_device_takes_its_time(staging):
    busy, other, is_done = torch.zeros(SHAPE), filled(2), Future()
    staging.copy_of(busy)
    staging.write(busy, is_done.result)
    assert torch.equal(staging.copy_of(other), filled(2))
    is_done.set_result(None)
    staging.settle()


def test_copies_are_used_again(staging):
    memories = [torch.zeros(SHAPE) for _ in range(3)]
    seen = set()
    for step in range(20):
        memory = memories[step % 3]
        copy = staging.copy_of(memory)
        assert torch.equal(copy, filled(step // 3))
        seen.add(copy.data_ptr())
        copy.add_(1)
        staging.write(memory, lambda: None)
        staging.settle()
    assert len(seen) == 1


def test_a_read_that_no_message_used_leaves_the_memory_as_it_was(staging):
    memory = filled(3)
    staging.copy_of(memory).zero_()
    staging.drop()
    assert torch.equal(staging.copy_of(memory), filled(3))


def test_a_device_that_works_asynchronously_sees_files_through_pinned_memory(tmp_path, monkeypatch):
    """`meta` stands in for a GPU: what is put back has no values, so the copies are looked at."""
    monkeypatch.setattr(memories, "is_asynchronous", lambda _: True)
    monkeypatch.setattr(memories, "mark", lambda _: lambda: None)
    real = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda like, device=None, pin_memory=False: real(like, device=device)
    )
    held = Memories(torch.device("meta"), MemoryConfig(device="disk", folder=str(tmp_path)))
    memory = held.new(SHAPE, torch.float32)
    held.read(memory)
    there = held.fetch(memory)
    assert (memory.device.type, there.device.type) == ("cpu", "meta")
    assert held.fetch(memory) is there


def test_what_is_checksummed_is_what_the_device_has_not_what_the_file_has_yet(tmp_path):
    """With `verify`, of a memory that is still being written: as on a GPU whose thread is late."""
    ends = Ends(strategy="fc", activations={"delta": "int2"}, verify=True)
    visiting = ends.sender.memories = Late(CPU, MemoryConfig())
    for step in range(3):
        ends.begin_step(step, 2)
        for slot in range(2):
            ends.sender.send(slot, step == 0, [filled(step + slot)])
            ends.receiver.expect(slot, step == 0, [Spec(SHAPE, torch.float32)])
            ends.receiver.receive()
    assert visiting.num_late == 6


class Late(Memories):
    """The memory itself never gets what is put back."""

    num_late = 0

    def fetch(self, memory):
        if id(memory) not in self._here:
            self._here[id(memory)] = memory, memory.clone()
        return self._here[id(memory)][1]

    def put_back(self, memory):
        self.num_late += 1

    def end(self):
        pass


def test_a_worker_does_things_in_order_and_hands_on_errors():
    worker, done = disk.Worker(), []
    futures = [worker.submit(done.append, number) for number in range(5)]
    failing = worker.submit(lambda: 1 / 0)
    assert [future.result() for future in futures] == [None] * 5
    assert done == list(range(5))
    with pytest.raises(ZeroDivisionError):
        failing.result()
    assert worker.submit(lambda: 7).result() == 7


def test_the_process_ends_though_a_worker_waits_for_ever():
    waits = "worker = Worker(); worker.submit(threading.Event().wait)"
    script = f"import threading; from clapping_ds.link.disk import Worker; {waits}"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
