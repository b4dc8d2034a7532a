"""Payloads beside the stream: in /dev/shm between processes of one host, in Redis between hosts, and never left behind."""

import asyncio
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from gateway.message import BadMessage
from gateway.queues.redis import beside, shared_files
from gateway.queues.redis.beside import Missing, Payloads
from gateway.queues.redis.shared_files import SharedFiles
from gateway.redis_client import RedisClient, RedisOptions
from gateway.redis_server import EmbeddedServer

OWNER = f"gateway-{'0' * 32}"
PARTS = [b"abc", b"", bytearray(b"defg"), memoryview(b"h" * 5000)]
DATA = b"".join(PARTS)


class Nowhere:
    """A client that no test may call."""


@pytest.fixture
def folder():
    made = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def gateway(folder):
    with Payloads(Nowhere(), OWNER, folder) as payloads:
        yield payloads


@pytest.fixture
def worker(folder):
    with Payloads(Nowhere(), f"worker-{'1' * 32}", folder) as payloads:
        yield payloads


@pytest.fixture
async def client():
    async with EmbeddedServer() as server, RedisClient(RedisOptions(server.url)) as connected:
        yield connected


def files(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("lockgate-host"))


async def share(payloads, data=DATA, ttl=60.0):
    return await payloads.put("a-1", data if isinstance(data, list) else [data], same_host=True, ttl=ttl)


def descriptors():
    """Those of files and folders like the ones tested here; a connection of another test may end at any time."""
    found = 0
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found += str(each.readlink()).startswith("/dev/shm/")
    return found


# --- which processes share a folder


def test_processes_of_one_host_have_the_same_token(gateway, worker, folder):
    assert gateway.host == worker.host
    assert len(bytes.fromhex(gateway.host)) == 16
    (token,) = folder.iterdir()
    assert token.stat().st_mode & 0o777 == 0o600


def test_those_of_another_host_have_another(gateway):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other, Payloads(Nowhere(), OWNER, Path(other)) as elsewhere:
        assert elsewhere.host not in (None, gateway.host)


def test_processes_that_start_together_agree(folder):
    start = threading.Barrier(8)

    def token(_):
        start.wait()
        files = SharedFiles(folder)
        files.close()
        return files.host

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(token, range(8)))) == 1
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("squat", ["public", "short", "link", "folder", "pipe"])
def test_a_token_that_is_not_ours_is_not_believed(folder, squat, caplog):
    caplog.set_level(logging.INFO, "gateway")
    token = folder / f"lockgate-host-{os.geteuid()}"
    match squat:
        case "public":
            token.write_text("0" * 32)
            token.chmod(0o644)
        case "short":
            token.touch(0o600)
        case "link":
            (folder / "elsewhere").write_text("0" * 32)
            token.symlink_to("elsewhere")
        case "folder":
            token.mkdir(0o700)
        case "pipe":
            os.mkfifo(token, 0o600)
    before = descriptors()
    with Payloads(Nowhere(), OWNER, folder) as payloads:
        assert payloads.host is None
    assert descriptors() == before
    assert [record.getMessage().split()[0] for record in caplog.records] == ["no_shared_memory"]


async def test_without_shared_memory_payloads_go_through_redis(client):
    with Payloads(client, OWNER, Path("/dev/shm/nobody/has/this")) as payloads:
        assert payloads.host is None
        reference = await share(payloads)
        assert reference.startswith("b:")
        assert await payloads.get(reference) == DATA
        payloads.remove(reference)
        assert payloads.bytes_held == payloads.sweep() == 0
        with pytest.raises(BadMessage, match="another host"):
            await payloads.get("f:5:lockgate-1.1.1.a.b.0")


# --- files


async def test_the_other_process_reads_what_was_put(gateway, worker, folder):
    reference = await share(gateway, PARTS)
    (file,) = files(folder)
    assert file.stat().st_mode & 0o777 == 0o600
    assert OWNER in file.name
    assert f".{os.getpid()}." in file.name
    view = await worker.get(reference)
    assert view == DATA
    assert view.readonly
    assert gateway.bytes_held == len(DATA)


@pytest.mark.parametrize("count", [1, 1024, 5000])
async def test_many_parts_are_as_good_as_one(gateway, count):
    parts = [bytes([number % 256]) * 3 for number in range(count)]
    assert await gateway.get(await share(gateway, parts)) == b"".join(parts)


async def test_a_large_payload_is_written_off_the_loop(gateway, monkeypatch):
    threads = []

    def fill(descriptor, parts):
        threads.append(threading.current_thread())
        shared_files.fill(descriptor, parts)

    monkeypatch.setattr(beside, "fill", fill)
    for data, here in ((bytes(1 << 20), True), (os.urandom(5 << 20), False)):
        reference = await share(gateway, data)
        assert (threads.pop() is threading.current_thread()) == here
        assert await gateway.get(reference) == data


async def test_a_view_outlives_its_file_and_its_owner(gateway, worker, folder):
    view = await worker.get(await share(gateway))
    gateway.close()
    assert files(folder) == []
    assert view == DATA


async def test_what_is_removed_is_missing(gateway, worker):
    reference = await share(gateway)
    gateway.remove(reference)
    gateway.remove(reference)
    with pytest.raises(Missing):
        await worker.get(reference)


async def test_a_file_is_written_again_when_nobody_looks_at_it(gateway, worker, folder):
    first = await share(gateway, b"a" * 5000)
    (file,) = files(folder)
    inode = file.stat().st_ino
    view = await worker.get(first)
    gateway.remove(first)
    second = await share(gateway, b"b" * 9000)
    assert view == b"a" * 5000
    assert inode not in {file.stat().st_ino for file in files(folder) if ".spare." not in file.name}
    del view
    third = await share(gateway, b"c" * 100)
    assert inode in {file.stat().st_ino for file in files(folder)}
    assert gateway.bytes_held == 9100
    assert [bytes(await worker.get(each)) for each in (second, third)] == [b"b" * 9000, b"c" * 100]
    with pytest.raises(Missing):
        await worker.get(first)


@pytest.mark.parametrize("when", ["before the lock", "after the lock"])
async def test_a_reader_that_comes_too_late_does_not_read_what_was_written_since(gateway, worker, when, monkeypatch):
    reference = await share(gateway, b"a" * 5000)
    lock = shared_files.fcntl.flock

    def late(descriptor, how):
        monkeypatch.undo()
        if when == "after the lock":
            lock(descriptor, how)
        gateway.remove(reference)
        _, opened = gateway._files.create("a.b.0", 5000, 60.0)
        shared_files.fill(opened, [b"b" * 5000])
        if when == "before the lock":
            lock(descriptor, how)

    monkeypatch.setattr(shared_files.fcntl, "flock", late)
    with pytest.raises(Missing):
        await worker.get(reference)


async def test_a_file_is_not_read_while_it_is_written_again(gateway, worker, monkeypatch):
    reference = await share(gateway, b"a" * 5000)
    opened = []
    lock = shared_files.fcntl.flock

    def late(descriptor, how):
        monkeypatch.undo()
        gateway.remove(reference)
        opened.append(gateway._files.create("a.b.0", 5000, 60.0)[1])
        lock(descriptor, how)

    monkeypatch.setattr(shared_files.fcntl, "flock", late)
    with pytest.raises(Missing):
        await worker.get(reference)
    os.close(*opened)


async def test_views_cost_no_descriptors_when_they_end(gateway, worker):
    reference = await share(gateway)
    before = descriptors()
    for _ in range(20):
        assert await worker.get(reference) == DATA
    assert descriptors() == before


async def test_spare_files_are_bounded(gateway, folder, monkeypatch):
    monkeypatch.setattr(shared_files, "_SPARE_BYTES", 10_000)
    for reference in [await share(gateway, bytes(4000)) for _ in range(5)]:
        gateway.remove(reference)
    assert len(files(folder)) == 2
    assert gateway.bytes_held == 8000
    assert gateway.sweep() == 0
    monkeypatch.setattr(shared_files, "_SPARE_SECONDS", -1.0)
    assert gateway.sweep() == 2
    assert files(folder) == []
    assert gateway.bytes_held == 0


# --- references are data from the network


@pytest.mark.parametrize(
    "reference",
    [
        "", "f", "f:5", "x:5:a", "f:5:../../etc/passwd", "f:5:/etc/passwd", "f:5:a/b", "f:-5:a", "f:0:a", "f:\u0665:a",
        "f:5:lockgate-host-0", "f:5:lockgate-1.1.1.a.b.", "f:5:lockgate-1.1.1.a..0", "f:5:lockgate-1.1.1.a.b.0\n",
        "b:5:{a}", "b:5:a:b", "b:5:a\0", "b:0:a", "f:5:lockgate-1.1.1.a.b.\0", "f:9999999999999:a", "b:5:" + "a" * 300,
    ],
)  # fmt: skip
async def test_what_nobody_here_made_is_not_looked_up(gateway, reference):
    with pytest.raises(BadMessage):
        await gateway.get(reference)
    with pytest.raises(BadMessage):
        gateway.remove(reference)


@pytest.mark.parametrize("trap", ["link", "public", "folder", "pipe", "longer", "shorter", "foreign"])
async def test_only_a_private_file_of_the_right_size_is_read(gateway, folder, trap):
    path = folder / "lockgate-1.1.1.a.b.0"
    match trap:
        case "link":
            (folder / "elsewhere").write_bytes(b"12345")
            (folder / "elsewhere").chmod(0o600)
            path.symlink_to("elsewhere")
        case "folder":
            path.mkdir(0o700)
        case "pipe":
            os.mkfifo(path, 0o600)
        case _:
            path.write_bytes({"longer": b"123456", "shorter": b"1234"}.get(trap, b"12345"))
            path.chmod(0o644 if trap == "public" else 0o600)
    if trap == "foreign":
        if os.geteuid():
            pytest.skip("only root can give a file to another user")
        os.chown(path, 12345, 12345)
    before = descriptors()
    with pytest.raises(BadMessage):
        await gateway.get(f"f:5:{path.name}")
    assert descriptors() == before


@pytest.mark.parametrize("identity", ["", "a/b", "a.b", "é", "a" * 65, "a\n"])
async def test_an_identity_is_a_word(gateway, identity):
    with pytest.raises(ValueError, match="cannot name a payload"):
        await gateway.put(identity, [b"x"], same_host=True, ttl=1.0)


# --- in Redis


@pytest.fixture
def remote(client, folder):
    with Payloads(client, OWNER, folder) as payloads:
        yield payloads


async def test_another_host_reads_it_from_redis(remote, client, folder):
    reference = await remote.put("a", PARTS, same_host=False, ttl=5.0)
    assert files(folder) == []
    assert await remote.get(reference) == DATA
    (key,) = await client.call("KEYS", "*")
    assert key.decode() == client.keys.payload(reference.split(":")[2])
    assert 0 < await client.call("PTTL", key) <= 5000
    remote.remove(reference)
    assert await client.call("EXISTS", key) == 0
    with pytest.raises(Missing):
        await remote.get(reference)


async def test_one_part_is_stored_as_it_is(remote):
    for part in (b"x" * 300, bytearray(b"y" * 300), memoryview(b"z" * 300)):
        assert await remote.get(await remote.put("a", [part], same_host=False, ttl=5.0)) == part


async def test_the_same_identity_twice_is_two_payloads(remote):
    one, other = [
        await remote.put("a", [data], same_host=where, ttl=5.0) for where in (False, True) for data in (b"1", b"2")
    ][:2]
    assert (await remote.get(one), await remote.get(other)) == (b"1", b"2")
    remote.remove(one)
    assert await remote.get(other) == b"2"


async def test_a_payload_of_another_size_is_damage(remote, client):
    reference = await remote.put("a", [b"12345"], same_host=False, ttl=5.0)
    await client.call("APPEND", client.keys.payload(reference.split(":")[2]), "6")
    with pytest.raises(BadMessage, match="6 bytes, 5 were put"):
        await remote.get(reference)


# --- no room


def full(caplog):
    return [record.getMessage() for record in caplog.records if "shared_memory_full" in record.getMessage()]


def leave(monkeypatch, folder, blocks):
    """Have the folder's file system say that it has so many blocks beyond the eighth that is not ours."""
    room = os.statvfs(folder)
    left = os.statvfs_result((room.f_bsize, room.f_frsize, 16384, 2048 + blocks, 2048 + blocks, *room[5:10]))
    monkeypatch.setattr(os, "fstatvfs", lambda _: left)


async def test_what_is_nearly_full_is_left_to_others(remote, folder, monkeypatch, caplog):
    leave(monkeypatch, folder, 52)
    small = 52 * os.statvfs(folder).f_frsize
    for size, kind in ((small + 1, "b"), (small + 1, "b"), (small, "f")):
        reference = await remote.put("a", [bytes(size)], same_host=True, ttl=5.0)
        assert reference[0] == kind
        assert await remote.get(reference) == bytes(size)
        remote.remove(reference)
    leave(monkeypatch, folder, 0)
    assert (await share(remote, bytes(small)))[0] == "f"
    assert len(full(caplog)) == 1
    assert "--shm-size" in full(caplog)[0]


async def test_a_spare_file_does_not_grow_where_there_is_no_room(remote, folder, monkeypatch):
    remote.remove(await share(remote, bytes(4096)))
    leave(monkeypatch, folder, 0)
    assert (await share(remote, bytes(4097)))[0] == "b"
    assert files(folder) == []
    assert remote.bytes_held == 0


async def test_a_write_that_finds_no_room_goes_through_redis(remote, folder, caplog):
    """A limit on the size of files stands in for a full folder: a write falls short, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    await remote.put("warm", [b"x" * 6000], same_host=False, ttl=60)  # opens the connection for large commands
    before = descriptors()
    try:
        references = [await share(remote, [b"x" * 3000, b"y" * 3000]) for _ in range(2)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {reference[0] for reference in references} == {"b"}
    assert await remote.get(references[0]) == b"x" * 3000 + b"y" * 3000
    assert files(folder) == []
    assert remote.bytes_held == 0
    assert descriptors() == before
    assert len(full(caplog)) == 1


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_put_that_is_cancelled_leaves_nothing(gateway, folder, monkeypatch, begun, closed):
    begins, ends, written = threading.Event(), threading.Event(), threading.Event()

    def fill(descriptor, parts):
        begins.set()
        ends.wait()
        shared_files.fill(descriptor, parts)
        written.set()

    monkeypatch.setattr(beside, "fill", fill)
    before = descriptors()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:
        loop.set_default_executor(pool)
        if not begun:
            pool.submit(ends.wait)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(share(gateway, bytes(5 << 20)))
            await asyncio.sleep(0)
            if begun:
                begins.wait()
            assert len(files(folder)) == 1
            if closed:
                gateway.close()
                before -= 1  # the folder's own
            task.cancel()
        assert task.cancelled()
        assert files(folder) == []
        assert gateway.bytes_held == 0
        ends.set()
        written.wait()
    assert descriptors() == before
    assert files(folder) == []


# --- what is left behind


async def test_a_payload_that_is_forgotten_ends(gateway, folder):
    await share(gateway, ttl=0.0)
    kept = await share(gateway)
    assert gateway.sweep() == 1
    assert len(files(folder)) == 1
    assert gateway.bytes_held == len(DATA)
    assert await gateway.get(kept) == DATA


async def test_the_reader_of_an_answer_may_remove_it(gateway, worker, folder):
    reference = await share(worker)
    view = await gateway.get(reference)
    gateway.remove(reference)
    assert files(folder) == []
    assert view == DATA
    assert worker.sweep() == 0
    assert worker.bytes_held == 0


CHILD = """
import asyncio, sys
from pathlib import Path
from gateway.queues.redis.beside import Payloads

async def put():
    payloads = Payloads(None, "worker-x", Path(sys.argv[1]))
    print(await payloads.put("a", [b"from the child"], same_host=True, ttl=60.0), flush=True)

asyncio.run(put())
sys.stdin.read()
"""


def age(path):
    os.utime(path, (0, 0))


def test_files_of_dead_processes_are_swept(gateway, folder):
    """And no others: of the living, of other process namespaces, of the last seconds, of other users, of anyone else."""
    bystander = folder / "lockgate-of-somebody-else"
    bystander.touch()
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], stdin=pipe, stdout=pipe, text=True) as child:
        reference = child.stdout.readline().strip()
        (path,) = [file for file in files(folder) if file != bystander]
        age(path)
        assert gateway.sweep() == 0
        assert asyncio.run(gateway.get(reference)) == b"from the child"
        child.kill()
    os.utime(path)
    assert gateway.sweep() == 0
    namespace, pid, started, rest = path.name.removeprefix("lockgate-").split(".", 3)
    for name in (
        f"{int(namespace) + 1}.{pid}.{started}.{rest}",
        f"{namespace}.{os.getpid()}.{int(started) + 1}.{rest}",
    ):
        age_me = folder / f"lockgate-{name}"
        age_me.touch(0o600)
        age(age_me)
    age(path)
    assert gateway.sweep() == 2
    assert files(folder) == sorted([bystander, folder / f"lockgate-{int(namespace) + 1}.{pid}.{started}.{rest}"])
    with pytest.raises(Missing):
        asyncio.run(gateway.get(reference))


async def test_nothing_is_left_at_the_end(folder):
    with Payloads(Nowhere(), OWNER, folder) as payloads:
        references = [await share(payloads) for _ in range(3)]
        payloads.remove(references[0])
        assert payloads.bytes_held == 3 * len(DATA)
    assert files(folder) == []
    assert payloads.bytes_held == 0
    payloads.remove(references[1])
