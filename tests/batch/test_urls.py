from __future__ import annotations

import errno
import os
import pickle
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsespec.batch import InputsError, find_inputs
from sparsespec.batch.job import in_order
from sparsespec.batch.store import LocalStore, Store, open_store

pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'sparsespec[remote]'")
pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'sparsespec[remote]'")

from sparsespec.batch import remote
from sparsespec.batch.remote import problem
from sparsespec.batch.urls import StoreError, UrlStore, find_url_inputs, list_images

from .servers import ObjectStore, Scripted, answer, free_port, object_store, scripted_server, wait, xml_error


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither proxies nor anybody's credentials; what is tried again is tried at once."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("AWS_", "FSSPEC_", "GOOGLE_", "STORAGE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "NETRC"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.001)


@pytest.fixture
def _nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_opened", {})


@pytest.fixture
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-word")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'sparsespec[remote]'")
    pytest.importorskip("moto", reason="moto is not installed: pip install 'moto[server]'")
    pytest.importorskip("flask", reason="moto's server is not installed: pip install 'moto[server]'")
    with object_store(tmp_path_factory.mktemp("moto") / "log") as running:
        yield running


@pytest.fixture
def bucket(server: ObjectStore, _credentials: None) -> str:
    name = f"b-{uuid.uuid4().hex[:12]}"
    server.client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def script() -> Iterator[Scripted]:
    with scripted_server() as running:
        yield running


@pytest.fixture
def s3(script: Scripted, _credentials: None) -> UrlStore:
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'sparsespec[remote]'")
    return UrlStore("s3://bucket/in", {"endpoint_url": script.address})


def options(server: ObjectStore) -> dict[str, str]:
    return {"endpoint_url": server.address}


def put(server: ObjectStore, bucket: str, *keys: str, content: bytes = b"x") -> None:
    client = server.client()
    for key in keys:
        client.put_object(Bucket=bucket, Key=key, Body=content)


# --- one store -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["s3", "memory"])
def store(request: pytest.FixtureRequest) -> UrlStore:
    if request.param == "s3":
        return UrlStore(
            f"s3://{request.getfixturevalue('bucket')}/some/folder/", options(request.getfixturevalue("server"))
        )
    return UrlStore(f"memory://{uuid.uuid4().hex}/folder")


def test_files_come_back_as_they_went(store: UrlStore) -> None:
    assert isinstance(store, Store)
    assert store.folder is None
    contents = {
        name: name.encode() * 3 for name in ("a.png", "b/c d.json", "b/deep/größe 日本.txt", "b#c?d%20e&f+g.png")
    }
    for name, content in contents.items():
        store.write(name, content)
        assert store.read(name) == content
        assert store.size(name) == len(content)
    assert sorted(store.list("")) == sorted(contents)
    assert sorted(store.list("b")) == ["b/c d.json", "b/deep/größe 日本.txt"]
    assert list(store.list("nowhere")) == []
    assert {entry.path: entry.size for entry in store.entries()} == {name: len(c) for name, c in contents.items()}
    store.write("a.png", b"")
    assert store.size("a.png") == 0
    store.remove("a.png")
    store.remove("a.png")
    assert store.size("a.png") is None
    with pytest.raises(FileNotFoundError, match=r"no such file"):
        store.read("a.png")
    assert store.fingerprint("a.png") is None


def test_fingerprints_change_with_the_file(store: UrlStore) -> None:
    store.write("a.png", b"first")
    first = store.fingerprint("a.png")
    assert first is not None
    assert store.fingerprint("a.png") == first
    with store.fetched("a.png") as path:
        assert path.read_bytes() == b"first"
        assert path.suffix == ".png"
        assert store.fingerprint("a.png") == first
    assert not path.exists()
    assert next(iter(store.entries())).fingerprint == first
    store.write("a.png", b"other")
    assert store.fingerprint("a.png") != first


def test_results_are_staged_and_published(store: UrlStore) -> None:
    with store.staged() as folder:
        for name in ("masks/a.png", "overlays/a.jpg", "run.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(name.encode())
        store.publish(folder, ["masks/a.png", "overlays/a.jpg"])
        assert [path.name for path in folder.rglob("*") if path.is_file()] == ["run.json"]
        store.publish(folder, ["run.json"])
    assert not folder.exists()
    assert sorted(store.list("")) == ["masks/a.png", "overlays/a.jpg", "run.json"]
    assert store.read("overlays/a.jpg") == b"overlays/a.jpg"


@pytest.mark.parametrize("path", ["../a", "a/../../b", "/a", "a//b", "", "a/", "./a", "a\0b", "caf\udce9.png"])
def test_paths_never_lead_out(path: str, tmp_path: Path) -> None:
    store = UrlStore("memory://nothing")
    assert problem(path) is not None
    for work in (
        lambda: store.read(path),
        lambda: store.write(path, b""),
        lambda: store.size(path),
        lambda: store.remove(path),
        lambda: store.publish(tmp_path, [path]),
    ):
        with pytest.raises(ValueError, match=r"cannot be a file in 'memory://nothing'"):
            work()


def test_it_goes_to_other_processes_without_what_is_open(store: UrlStore) -> None:
    store.write("a.txt", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert hash(copy) == hash(store)
    assert copy.read("a.txt") == b"1"


def test_several_threads(store: UrlStore) -> None:
    errors = []

    def work(number: int) -> None:
        try:
            for k in range(5):
                store.write(f"{number}/{k}", f"{number} {k}".encode())
                assert store.read(f"{number}/{k}") == f"{number} {k}".encode()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(list(store.list(""))) == 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_opens_its_own(server: ObjectStore, bucket: str) -> None:
    store = UrlStore(f"s3://{bucket}", options(server))
    store.write("a", b"1")
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if store.read("a") == b"1" else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_large_objects_go_up_in_parts(server: ObjectStore, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WHOLE_UPLOAD", 1000)
    store = UrlStore(f"s3://{bucket}/out", options(server))
    store.write("a.bin", bytes(200_000))
    assert store.size("a.bin") == 200_000


def test_what_replaces_a_file_elsewhere_is_moved_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On file systems where an upload can be seen before its end, such as sftp; a disk stands for one here."""
    monkeypatch.setattr("sparsespec.batch.urls._LOCAL", ())
    store = UrlStore(f"file://{tmp_path}/out")
    store.write("a/b.txt", b"old")
    seen: list[list[str]] = []
    filesystem = remote.connect("file", f"{tmp_path}/out", "", {}, store.place).filesystem  # type: ignore[attr-defined]
    move = filesystem.mv
    monkeypatch.setattr(filesystem, "mv", lambda *names: (seen.append(sorted(store.list(""))), move(*names)))
    store.write("a/b.txt", b"new")
    assert (tmp_path / "out" / "a" / "b.txt").read_bytes() == b"new"
    assert len(seen[0]) == 2
    assert seen[0][0].startswith("a/.sparsespec-")
    assert list(store.list("")) == ["a/b.txt"]


def test_urls_of_this_machine_are_folders(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}") == LocalStore(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    assert find_inputs(f"file://{tmp_path}").images == ("a.png",)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "names no bucket"),
        ("https:///a.jpg", "names no bucket or server"),
        ("s3://key:hidden-word@bucket/a", "by the environment"),
        ("simplecache::s3://bucket/a", "chained"),
        ("nosuch://bucket/a", "nothing is known about 'nosuch://'; there are s3://"),
    ],
)
def test_urls_of_no_use(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        list(UrlStore(url).list(""))
    assert "hidden-word" not in str(caught.value)


def test_passwords_are_never_shown(script: Scripted) -> None:
    address = script.address.removeprefix("http://")
    store = UrlStore(f"http://me:hidden-word@{address}/a?signature=hidden-word", {"headers.X-Token": "hidden-word"})
    assert store.place == f"http://{address}/a"
    assert repr(store) == f"UrlStore('http://{address}/a')"
    script.answers["/a/b.jpg"] = [answer(status=403)]
    with pytest.raises(PermissionError) as caught:
        store.read("b.jpg")
    assert "hidden-word" not in str(caught.value)
    assert "hidden-word" in script.seen[0]
    sftp = "ftp://me:hidden-word@host/folder"
    assert UrlStore(sftp).place == "ftp://me@host/folder"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(scheme: str) -> Any:
        raise ImportError("Install adlfs to access Azure Blob Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ImportError, match=r"'abfs://' needs a package that is not installed .*adlfs"):
        list(UrlStore("abfs://container/a").list(""))
    with pytest.raises(ImportError, match=r"pip install 'sparsespec\[remote\]'"):
        list(UrlStore("s3://bucket-of-nobody/a").list(""))


def test_options_reach_the_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    nested = remote._nested({"client_kwargs.region_name": "eu-1", "anon": "true", "n": "12", "key": "123", "x": None})
    assert nested == {"client_kwargs": {"region_name": "eu-1"}, "anon": True, "n": 12, "key": "123", "x": None}
    store = UrlStore("s3a://bucket/a", {"s3a:anon": "true", "gs:token": "anon", "use_ssl": "false"})
    assert store.options == (("anon", "true"), ("use_ssl", "false"))
    with pytest.raises(StoreError, match=r"contradicts"):
        remote._nested({"a": 1, "a.b": 2})


@pytest.mark.usefixtures("_credentials")
def test_an_option_that_nobody_knows(server: ObjectStore) -> None:
    with pytest.raises(StoreError, match=r"an option is not understood: .*colour"):
        list(UrlStore("s3://bucket", {**options(server), "colour": "red"}).list(""))


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_nothing_open")
def test_no_credentials(server: ObjectStore) -> None:
    with pytest.raises(StoreError, match=r"cannot use 's3://bucket/a': no credentials: .*environment"):
        list(UrlStore("s3://bucket/a", options(server)).list(""))


@pytest.mark.usefixtures("_credentials")
def test_no_bucket(server: ObjectStore) -> None:
    store = UrlStore("s3://nobodys-bucket/a", options(server))
    for work in (lambda: list(store.list("")), lambda: store.write("a", b""), lambda: store.read("a")):
        with pytest.raises(StoreError, match=r"there is no such bucket"):
            work()


@pytest.mark.usefixtures("_credentials")
def test_no_answer_is_bounded() -> None:
    pytest.importorskip("s3fs")
    port = free_port()
    for url, more in ((f"http://127.0.0.1:{port}/a/", {}), ("s3://b/a", {"endpoint_url": f"http://127.0.0.1:{port}"})):
        with pytest.raises(StoreError, match=r"the server does not answer: .*tried 3 times"):
            find_url_inputs(url, more)


@pytest.mark.usefixtures("_nothing_open")
def test_a_server_that_never_speaks(script: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_READ_SECONDS", 0.2)
    script.answers["/a.jpg"] = [wait(1.5)]
    store = UrlStore(script.address)
    with pytest.raises(OSError, match=r"broke off.*tried 3 times"):
        store.read("a.jpg")


def test_a_server_that_speaks_too_slowly(script: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_GRACE", 0.0)
    monkeypatch.setattr(remote, "_SLOWEST", 1e12)
    monkeypatch.setattr(remote, "_PATIENCE", 0.0)
    script.answers["/a.jpg"] = [answer(b"abc")]
    with pytest.raises(OSError, match=r"only 3 bytes arrived in 0 s"):
        UrlStore(script.address).read("a.jpg")


@pytest.mark.parametrize(
    ("method", "work"),
    [
        ("GET", lambda store: list(store.list(""))),
        ("GET", lambda store: store.read("a.jpg")),
        ("PUT", lambda store: store.write("a.jpg", b"1")),
        ("HEAD", lambda store: store.size("a.jpg")),
    ],
    ids=["list", "get", "put", "head"],
)
def test_a_bucket_that_denies(script: Scripted, s3: UrlStore, method: str, work: Any) -> None:
    for path in ("/bucket", "/bucket/", "/bucket/in/a.jpg"):
        script.answers[path] = [xml_error("AccessDenied", 403)]
    with pytest.raises(OSError, match=r"access denied") as caught:
        work(s3)
    assert isinstance(caught.value, StoreError if "in/a.jpg" not in script.seen[-1] else PermissionError)
    assert len([line for line in script.seen if line.startswith(method)]) == 1, "to ask again would be of no use"


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_credentials_that_are_refused(script: Scripted, s3: UrlStore, code: str) -> None:
    script.answers["/bucket/in/a.jpg"] = [xml_error(code, 403)]
    with pytest.raises(StoreError, match=f"the credentials are refused .{code}"):
        s3.read("a.jpg")


@pytest.mark.parametrize("error", [("SlowDown", 503), ("InternalError", 500), ("RequestTimeout", 400)])
def test_a_busy_bucket_is_asked_again(script: Scripted, s3: UrlStore, error: tuple[str, int]) -> None:
    script.answers["/bucket/in/a.jpg"] = [xml_error(*error), xml_error(*error), answer(b"123", ETag='"e"')]
    assert s3.read("a.jpg") == b"123"
    script.answers["PUT /bucket/in/b.jpg"] = [xml_error(*error), answer(ETag='"e"')]
    s3.write("b.jpg", b"1")
    assert len(script.seen) == 5


def test_a_bucket_that_stays_busy_is_given_up(script: Scripted, s3: UrlStore) -> None:
    script.answers["/bucket/in/ok"] = [answer(b"1")]
    script.answers["/bucket/in/a.jpg"] = [xml_error("SlowDown", 503)]
    s3.read("ok")
    with pytest.raises(OSError, match=r"SlowDown.*tried 8 times") as caught:
        s3.read("a.jpg")
    assert not isinstance(caught.value, StoreError)
    assert caught.value.filename == "s3://bucket/in/a.jpg"
    assert len(script.seen) == 9


@pytest.mark.parametrize("kind", ["s3", "http"])
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "truncated"])
def test_a_download_that_breaks_off_is_begun_again(script: Scripted, s3: UrlStore, kind: str, reset: bool) -> None:
    whole = bytes(range(256)) * 2000
    half = answer(whole[:300_000], announced=len(whole), reset=reset)
    store = s3 if kind == "s3" else UrlStore(f"{script.address}/bucket/in")
    script.answers["/bucket/in/a.jpg"] = [half, half, answer(whole)]
    with store.fetched("a.jpg") as path:
        assert path.read_bytes() == whole
    assert len(script.seen) == 3
    script.answers["/bucket/in/a.jpg"] = [half]
    with pytest.raises(OSError, match=r"broke off.*tried 8 times"):
        store.read("a.jpg")


def test_an_upload_that_arrives_changed_is_sent_again(script: Scripted, s3: UrlStore) -> None:
    script.answers["/bucket/in/a.jpg"] = [xml_error("BadDigest", 400), answer(ETag='"e"')]
    s3.write("a.jpg", b"1")
    assert len(script.seen) == 2


def test_an_object_that_is_gone_meanwhile(server: ObjectStore, bucket: str) -> None:
    put(server, bucket, "in/a.jpg", "in/b.jpg")
    found = find_inputs(f"s3://{bucket}/in", storage_options=options(server))
    server.client().delete_object(Bucket=bucket, Key="in/a.jpg")
    with pytest.raises(FileNotFoundError, match=r"there is no such file"), found.source.fetched("a.jpg"):
        pass
    with found.source.fetched("b.jpg") as path:
        assert path.read_bytes() == b"x"


def test_no_room_for_a_download(script: Scripted, s3: UrlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    script.answers["/bucket/in/a.jpg"] = [answer(b"123")]
    usage = remote.shutil.disk_usage(".")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage._replace(free=2))
    for store in (s3, UrlStore(f"{script.address}/bucket/in")):
        with pytest.raises(OSError, match=r"no space for the download: 3 bytes, and 2 are free.*TMPDIR") as caught:
            store.read("a.jpg")
        assert caught.value.errno == errno.ENOSPC


def test_a_certificate_that_nobody_vouches_for() -> None:
    fault = remote._Fault.of(__import__("ssl").SSLCertVerificationError("certificate verify failed: self-signed"))
    assert fault.kind == "store"
    assert isinstance(fault.error("a", "https://host/", 1), StoreError)


def test_errors_go_to_other_processes() -> None:
    error = pickle.loads(pickle.dumps(StoreError("cannot use it")))
    assert (str(error), error.errno) == ("cannot use it", errno.EIO)


# --- listings --------------------------------------------------------------------------------------------------------


def test_the_images_of_a_bucket(server: ObjectStore, bucket: str) -> None:
    put(
        server, bucket, "in/b.JPG", "in/a.png", "in/sub/z.tif", "in/a/x.jpeg", "in/B.gif", "in/notes.txt",
        "in/x y?#%41+.jpg",
        "in/größe 日本.png", "in/.hidden.png", "in/.folder/c.png", "in/folder/", "in/out/overlays/a.jpg", "other/c.png",
        "in2/d.png", "in/old/masks/a.png", "in/mine/run.json", "in/mine/e.png",
    )  # fmt: skip
    put(server, bucket, "in/old/run.json", content=b'{\n "program": "sparsespec",\n "version": "0.1.0"' + b" " * 9999)
    found = find_inputs(f"s3://{bucket}/in", output=f"s3://{bucket}/in/out/", storage_options=options(server))
    expected = ["B.gif", "a/x.jpeg", "a.png", "b.JPG", "größe 日本.png", "mine/e.png", "sub/z.tif", "x y?#%41+.jpg"]
    assert list(found.images) == sorted(expected, key=in_order)
    assert found.unlisted == ()
    assert found.root == f"s3://{bucket}/in"
    for path in found.images:
        with found.source.fetched(path) as file:
            assert file.read_bytes() == b"x"


def test_keys_that_lead_elsewhere_are_refused_one_by_one(server: ObjectStore, bucket: str) -> None:
    put(server, bucket, "in/a.jpg", "in/../b.jpg", "in/x/../../c.jpg", "in//d.jpg", "in/./e.jpg", "in/../notes.txt")
    found = find_inputs(f"s3://{bucket}/in", storage_options=options(server))
    assert found.images == ("a.jpg",)
    assert [path for path, _ in found.unlisted] == ["../b.jpg", "./e.jpg", "/d.jpg", "x/../../c.jpg"]
    assert all("rename it" in reason for _, reason in found.unlisted)


def test_order_is_that_of_folders(server: ObjectStore, bucket: str) -> None:
    keys = [
        "a/b.png",
        "a.png",
        "a-b/c.png",
        "a/b/c.png",
        "a b.png",
        "ä.png",
        "Z.png",
        "a/b-c.png",
        "😀.png",
        "a\x01.png",
    ]
    put(server, bucket, *keys)
    images, _ = list_images(UrlStore(f"s3://{bucket}", options(server)))
    assert images == sorted(keys, key=in_order)


def test_single_files_and_patterns(server: ObjectStore, bucket: str) -> None:
    put(
        server, bucket, "p/2023/a.jpg", "p/2024/b.jpg", "p/2024/c.png", "p/2024/c.txt", "p/2024/deep/d.jpg",
        "p/2024/.e.jpg", "p/scan", "trip [2024]/a.png",
    )  # fmt: skip

    def images(path: str) -> tuple[str, ...]:
        return find_inputs(f"s3://{bucket}/{path}", storage_options=options(server)).images

    assert images("p/2024/*.jpg") == ("b.jpg",)
    assert images("p/20*/*.jpg") == ("2023/a.jpg", "2024/b.jpg")
    assert images("p/**/*.jpg") == ("2023/a.jpg", "2024/b.jpg", "2024/deep/d.jpg")
    assert images("p/202[34]/?.jpg") == ("2023/a.jpg", "2024/b.jpg")
    assert images("p/2024/b.jpg") == ("b.jpg",)
    assert images("p/scan") == ("scan",)
    assert images("trip [2024]") == ("a.png",)
    assert images("trip [2024]/a.png") == ("a.png",)
    assert len(images("")) == 5
    for path, message in (("p/*.gif", "the pattern .* holds no image"), ("q", "the folder .* holds no image")):
        with pytest.raises(InputsError, match=message):
            images(path)


def test_input_and_output_stay_apart(server: ObjectStore, bucket: str) -> None:
    put(server, bucket, "in/a.jpg")
    for output, message in ((f"s3a://{bucket}/in/", "is the folder of the input"), (f"s3://{bucket}", "lies inside")):
        with pytest.raises(InputsError, match=message):
            find_inputs(f"s3://{bucket}/in", output=output, storage_options=options(server))


def page(keys: list[str], more: str | None) -> bytes:
    from urllib.parse import quote

    items = "".join(f"<Contents><Key>{quote(key)}</Key><Size>1</Size><ETag>e</ETag></Contents>" for key in keys)
    rest = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{more}</NextContinuationToken>" if more else ""
    return f"<ListBucketResult><EncodingType>url</EncodingType>{items}{rest}</ListBucketResult>".encode()


def test_listings_are_read_page_by_page(script: Scripted, s3: UrlStore) -> None:
    pages = [page([f"in/{n}/{k}.jpg" for k in range(3)], f"t{n}" if n < 3 else None) for n in range(4)]
    script.answers["/bucket"] = script.answers["/bucket/"] = [
        answer(pages[0]), xml_error("SlowDown", 503), answer(pages[1]), answer(pages[2]), answer(pages[3])
    ]  # fmt: skip
    listing = s3.list("")
    assert next(listing) == "0/0.jpg"
    assert len(script.seen) == 1, "the second page is asked for when the first one has been used up"
    assert len(list(listing)) == 11
    assert "continuation-token=t2" in script.seen[-1]


def test_line_breaks_in_keys(script: Scripted, s3: UrlStore) -> None:
    script.answers["/bucket"] = script.answers["/bucket/"] = [answer(page(["in/a\nb\r\t.jpg"], None))]
    assert list_images(s3) == (["a\nb\r\t.jpg"], [])
    script.answers["/bucket/in/a%0Ab%0D%09.jpg"] = [answer(b"1")]
    assert s3.read("a\nb\r\t.jpg") == b"1"


# --- web servers -----------------------------------------------------------------------------------------------------

LISTING = b"""<html><body><h1>Index</h1>
<a href="?C=N;O=D">Name</a> <a href="/">Parent</a> <a href="../">..</a> <A HREF='a.jpg'>a</A>
<a href="b%20%231&amp;2.png">b</a> <a href="./c.gif">c</a> <a href="/photos/d.tif">d</a>
<a href="/elsewhere/e.jpg">e</a>
<a href="http://example.invalid/photos/f.jpg">f</a> <a href="//example.invalid/photos/g.jpg">g</a>
<a href="x/../../h.jpg">h</a> <a href="%2e%2e/i.jpg">i</a> <a href="%2E%2E%2Fj.jpg">j</a> <a href="sub/">sub</a>
<a href="sub/">again</a> <a href="notes.txt">n</a> <a href="mailto:x@y.z">m</a> <a href="http://[">bad</a>
<a href="k%ff.jpg">k</a> <a href="gone/">gone</a> <a name="none">x</a> <a href="#top">t</a> <a href=".hidden.jpg">h</a>
</body></html>"""


def test_a_folder_of_a_web_server(script: Scripted) -> None:
    script.answers["/photos/"] = [answer(LISTING, Content_Type="text/html")]
    script.answers["/photos/sub/"] = [answer(b'<a href="z.jpg">z</a><a href="../">up</a>', Content_Type="text/html")]
    for path, content in (("a.jpg", b"A"), ("b%20%231&2.png", b"B"), ("sub/z.jpg", b"Z")):
        script.answers[f"/photos/{path}"] = [answer(content)]
    found = find_inputs(f"{script.address}/photos/")
    assert found.images == ("a.jpg", "b #1&2.png", "c.gif", "d.tif", "sub/z.jpg")
    assert {path for path, _ in found.unlisted} == {"../i.jpg", "../j.jpg", "gone/", "k\udcff.jpg"}
    assert not any("elsewhere" in line or "h.jpg" in line for line in script.seen)
    assert found.source.read("b #1&2.png") == b"B"
    assert found.source.read("sub/z.jpg") == b"Z"
    assert find_inputs(f"{script.address}/photos/*/*.jpg").images == ("sub/z.jpg",)


def test_a_folder_without_its_slash(script: Scripted) -> None:
    script.answers["/photos"] = [answer(status=301, Location="/photos/")]
    script.answers["/photos/"] = [answer(b'<a href="a.jpg">a</a>', Content_Type="text/html")]
    assert find_inputs(f"{script.address}/photos").images == ("a.jpg",)


def test_a_single_file_by_http(script: Scripted) -> None:
    script.answers["/photos/my cat.jpg".replace(" ", "%20")] = [answer(b"cat", ETag='"1"')]
    found = find_inputs(f"{script.address}/photos/my%20cat.jpg?signature=abc")
    assert found.images == ("my cat.jpg",)
    with found.source.fetched("my cat.jpg") as path:
        assert path.read_bytes() == b"cat"
        assert found.source.fingerprint("my cat.jpg") == "3-1"
    assert script.seen == [f"{method} /photos/my%20cat.jpg?signature=abc" for method in ("HEAD", "GET")]


def test_a_signature_for_reading_only(script: Scripted) -> None:
    script.answers["HEAD /a.jpg"] = [answer(status=403)]
    script.answers["GET /a.jpg"] = [answer(b"1")]
    found = find_inputs(f"{script.address}/a.jpg?signature=abc")
    assert (found.images, found.source.read("a.jpg")) == (("a.jpg",), b"1")


def test_redirects_stay_on_the_server(script: Scripted) -> None:
    script.answers["/a.jpg"] = [answer(status=302, Location="/b.jpg")]
    script.answers["/b.jpg"] = [answer(b"1")]
    store = UrlStore(script.address)
    assert store.read("a.jpg") == b"1"
    script.answers["/a.jpg"] = [answer(status=302, Location="http://example.invalid/b.jpg")]
    with pytest.raises(OSError, match=r"it redirects to http://example.invalid; give that address if you trust it"):
        store.read("a.jpg")
    script.answers["/a.jpg"] = [answer(status=302, Location="/a.jpg")]
    with pytest.raises(OSError, match=r"again and again"):
        store.read("a.jpg")


def test_a_busy_web_server_is_asked_again(script: Scripted) -> None:
    busy = answer(status=503, Retry_After="0")
    script.answers["/a.jpg"] = [busy, busy, answer(b"1")]
    assert UrlStore(script.address).read("a.jpg") == b"1"
    script.answers["/a.jpg"] = [answer(status=500)]
    with pytest.raises(OSError, match=r"busy .500 .*tried 8 times"):
        UrlStore(script.address).read("a.jpg")


@pytest.mark.parametrize("status", [401, 403])
def test_a_web_server_that_denies(script: Scripted, status: int) -> None:
    script.answers["/photos/"] = script.answers["/photos/a.jpg"] = [answer(status=status)]
    with pytest.raises(PermissionError, match=r"access denied"):
        UrlStore(f"{script.address}/photos").read("a.jpg")
    with pytest.raises(StoreError, match=r"access denied"):
        find_inputs(f"{script.address}/photos/")


def test_a_page_that_is_no_listing(script: Scripted) -> None:
    script.answers["/data/"] = [answer(b"{}", Content_Type="application/json")]
    with pytest.raises(StoreError, match=r"does not list .*give the address of a single file"):
        find_inputs(f"{script.address}/data/")


def test_results_do_not_go_by_http(script: Scripted, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    store = UrlStore(script.address)
    for work in (lambda: store.write("a", b"1"), lambda: store.publish(tmp_path, ["a"])):
        with pytest.raises(StoreError, match=r"results cannot be sent by http"):
            work()
    assert script.seen == []
    assert (tmp_path / "a").exists()


def test_a_body_without_an_end(script: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(1 << 16))

    monkeypatch.setattr(remote, "_UNKNOWN_LENGTH", 1 << 20)
    script.answers["/a.jpg"] = [endless]
    with pytest.raises(OSError, match=r"it sends more than 1048576 bytes"):
        UrlStore(script.address).read("a.jpg")
    assert UrlStore(script.address).start("a.jpg", 5) == bytes(5)
