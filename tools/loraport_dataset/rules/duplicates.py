"""Images that are there twice: the same bytes, or the same picture saved another time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.errors import SpecError
from loraport.rules import Problem, ScannedImage, SetRule, Setting

if TYPE_CHECKING:
    import PIL.Image

_CHUNK = 1 << 20
#: Bits of 64 by which the hashes of near duplicates differ at most. Re-encoded and resized copies stay below it.
_NEAR = 4
_BITS = 64
#: Levels of 255 between the darkest and the lightest pixel below which an image shows nothing.
_FLAT = 8


class Duplicate(SetRule):
    id, severity = "image-duplicate", "warning"
    explanation = (
        "No image is there twice with the same bytes: it would weigh twice in the training. To have it so, set repeats."
    )
    fix = "Keep one of them with its caption."

    def __init__(self) -> None:
        #: bytes → the one image of that size, or all of them by content
        self._by_size: dict[int, tuple[Path, str] | dict[bytes, str]] = {}
        self._found: list[tuple[str, str]] = []

    def see(self, image: ScannedImage, setting: Setting) -> None:
        if image.unreadable is not None:
            return
        alike = self._by_size.setdefault(image.bytes, (image.path, image.name))
        if alike == (image.path, image.name):
            return
        if isinstance(alike, tuple):  # Contents are read only where two files have the same size.
            first, name = alike
            alike = self._by_size[image.bytes] = {}
            digest = _digest(first)
            if digest is not None:
                alike[digest] = name
        digest = _digest(image.path)
        if digest is not None:
            original = alike.setdefault(digest, image.name)
            if original != image.name:
                self._found.append((image.name, original))

    def problems(self, setting: Setting) -> Iterator[Problem]:
        for name, original in self._found:
            yield Problem(f"The same file as {original}.", self.fix, file=name)


def _digest(path: Path) -> bytes | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return None  # gone since its header was read
    return digest.digest()


class NearDuplicate(SetRule):
    id, severity = "image-near-duplicate", "warning"
    explanation = (
        "No picture is there twice in another size or quality. Told with --pixels by perceptual hashes of 64 bits "
        f"(imagehash's phash) that differ in at most {_NEAR}."
    )
    fix = "Look at both; keep the better one with its caption, or both if they differ in what matters."
    needs_pixels = True

    def __init__(self) -> None:
        self._hash = _perceptual_hash()
        # Two hashes that differ in at most n bits are equal in one of n + 1 bands, so only those are compared.
        self._bands: list[dict[int, list[int]]] = [{} for _ in range(_NEAR + 1)]
        self._hashes: list[int] = []
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._found: list[tuple[str, str, int]] = []

    def see(self, image: ScannedImage, setting: Setting) -> None:
        if image.pixels is None or _is_flat(image.pixels):
            return
        hashed = self._hash(image.pixels)
        distances = [
            ((hashed ^ self._hashes[other]).bit_count(), other)
            for other in self._candidates(hashed)
            if not (
                hashed == self._hashes[other] and image.bytes == self._sizes[other]
            )  # a duplicate, told by its rule
        ]
        distance, nearest = min(distances, default=(_NEAR + 1, 0))
        if distance <= _NEAR:
            self._found.append((image.name, self._names[nearest], distance))
        for band, part in enumerate(_parts(hashed)):
            self._bands[band].setdefault(part, []).append(len(self._hashes))
        self._hashes.append(hashed)
        self._names.append(image.name)
        self._sizes.append(image.bytes)

    def _candidates(self, hashed: int) -> set[int]:
        return {other for band, part in enumerate(_parts(hashed)) for other in self._bands[band].get(part, ())}

    def problems(self, setting: Setting) -> Iterator[Problem]:
        for name, original, distance in self._found:
            yield Problem(f"Looks like {original} ({distance} of 64 bits differ).", self.fix, file=name)


def _perceptual_hash() -> Callable[[PIL.Image.Image], int]:
    """imagehash's phash as a number. Raises SpecError where the library is not installed."""
    try:
        from imagehash import phash
    except ImportError as error:
        raise SpecError(
            "Near duplicates are found with the package imagehash, which is not installed.",
            hint="pip install 'loraport[dataset]'",
        ) from error
    return lambda pixels: int(str(phash(pixels)), 16)


def _is_flat(pixels: PIL.Image.Image) -> bool:
    """Whether there is next to nothing to see: every such image has the same hash."""
    return all(high - low < _FLAT for low, high in ranges(pixels))


def ranges(pixels: PIL.Image.Image) -> list[tuple[int, int]]:
    """The darkest and the lightest level of each channel of an RGB image."""
    return [channel.getextrema() for channel in pixels.split()]  # type: ignore[misc]


def _parts(hashed: int) -> Iterator[int]:
    """The bits of a hash in `_NEAR + 1` bands."""
    width = -(-_BITS // (_NEAR + 1))
    return ((hashed >> start) & ((1 << width) - 1) for start in range(0, _BITS, width))


RULES = (Duplicate, NearDuplicate)
