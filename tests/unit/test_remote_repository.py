"""Remote repositories over fsspec's memory file system: what is downloaded when, the cache, and stores that go away."""

import gc
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from gateway.config.locations import Location
from gateway.errors import GatewayError, InvalidArgument, NotFound, Unavailable
from gateway.repository import Repository
from gateway.repository.remote.cache import Cache
from gateway.repository.remote.root import RemoteRoot
from gateway.repository.remote.store import Store
from gateway.types import DataType, ModelIO, TensorSpec

IO = ModelIO((TensorSpec("x", DataType.FP32, (-1, 4)),), (TensorSpec("y", DataType.FP32, (-1, 2)),))
MIB = 1 << 20


class Bucket:
    """A store, and a repository that reads it as one process does."""

    def __init__(self, cache: Path, name: str, limit: int = MIB) -> None:
        self.files = fsspec.filesystem("memory", skip_instance_cache=True)
        self.files.store = {}
        self.files.pseudo_dirs = [""]
        self.folder, self.name, self.limit = cache, name, limit
        self.got: list[str] = []
        self.fails: Exception | Callable[[], Exception] | None = None
        self.during: list[object] = []  # called while a file is downloaded
        self.repository = self.read_by_another()

    def read_by_another(self, *, required: bool = False) -> Repository:
        self.root = RemoteRoot(
            Location("s3", f"{self.name}/models"), Cache(self.folder, self.limit), self._connect, required=required
        )
        return Repository([self.root], lambda _: IO)

    def _connect(self) -> Store:
        return Store(_Watched(self), f"/{self.name}/models", "models")

    def put(self, path: str, content: bytes | str = b"") -> None:
        self.files.pipe(f"/{self.name}/models/{path}", content if isinstance(content, bytes) else content.encode())

    def remove(self, path: str) -> None:
        self.files.rm(f"/{self.name}/models/{path}", recursive=True)

    def downloads(self) -> list[str]:
        found, self.got = sorted(self.got), []
        return found


class _Watched:
    """The file system of a bucket, which notes what is downloaded and fails when it is told to."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._strip_protocol = bucket.files._strip_protocol
        self.invalidate_cache = bucket.files.invalidate_cache

    def _asked(self, name, *arguments, **more):
        if self._bucket.fails is not None:
            raise self._bucket.fails() if callable(self._bucket.fails) else self._bucket.fails
        return getattr(self._bucket.files, name)(*arguments, **more)

    def ls(self, *arguments, **more):
        return self._asked("ls", *arguments, **more)

    def find(self, *arguments, **more):
        return self._asked("find", *arguments, **more)

    def get(self, there, here):
        self._bucket.got += [path.removeprefix(f"/{self._bucket.name}/models/") for path in there]
        self._asked("get", there, here)
        while self._bucket.during:
            self._bucket.during.pop()()


@pytest.fixture
def bucket(tmp_path: Path, request: pytest.FixtureRequest) -> Bucket:
    return Bucket(tmp_path / "cache", f"bucket-{abs(hash(request.node.nodeid))}")


def trees(bucket: Bucket) -> int:
    return len([*(bucket.folder / "trees").glob("*/*/*/model.onnx")])


def refused(bucket: Bucket, name: str = "m") -> str:
    with pytest.raises(GatewayError) as caught:
        bucket.repository.read(name)
    return caught.value.message


# --- reading


def test_a_model_is_read_from_what_is_brought_here(bucket: Bucket) -> None:
    bucket.put("m/config.pbtxt", "max_batch_size: 16")
    bucket.put("m/1/model.onnx", b"one")
    bucket.put("m/1/more/weights", b"weights")
    assert list(bucket.repository.scan()) == ["m"]
    source = bucket.repository.read("m")
    assert source.config.max_batch_size == 16
    assert list(source.versions) == [1]
    folder = source.versions[1]
    assert (folder.parent.name, folder.name) == ("m", "1")
    assert (folder / "model.onnx").read_bytes() == b"one"
    assert (folder / "more/weights").read_bytes() == b"weights"
    assert (folder.parent / "config.pbtxt").read_text() == "max_batch_size: 16"
    assert bucket.downloads() == ["m/1/model.onnx", "m/1/more/weights", "m/config.pbtxt"]


def test_only_the_versions_that_the_policy_chooses_are_brought_here(bucket: Bucket) -> None:
    for number in (1, 2, 10):
        bucket.put(f"m/{number}/model.onnx", f"version {number}")
    source = bucket.repository.read("m")
    assert list(source.versions) == [10]
    assert bucket.downloads() == ["m/10/model.onnx"]
    bucket.put("m/config.pbtxt", "version_policy { specific { versions: [ 1, 2 ] } }")
    assert list(bucket.repository.read("m").versions) == [1, 2]
    assert bucket.downloads() == ["m/1/model.onnx", "m/2/model.onnx", "m/config.pbtxt"]


def test_a_new_version_leaves_the_others_where_they_are(bucket: Bucket) -> None:
    bucket.put("m/config.pbtxt", "version_policy { all {} }")
    bucket.put("m/1/model.onnx", "one")
    before = bucket.repository.read("m")
    bucket.downloads()
    bucket.put("m/2/model.onnx", "two")
    after = bucket.repository.read("m")
    assert bucket.downloads() == ["m/2/model.onnx"]
    assert after.versions[1] == before.versions[1]
    assert after.fingerprint.of(1) == before.fingerprint.of(1)
    bucket.put("m/2/model.onnx", "2")
    changed = bucket.repository.read("m")
    assert (changed.versions[1], changed.versions[2]) != (after.versions[1], after.versions[2])
    assert changed.versions[1] == after.versions[1]
    assert (after.versions[2] / "model.onnx").read_text() == "two"  # whoever serves it goes on
    assert (changed.versions[2] / "model.onnx").read_text() == "2"


def test_a_version_without_files_may_be_a_folder(bucket: Bucket) -> None:
    bucket.put("m/config.pbtxt", 'backend: "fake"')
    bucket.files.makedirs(f"/{bucket.name}/models/m/1")
    assert "input" in refused(bucket)  # and not that there is no version
    assert bucket.repository.scan().keys() == {"m"}


def test_names_that_lead_elsewhere_and_hidden_ones_are_no_files(bucket: Bucket) -> None:
    bucket.put("m/1/model.onnx", "one")
    for path in ("m/1/.git/x", ".hidden/1/model.onnx", "_old/1/model.onnx", "m/1/__pycache__/x.pyc", "README.md"):
        bucket.put(path, "x")
    bucket.files.store[f"/{bucket.name}/models/m/1/../../../../x"] = bucket.files.store[
        f"/{bucket.name}/models/m/1/model.onnx"
    ]
    assert list(bucket.repository.scan()) == list(bucket.repository.changes({}).now) == ["m"]
    source = bucket.repository.read("m")
    assert [path.name for path in source.versions[1].iterdir()] == ["model.onnx"]
    for name in ("../m", "m/1", "", ".hidden", "_old", "other"):
        with pytest.raises(NotFound):
            bucket.repository.read(name)


def test_the_folder_of_one_model_is_no_repository(bucket: Bucket) -> None:
    bucket.put("config.pbtxt")
    with pytest.raises(InvalidArgument, match="'models' is the folder of one model"):
        bucket.repository.scan()


def test_a_name_that_a_folder_has_too_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("m/1/model.onnx")
    (tmp_path / "local/m/1").mkdir(parents=True)
    repository = Repository([tmp_path / "local", bucket.root], lambda _: IO)
    with pytest.raises(InvalidArgument, match=r"appears in two or more repositories \('local', 'models'\)"):
        repository.read("m")


# --- changes


def test_changes_are_told_from_the_listing_alone(bucket: Bucket) -> None:
    bucket.put("a/1/model.onnx", "a")
    bucket.put("b/1/model.onnx", "b")
    first = bucket.repository.changes({})
    assert first.added == ("a", "b")
    assert bucket.repository.changes(first.now).now == first.now
    bucket.put("a/1/model.onnx", "A")  # of the same size
    bucket.put("c/1/model.onnx", "c")
    bucket.remove("b")
    second = bucket.repository.changes(first.now)
    assert (second.added, second.changed, second.removed) == (("c",), ("a",), ("b",))
    assert bucket.repository.read("c").fingerprint == second.now["c"]
    assert bucket.downloads() == ["c/1/model.onnx"]


# --- a store that goes away


def metrics(bucket: Bucket) -> dict[str, float]:
    return {
        family.name.removeprefix("gateway_repository_"): value
        for family in bucket.repository.metrics()
        for _, value in family.samples
    }


def test_what_a_store_had_stays_known_while_it_cannot_be_reached(bucket: Bucket, caplog) -> None:
    caplog.set_level("INFO", "gateway")
    bucket.put("m/1/model.onnx", "one")
    before = bucket.repository.changes({})
    assert metrics(bucket) == {"reachable": 1, "failures_total": 0, "downloaded_bytes_total": 0}
    bucket.fails = ConnectionError("secret.example refused")
    after = bucket.repository.changes(before.now)
    assert (after.added, after.changed, after.removed) == ((), (), ())
    assert list(bucket.repository.scan()) == ["m"]
    assert refused(bucket) == (
        "model repository 'models' cannot be read: it cannot be reached. The server's log has the cause"
    )
    with pytest.raises(NotFound):
        bucket.repository.read("other")
    assert metrics(bucket) == {"reachable": 0, "failures_total": 4, "downloaded_bytes_total": 0}
    assert "ConnectionError: secret.example refused" in caplog.text
    bucket.fails = None
    assert bucket.repository.changes(after.now).changed == ("m",)  # it could not be had when it was wanted
    assert metrics(bucket)["reachable"] == 1
    assert "repository_reachable" in caplog.text


def test_a_store_that_was_never_reached_is_empty_or_an_error(bucket: Bucket, tmp_path: Path) -> None:
    bucket.fails = PermissionError("no")
    (tmp_path / "local/n/1").mkdir(parents=True)
    both = Repository([bucket.root, tmp_path / "local"], lambda _: IO)
    assert list(both.scan()) == list(both.changes({}).now) == ["n"]
    strict = bucket.read_by_another(required=True)
    for call in (strict.scan, lambda: strict.changes({})):
        with pytest.raises(Unavailable, match="'models' cannot be read: access is denied"):
            call()


def test_a_repository_without_anything_is_not_there_and_takes_nothing_away(bucket: Bucket) -> None:
    bucket.put("m/1/model.onnx", "one")
    before = bucket.repository.changes({})
    bucket.remove("m")
    bucket.files.store.clear()
    bucket.files.pseudo_dirs[:] = [""]
    assert bucket.repository.changes(before.now).removed == ()
    assert metrics(bucket)["reachable"] == 0


def test_a_repository_that_is_not_there_is_said_to_be_missing(bucket: Bucket) -> None:
    with pytest.raises(Unavailable, match="'models' cannot be read: it is not there"):
        bucket.read_by_another(required=True).scan()


def test_a_download_that_failed_is_tried_again_at_the_next_poll(bucket: Bucket) -> None:
    bucket.put("m/1/model.onnx", "one")
    before = bucket.repository.changes({})

    def lost() -> None:
        raise ConnectionError("gone")

    bucket.during = [lost]
    assert "cannot be reached" in refused(bucket)
    again = bucket.repository.changes(before.now)
    assert again.changed == ("m",)
    assert bucket.repository.read("m").versions
    assert bucket.repository.changes(again.now).changed == ()


def test_a_file_that_changes_while_it_is_downloaded_is_not_taken(bucket: Bucket) -> None:
    bucket.put("m/1/model.onnx", "one")
    bucket.during = [lambda: bucket.put("m/1/model.onnx", "two")]
    assert refused(bucket) == "'m/1/model.onnx' changed while it was downloaded; load the model again"
    (folder,) = bucket.repository.read("m").versions.values()
    assert (folder / "model.onnx").read_text() == "two"


def test_one_caller_finds_out_whether_the_store_is_back_and_the_others_do_not_wait(bucket: Bucket) -> None:
    bucket.put("m/1/model.onnx", "one")
    assert list(bucket.repository.scan()) == ["m"]
    bucket.fails = ConnectionError("refused")
    bucket.repository.scan()
    asked, answered = threading.Event(), threading.Event()

    def slowly() -> ConnectionError:
        asked.set()
        answered.wait(10)
        return ConnectionError("refused")

    bucket.fails = slowly
    slow = threading.Thread(target=bucket.repository.scan)
    slow.start()
    asked.wait(10)
    assert list(bucket.repository.scan()) == ["m"]
    assert slow.is_alive()
    answered.set()
    slow.join()


# --- the cache


def test_what_is_here_is_not_downloaded_again_by_whomever(bucket: Bucket) -> None:
    bucket.put("m/1/model.onnx", "one")
    first = bucket.repository.read("m")
    bucket.downloads()
    second = bucket.read_by_another().read("m")
    assert bucket.downloads() == []
    assert second.versions == first.versions


def test_equal_contents_lie_there_once(bucket: Bucket) -> None:
    for model in ("a", "b"):
        bucket.put(f"{model}/1/model.onnx", "equal")
    sources = [bucket.repository.read(name) for name in ("a", "b")]
    files = [source.versions[1] / "model.onnx" for source in sources]
    assert files[0].samefile(files[1])
    assert len([*(bucket.folder / "files").iterdir()]) == 1
    assert files[0].stat().st_mode & 0o777 == 0o444


def test_no_name_in_a_store_is_one_that_the_cache_uses(bucket: Bucket) -> None:
    bucket.put("a/1/model.onnx", "one")
    bucket.put("a/1/model.onnx.gateway", "two")
    source = bucket.repository.read("a")
    bucket.put("a/1/model.onnx", "two")  # which is known here by now
    again = bucket.repository.read("a")
    texts = [{path.name: path.read_text() for path in each.versions[1].iterdir()} for each in (source, again)]
    assert texts[0] == {"model.onnx": "one", "model.onnx.gateway": "two"}
    assert texts[1] == {"model.onnx": "two", "model.onnx.gateway": "two"}


def test_what_a_dead_process_of_the_same_number_left_is_in_nobodys_way(bucket: Bucket) -> None:
    bucket.put("m/1/model.onnx", "whole")
    bucket.repository.read("m")
    (content,) = (bucket.folder / "files").iterdir()
    for name in (content.name, *(path.name for path in (bucket.folder / "known").iterdir())):
        (bucket.folder / "new" / f"{name}.{os.getpid()}.{threading.get_ident()}").write_text("half")
    bucket.remove("m")
    bucket.put("n/1/model.onnx", "whole")
    bucket.repository.read("n")
    bucket.put("m/1/model.onnx", "whole")
    assert (bucket.repository.read("m").versions[1] / "model.onnx").read_text() == "whole"


def test_a_damaged_file_is_downloaded_again(bucket: Bucket) -> None:
    bucket.put("m/1/model.onnx", "whole")
    (folder,) = bucket.repository.read("m").versions.values()
    bucket.downloads()
    gc.collect()
    os.truncate(folder / "model.onnx", 2)  # as after a power cut
    (again,) = bucket.repository.read("m").versions.values()
    assert bucket.downloads() == ["m/1/model.onnx"]
    assert (again / "model.onnx").read_text() == "whole"


def test_the_oldest_that_nobody_uses_makes_room(bucket: Bucket) -> None:
    bucket.limit = 250
    repository = bucket.read_by_another()
    for name in "abcd":
        bucket.put(f"{name}/1/model.onnx", name * 100)
    used = repository.read("a")
    repository.read("b")
    gc.collect()
    repository.read("c")  # there is room for two
    gc.collect()
    bucket.downloads()
    repository.read("a")
    assert bucket.downloads() == []
    repository.read("b")
    assert bucket.downloads() == ["b/1/model.onnx"]
    assert trees(bucket) == 2
    assert Cache(bucket.folder, 1).size() == 200
    assert len([*(bucket.folder / "known").iterdir()]) == 2
    assert (used.versions[1] / "model.onnx").read_text() == "a" * 100


def test_what_is_in_use_stays_even_where_there_is_no_room(bucket: Bucket, caplog) -> None:
    bucket.limit = 150
    repository = bucket.read_by_another()
    for name in "ab":
        bucket.put(f"{name}/1/model.onnx", name * 100)
    sources = [repository.read(name) for name in "ab"]
    assert [(each.versions[1] / "model.onnx").stat().st_size for each in sources] == [100, 100]
    assert "repository_cache_full" in caplog.text


def test_what_a_process_left_unfinished_is_removed_by_the_next(bucket: Bucket) -> None:
    bucket.put("m/1/model.onnx", "one")
    left = bucket.folder / "new" / "left"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    assert bucket.repository.read("m").versions
    assert [*(bucket.folder / "new").iterdir()] == []


def test_two_that_want_a_model_at_once_download_it_once(bucket: Bucket) -> None:
    bucket.put("m/1/model.onnx", "one")
    repositories = [bucket.read_by_another() for _ in range(4)]
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda each=each: found.append(each.read("m").versions[1])) for each in repositories
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert bucket.downloads() == ["m/1/model.onnx"]


def test_who_begins_does_not_remove_what_another_has_just_begun(tmp_path: Path, monkeypatch) -> None:
    made = tempfile.mkdtemp

    def begun(**where: Any) -> str:
        found.append(made(**where))
        if len(found) == 1:
            Cache(tmp_path, 1)._prepare()  # between the folder and its lock
        return found[-1]

    found: list[str] = []
    cache = Cache(tmp_path, 1)
    cache._prepare()
    monkeypatch.setattr(tempfile, "mkdtemp", begun)
    lease = cache._own_folder()
    Cache(tmp_path, 1)._prepare()
    assert [*(tmp_path / "new").iterdir()] == [lease.path]
    assert found[1:] == [str(lease.path)]


def test_without_links_each_model_has_files_of_its_own(bucket: Bucket, monkeypatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError("not on this file system")

    monkeypatch.setattr(os, "link", link)
    for model in ("a", "b"):
        bucket.put(f"{model}/1/model.onnx", "equal")
    contents = [(bucket.repository.read(name).versions[1] / "model.onnx").read_text() for name in "ab"]
    assert contents == ["equal", "equal"]


def test_a_cache_folder_that_cannot_be_used_is_named_by_its_setting(bucket: Bucket) -> None:
    bucket.put("m/1/model.onnx", "one")
    bucket.folder.write_text("a file")
    assert refused(bucket) == (
        "the cache of remote models cannot be used: Not a directory. Check --repository-cache-dir"
    )
