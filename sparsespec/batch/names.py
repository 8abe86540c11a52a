"""Names of results: they never meet, whatever the images are called, and every disk takes them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

__all__ = ["OutputNames", "output_names", "page_name", "result_name", "why_not_relative"]

_ENDINGS = (".png", ".jpg", ".txt", ".js")
"""What is put behind a name, in lower case."""

_LONGEST_PART = 255 - max(map(len, _ENDINGS))
_CUTOUT = re.compile(r"\d{3,}\.png")

# Control characters, those that turn the direction of the text around them, bytes that are no UTF-8, and what Windows
# allows in no name; then dots and spaces that it cuts off, and the names of its devices.
_UNSAFE = r'[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff<>:"|?*\\]'
_DEVICES = r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³]) *"
_CHARACTERS = re.compile(_UNSAFE)
_END = re.compile(r"[. ]+\Z")
_DEVICE = re.compile(rf"{_DEVICES}(?:\.|\Z)", re.IGNORECASE)
_ODD = re.compile(rf"{_UNSAFE}|[. ](?:/|\Z)|(?:\A|/){_DEVICES}(?:[./]|\Z)", re.IGNORECASE)
_NOT_RELATIVE = re.compile(r"(?:\A|/)(?:\.\.?)?(?:/|\Z)")


class OutputNames(Sequence[str]):
    """Output names of images, in the same order.

    They are made when they are asked for; only those that differ from the usual are held.

    Parameters
    ----------
    images : tuple of str
        Relative paths.
    others : dict of int to str
        Names that are not the path without its ending, by position.
    """

    def __init__(self, images: tuple[str, ...], others: dict[int, str]) -> None:
        self._images = images
        self._others = others

    def __len__(self) -> int:
        """How many there are."""
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Name of an image, or names of some."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self._others[number] if number in self._others else result_name(self._images[number])


def output_names(images: Sequence[str]) -> OutputNames:
    """Give every image an output name, without the ending ``.png`` or ``.jpg`` that follows.

    The name is the image's path without its ending: ``a/x.jpg`` becomes ``a/x``. Where that would be taken by two of
    them, also on a disk that does not tell upper from lower case, each keeps its ending: ``a/x.jpg`` and ``a/x.png``. A
    number is added where even that is not enough. Whether an image is alone with its name decides it: one more image
    changes the names of those alone that it meets.

    Characters that are not harmless everywhere are written as ``%`` and two hexadecimal digits for each byte of their
    UTF-8: control characters (line ends too), those that turn the direction of writing, bytes that are no UTF-8, the
    characters ``<>:"|?*`` and the backslash, dots and spaces at the end of a part, and the first letter of a name that
    is a device on Windows, such as ``con`` or ``lpt1``. Everything else stays as it is, ``%`` too. A part of more than
    251 bytes is cut, and ends in a tilde and 16 digits of its SHA-256.

    Parameters
    ----------
    images : sequence of str
        Relative paths with ``/`` between the parts, all different.

    Returns
    -------
    OutputNames
        A sequence with one name for each, in the same order.

    Raises
    ------
    ValueError
        A path is absolute, or has a part that is empty, ``.`` or ``..``.
    """
    paths = tuple(images)
    return OutputNames(paths, _Meetings(paths).resolved())


def result_name(path: str, *, with_ending: bool = False) -> str:
    """Name of an image's results when no other image is in the way of it, see `output_names`.

    Parameters
    ----------
    path : str
        The image, relative, with ``/`` between the parts.
    with_ending : bool
        Its name when it keeps its ending.

    Raises
    ------
    ValueError
        The path is not relative, see `why_not_relative`.
    """
    if _NOT_RELATIVE.search(path):
        raise ValueError(f"the image {path!r} cannot have results: {why_not_relative(path)}")
    return _cleaned(path if with_ending else _stem(path))


def page_name(name: str, path: str, page: int) -> str:
    """Name of the results of one page of a file with several: ``a/scan.tif/page-0001``.

    The folder is called like the file with its ending, so that it is nobody else's; where the ending is one of those
    that results have, ``.pages`` follows.

    Parameters
    ----------
    name : str
        Output name of the file, of `output_names`.
    path : str
        The file, relative to the input.
    page : int
        From 1.
    """
    return f"{_page_folder(name, path)}/page-{page:04d}"


def why_not_relative(path: str) -> str | None:
    """Say what is wrong with a path that could lead out of a folder, or is none; None if nothing is."""
    if not _NOT_RELATIVE.search(path):
        return None
    if path.startswith("/"):
        return "its path is absolute"
    return "its path has a part that is empty, '.' or '..'"


class _Meetings:
    """Images whose names meet. Of all others only a number is held, that of their key."""

    def __init__(self, images: tuple[str, ...]) -> None:
        self._images = images
        # Keys that no name may have: with its ending it would be a folder, or a cut-out of it would.
        self._forbidden: set[str] = set()
        # Folders that no folder of pages may be. Only a folder with a dot in its name can be in the way of anything.
        self._folders: set[str] = set()
        # A million keys would take 150 MB. Equal keys have equal hashes, and the few of those are compared.
        hashes = array("q")
        above = ""
        for path in images:
            key = _key(result_name(path))
            hashes.append(hash(key))
            if key.endswith(".png"):
                self._forbid_owner(key)
            folder = path.rpartition("/")[0]
            if folder != above:
                before, above = above + "/", folder
                while folder and not before.startswith(folder + "/"):
                    if "." in folder:
                        self._note_folder(_key(_cleaned(folder)))
                    folder = folder.rpartition("/")[0]
        found = np.frombuffer(hashes, np.int64) if hashes else np.zeros(0, np.int64)
        order = np.argsort(found, kind="stable")
        same: npt.NDArray[np.bool_] = found[order[1:]] == found[order[:-1]]
        self._doubles = np.unique(found[order[1:]][same])
        self._order = array("q", order.tobytes())
        self._hashes = array("q", found[order].tobytes())
        self._names: dict[int, str] = {}

    def _note_folder(self, folder: str) -> None:
        if "." in folder.rpartition("/")[2]:
            self._folders.add(folder)
            self._forbidden.update(folder.removesuffix(ending) for ending in _ENDINGS if folder.endswith(ending))
            self._forbid_owner(folder)

    def _forbid_owner(self, key: str) -> str | None:
        """Forbid the name whose cut-outs one of this name would meet: those of ``a/x`` are ``a/x/001.png``."""
        owner, _, last = key.rpartition("/")
        if not owner or not _CUTOUT.fullmatch(last):
            return None
        self._forbidden.add(owner)
        return owner

    def resolved(self) -> dict[int, str]:
        """Names that are not the usual, by position."""
        waiting = [*self._equal(), *self._in_the_way_of_folders()]
        while waiting:
            index = waiting.pop()
            if index in self._names:
                continue
            name = self._names[index] = result_name(self._images[index], with_ending=True)
            key = _key(name)
            waiting.extend(self._holders(key))
            if owner := self._forbid_owner(key):
                waiting.extend(self._holders(owner))
        taken: set[str] = set()
        for index in sorted(self._names):
            name = candidate = self._names[index]
            number = 2
            while self._is_taken(candidate, index, taken):
                candidate, number = _fitted(f"{name}.{number}"), number + 1
            taken.add(_key(candidate))
            self._names[index] = candidate
        return self._names

    def _is_taken(self, name: str, index: int, taken: set[str]) -> bool:
        key = _key(name)
        if key in taken or key in self._forbidden or next(self._holders(key), None) is not None:
            return True
        return bool(self._folders) and _key(_page_folder(name, self._images[index])) in self._folders

    def _holders(self, key: str) -> Iterator[int]:
        """Images that are called so and have not kept their ending."""
        for index in self._alike(hash(key)):
            if index not in self._names and _key(result_name(self._images[index])) == key:
                yield index

    def _alike(self, number: int) -> array[int]:
        return self._order[bisect_left(self._hashes, number) : bisect_right(self._hashes, number)]

    def _equal(self) -> Iterator[int]:
        """Images whose name another has too."""
        for number in self._doubles:
            groups: dict[str, list[int]] = {}
            for index in self._alike(int(number)):
                groups.setdefault(_key(result_name(self._images[index])), []).append(index)
            for group in groups.values():
                if len(group) > 1:
                    yield from group

    def _in_the_way_of_folders(self) -> Iterator[int]:
        for key in self._forbidden:
            yield from self._holders(key)
        for folder in self._folders:
            file = folder.removesuffix(".pages")
            for index in self._holders(_key(_cleaned(_stem(file)))):
                path = self._images[index]
                if _key(_page_folder(result_name(path), path)) == folder:
                    yield index


def _page_folder(name: str, path: str) -> str:
    # A name that is not the usual has its ending already.
    folder = result_name(path, with_ending=True) if name == result_name(path) else name
    return _fitted(folder + ".pages") if folder.lower().endswith(_ENDINGS) else folder


def _key(name: str) -> str:
    """What two names have in common that are one on some disk."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _stem(path: str) -> str:
    start = path.rfind("/") + 1
    dot = path.rfind(".")
    # Dots at the beginning of a name begin no ending.
    return path[:dot] if dot > start and path[start:dot].strip(".") else path


def _cleaned(path: str) -> str:
    short = len(path) <= (_LONGEST_PART if path.isascii() else _LONGEST_PART // 4)
    if short and not _ODD.search(path):
        return path
    return "/".join(map(_cleaned_part, path.split("/")))


def _cleaned_part(part: str) -> str:
    clean = _CHARACTERS.sub(lambda found: _escaped(found[0]), part)
    clean = _END.sub(lambda found: _escaped(found[0]), clean)
    if _DEVICE.match(clean):
        clean = _escaped(clean[0]) + clean[1:]
    return _shortened(clean, part)


def _fitted(name: str) -> str:
    above, slash, last = name.rpartition("/")
    return above + slash + _shortened(last, last)


def _shortened(part: str, original: str) -> str:
    data = part.encode()
    if len(data) <= _LONGEST_PART:
        return part
    digest = hashlib.sha256(original.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return data[: _LONGEST_PART - 1 - len(digest)].decode("utf-8", "ignore") + "~" + digest


def _escaped(text: str) -> str:
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = text.encode("utf-8", "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in data)
