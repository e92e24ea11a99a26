"""The doctor's checks, each with what it looks at put wrong; and how ranks' findings become lines."""

import os
import socket
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from clapping_ds.autotune.decision import Speed
from clapping_ds.codecs import CODECS, Eden, LowRank, Transform
from clapping_ds.doctor import __main__ as doctor
from clapping_ds.doctor import machine, network, replicas, selftest, steps
from clapping_ds.doctor import visit as running
from clapping_ds.doctor.ranks import compare_hosts, compare_speeds
from clapping_ds.doctor.visit import Board, Check, Launch, Status, Visit, fail, ok, run_checks, skip, warn
from clapping_ds.link.groups import open_store
from tests.core.test_kernels import on_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HERE = socket.gethostname()


def breaks(visit):
    raise KeyError("no such thing")


# How checks are run


def run(checks, world_size=1, only=None):
    """Lines, and whether all is well, by rank: each a thread. only: the ranks that are there."""
    store = open_store(None, 0, hosts_it=True, timeout_s=1)
    found = {}

    def be(rank):
        lines = []
        visit = Visit(Launch(rank, rank, world_size), board=Board(store, rank, world_size))
        found[rank] = lines, run_checks(checks, visit, lines.append)

    threads = [Thread(target=be, args=(rank,)) for rank in only or range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_line_for_each_check():
    checks = [
        Check("one", lambda visit: ok("well")),
        Check("second", lambda visit: warn("odd", "look at it")),
        Check("3", lambda visit: skip("not here")),
    ]
    assert run(checks)[0] == (
        ["one     ok    well", "second  warn  odd: look at it", "3       skip  not here"],
        True,
    )


def test_an_error_is_a_line_and_what_builds_on_it_is_skipped():
    checks = [
        Check("broken", breaks),
        Check("upon", breaks, after=("broken",)),
        Check("and upon", breaks, after=("upon",)),
        Check("free", lambda visit: ok("well")),
    ]
    lines, is_well = run(checks)[0]
    assert not is_well
    assert lines[0].startswith("broken    FAIL  KeyError: 'no such thing' (test_doctor.py, line ")
    assert lines[1:] == [
        "upon      skip  needs broken",
        "and upon  skip  needs upon",
        "free      ok    well",
    ]


def test_what_fails_on_one_rank_fails_on_all_and_keeps_none_waiting():
    checks = [
        Check("speed", lambda visit: fail("slow", "push") if visit.launch.rank in (1, 2) else ok("fast")),
        Check("error", lambda visit: ok("well") if visit.launch.rank < 3 else breaks(visit)),
        Check("equal", lambda visit: ok("", facts=visit.launch.rank), compare=lambda facts: ok(f"{facts}")),
        Check("never", breaks, after=("error",), compare=breaks),
    ]
    found = run(checks, world_size=4)
    assert [found[rank] for rank in (1, 2, 3)] == [([], False)] * 3
    lines, is_well = found[0]
    assert not is_well
    assert lines[0] == "speed  FAIL  slow: push (ranks 1-2)"
    assert lines[1].startswith("error  FAIL  KeyError")
    assert lines[1].endswith("(rank 3)")
    assert lines[2:] == ["equal  ok    [0, 1, 2, 3]", "never  skip  needs error"]


def test_a_rank_that_is_lost_is_named_by_all_others(monkeypatch):
    monkeypatch.setattr(running, "LEAST_PATIENCE_S", 0.3)
    checks = [Check("any", lambda visit: ok("well"), patience=0), Check("more", breaks)]
    found = run(checks, world_size=3, only=[0, 2])
    text = "any   FAIL  well; any: nothing from rank 1 of 3 for 0.3 s: that rank may have printed why"
    assert found == {0: ([text], False), 2: ([f"rank 2: {text}"], False)}


def test_texts_are_said_once_and_few():
    assert str(running.merge([ok("a"), ok("b"), ok("a"), skip("c")])) == "a (ranks 0, 2); b (rank 1)"
    assert str(running.merge([ok("a")] * 3)) == "a"
    many = str(running.merge([ok(str(rank)) for rank in range(20)]))
    assert many.startswith("0 (rank 0); 1 (rank 1); ")
    assert many.endswith("; and 12 more")


def test_exit_status_and_last_line(capsys):
    well, odd = Check("well", lambda visit: ok("")), Check("odd", lambda visit: warn("", ""))
    assert doctor.main([], [well, odd]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 warn, 1 ok"
    assert doctor.main([], [well, odd, Check("broken", breaks)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 FAIL, 1 warn, 1 ok"


def test_what_launchers_say():
    assert doctor.read_launch({"LOCAL_RANK": "3"}, None) == Launch()
    launched = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    assert doctor.read_launch(launched, 1) == Launch(5, 1, 8, "a", 7)
    assert doctor.read_launch({**launched, "LOCAL_RANK": "2"}, 1) == Launch(5, 2, 8, "a", 7)
    del launched["MASTER_PORT"]
    with pytest.raises(SystemExit, match="RANK, WORLD_SIZE, MASTER_ADDR are set, MASTER_PORT not"):
        doctor.read_launch(launched, None)


def test_options():
    visit = doctor.parse(["--local_rank=1", "--config", "a.json", "--timeout-s", "5"])
    assert (visit.config_path.name, visit.timeout_s) == ("a.json", 5.0)


# This machine


def test_versions(monkeypatch):
    versions = {"torch": "2.13.0+cpu", "triton": "3.9.0", "deepspeed": "0.19.8", "megatron-core": "0.16.1"}
    versions |= {"pydantic": "2.11.0", "packaging": "25.0"}

    def look(**changed):
        found = versions | {name.replace("_", "-"): number for name, number in changed.items()}
        monkeypatch.setattr(machine, "_find_version", lambda package: found.get(package, "not installed"))
        return machine.check_versions(Visit())

    assert look().status is Status.OK
    assert "torch 2.13.0+cpu" in str(look())
    assert look(megatron_core="not installed").status is Status.OK
    old = look(deepspeed="0.18.0", megatron_core="0.15.0")
    assert old.status is Status.WARN
    assert "deepspeed 0.18.0: its host accepts" in str(old)
    assert "megatron-core 0.15.0: its host accepts" in str(old)
    missing = look(triton="not installed", torch="1.0")
    assert missing.status is Status.FAIL
    assert "triton not installed: accepted: >=" in str(missing)
    assert "torch 1.0: accepted: " in str(missing)
    other = machine.compare_versions([look().facts, look(torch="2.12.0").facts])
    assert (other.status, other.text) == (Status.FAIL, "the ranks differ in torch: 2.12.0, 2.13.0+cpu")
    assert machine.compare_versions([look().facts] * 2) is None


@pytest.fixture
def two_gpus(monkeypatch):
    properties = SimpleNamespace(name="Fast", major=9, minor=0, uuid="GPU-1")
    taken = []
    for name, value in {
        "device_count": lambda: 2,
        "set_device": taken.append,
        "get_device_properties": lambda device: properties,
        "mem_get_info": lambda device: (70 << 30, 80 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return taken


def test_a_rank_takes_its_gpu(two_gpus):
    visit = Visit(Launch(local_rank=1))
    found = machine.check_device(visit)
    assert two_gpus == [visit.device] == [torch.device("cuda", 1)]
    assert found.text == f"2 GPUs on {HERE}, Fast, compute capability 9.0, 70 of 80 GiB free"
    assert found.facts == (HERE, "GPU-1")


def test_more_ranks_than_gpus(two_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = machine.check_device(Visit(Launch(local_rank=2)))
    assert found.status is Status.FAIL
    assert found.text.startswith(
        f"LOCAL_RANK = 2 on {HERE}, where 2 GPUs are seen (CUDA_VISIBLE_DEVICES = '0"
    )
    assert two_gpus == []


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert machine.check_device(Visit())[:2] == (Status.WARN, "no GPU")


def test_gpus_are_not_shared_and_on_all_ranks_or_none():
    compare = machine.compare_devices
    assert compare([("a", "1"), ("a", "2"), ("b", "1")]) is None
    assert compare([("a", None), ("a", None), ("b", None)]) is None
    shared = compare([("a", "1"), ("a", "2"), ("a", "1")])
    assert (shared.status, shared.text) == (Status.FAIL, "one GPU is used by the ranks [0, 2] on a")
    mixed = compare([("a", "1"), ("b", None)])
    assert (mixed.status, mixed.text) == (Status.FAIL, "no GPU on b, but on other hosts")


def test_connections(monkeypatch):
    assert machine.check_connections(Visit()).status is Status.SKIP
    for value, status in (("1", Status.WARN), ("8", Status.OK)):
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", value)
        assert machine.check_connections(Visit(device=GPU)).status is status
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    assert machine.check_connections(Visit(device=GPU)).status is Status.OK


@pytest.mark.parametrize(
    ("value", "status"), [(None, Status.WARN), ("many", Status.WARN), ("5", Status.WARN), ("4", Status.OK)]
)
def test_threads(monkeypatch, value, status):
    """Of eight cores, for two ranks on this host."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    found = machine.check_threads(Visit(facts={"ranks": [HERE, "b", HERE]}))
    assert found.status is status
    assert status is Status.OK or found.advice == "set it to 4 or less"
    assert machine.check_threads(Visit(device=GPU)).status is Status.SKIP


def test_block(tmp_path):
    def look(text):
        (tmp_path / "ds.json").write_text(text)
        visit = Visit(config_path=tmp_path / "ds.json")
        return machine.check_block(visit), visit.config

    found, config = look('{"bf16": {"enabled": true}, "clapping": {}}')
    assert found.text == (
        "strategy direct: activations 4.125 of 16 bits per value (3.88x less), "
        "gradients 4.125 of 16 bits per value (3.88x less)"
    )
    assert config.strategy == "direct"
    wrong, _ = look('{"clapping": {"strategy": "fu", "p_neu": 1}}')
    assert wrong.status is Status.FAIL
    assert wrong.text.startswith("clapping.p_neu = 1: unknown key; accepted: enabled, ")
    for text in ("{}", '{"clapping": {"enabled": false}}'):
        assert look(text)[0].status is Status.WARN
    for text in ("[]", "{"):
        assert look(text)[0].status is Status.FAIL
    assert machine.check_block(Visit(config_path=tmp_path / "none.json")).status is Status.FAIL
    assert machine.check_block(Visit()).status is Status.SKIP
    assert machine.compare_blocks(["a", "a"]) is None
    assert machine.compare_blocks(["a", "b"]).status is Status.FAIL


def test_files(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "to" / "make"))
    found = machine.check_files(Visit(device=GPU))
    assert f"{tmp_path}/to/make, " in found.text
    assert "cannot" not in found.text
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert f"{tmp_path}/file/cache cannot be written" in machine.check_files(Visit(device=GPU)).text
    assert machine.check_files(Visit()).status is Status.OK
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = machine.check_files(Visit(config=SimpleNamespace(compile=True)))
    assert found.status is Status.FAIL
    assert "no C++ compiler 'no-such-compiler'" in found.text
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 26))
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert "NCCL may lack shared memory: docker run" in machine.check_files(Visit(device=GPU)).text


def test_the_lock_of_a_build_that_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert machine.check_files(Visit()).status is Status.OK  # it may be running
    os.utime(lock, (0, 0))
    found = machine.check_files(Visit())
    assert found.status is Status.WARN
    assert f"{lock} is old: delete it, unless a build is running" in found.text


def test_network(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    visit = Visit(Launch(0, 0, 2, "127.0.0.1", 29500), facts={"ranks": ["a", "a"]})
    assert network.check_network(Visit()).status is Status.SKIP
    found = network.check_network(visit)
    assert found.status is Status.OK
    assert found.text.startswith("the way to 127.0.0.1 is lo (127.0.0.1); gloo takes ")
    visit.facts["ranks"] = ["a", "b"]
    assert "several hosts, and MASTER_ADDR leads to this one" in network.check_network(visit).text
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert "several hosts, and gloo takes this one's loopback" in network.check_network(visit).text
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    found = network.check_network(visit)
    assert found.status is Status.FAIL
    assert "no interface eth99: there are " in found.text


def test_a_host_whose_name_leads_nowhere_is_on_loopback(monkeypatch):
    monkeypatch.setattr(network.socket, "gethostname", lambda: "no-such-host.invalid")
    assert network._find_gloo_address() == "127.0.0.1"


# Codecs


def test_every_codec_with_every_dtype_and_memory():
    cases = list(selftest.list_cases())
    assert len(set(map(str, cases))) == len(cases)
    for name in CODECS:
        own = [case for case in cases if case.codec == CODECS[name](name=name)]
        assert {case.dtype for case in own} == set(selftest.DTYPES)
        assert {case.carry for case in own} == set(selftest.MEMORIES)


def test_codecs_are_well():
    assert selftest.check_codecs(Visit()).status is Status.OK


def test_the_kernels_give_what_the_self_test_compares(monkeypatch):
    """What it does on a GPU, in Triton's interpreter."""
    cases = list(selftest.list_cases())[::6]
    made = [(selftest._make_value(case.dtype), selftest._make_memory(case)) for case in cases]
    expected = [selftest._exchange(case, *of_case, None) for case, of_case in zip(cases, made, strict=True)]
    on_triton(monkeypatch)
    for case, of_case, twin in zip(cases, made, expected, strict=True):
        found = selftest._exchange(case, *of_case, twin["payload"])
        assert ("payload" in found) != isinstance(case.codec, LowRank | Transform)
        assert [name for name in found if not selftest.is_same(found[name], twin[name])] == []


def test_broken_codecs_are_named(monkeypatch):
    decode = Eden.decode_

    def decode_wrongly(codec, payload, out, context):
        decode(codec, payload, out, context)
        if codec == Eden(name="eden3") and context.memory is not None:
            context.memory[0, 3] += 1

    def encode_wrongly(codec, *arguments):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Eden, "decode_", decode_wrongly)
    found = selftest.check_codecs(Visit())
    assert found.status is Status.FAIL
    assert found.text.startswith("2 of 61 configurations differ: Eden(")
    assert found.text.count("name='eden3'") == 2
    assert "receiver's memory" in found.text
    monkeypatch.setattr(CODECS["topk"], "encode_", encode_wrongly)
    assert "RuntimeError: no kernel" in selftest.check_codecs(Visit()).text


# Ranks together


def test_hosts_and_links_are_said():
    assert compare_hosts(["a", "a", "b"]).text == "3 (2 on a, 1 on b)"
    assert compare_hosts(["a"]) is None
    speed = Speed(125e6, 5e-4)
    told = [[(0, 1, speed)], [(1, 0, speed._replace(bytes_per_s=1e6))]]
    assert compare_speeds(told).text == "0>1 1000 Mbit/s 0.50 ms, 1>0 8 Mbit/s 0.50 ms"
    assert compare_speeds([None]) is None
    many = [[(rank, rank + 1, Speed(1e6 * (1 + rank), 0.1))] for rank in range(20)]
    assert compare_speeds(many).text.startswith("0>1 8 Mbit/s 100.00 ms, 1>2 16 ")
    assert compare_speeds(many).text.endswith("(the slowest of 20)")


def test_memories_and_errors_of_the_steps():
    sent, received = (steps.Held("key_delta", 0, "activations", sends, (1, 2)) for sends in (True, False))
    assert steps.compare_steps([([sent], 0.01), ([received], 0.02)]).status is Status.OK
    assert "off by 0.5" in steps.compare_steps([([sent], 0.01), ([received], 0.5)]).text
    assert steps.find_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    other = steps.compare_steps([([sent], 0.01), ([received._replace(checksums=(1, 3))], 0.01)])
    assert other.text == "the ends hold different memories: key_delta, link 0-1, activations"
    assert steps.compare_steps([None]) is None


def test_what_replicas_are_left_with():
    one = replicas.Exchanged((1, 2), 0.08, 0.001)
    found = replicas.compare_replicas([one, one._replace(took_s=0.002)])
    assert found.status is Status.OK
    assert found.text.endswith("error 0.080, 2.0 ms")
    differing = replicas.compare_replicas([one, one._replace(checksums=(1, 3))])
    assert differing.status is Status.FAIL
    assert "different means" in differing.text
    assert replicas.compare_replicas([one, one._replace(error=float("inf"))]).status is Status.FAIL
    assert replicas.compare_replicas([None, None]) is None
