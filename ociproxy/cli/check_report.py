"""What `check` prints: a line for each finding, or JSON events, and a summary at the end.

Tests: tests/cli/test_check_command.py.
"""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Final

from rich.filesize import decimal

from ociproxy.cli.terminal import counted, print_event
from ociproxy.errors import LayoutInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ociproxy.archive.check import ArchiveFindings
    from ociproxy.cli.screen import Screen
    from ociproxy.errors import OciProxyError
    from ociproxy.oci.digest import Digest
    from ociproxy.store.check import Fault, Findings
    from ociproxy.store.damage import FileCheck

_SHOWN: Final = 10
"""Faults of one image, images of one file, and files of one kind that are printed; `--json` prints
more."""
_MISSING: Final = 3
_DAMAGED: Final = 5


class Report:
    def __init__(self, screen: Screen, *, as_json: bool) -> None:
        self._screen = screen
        self._json = as_json
        self._began = time.monotonic()
        self._looked: Counter[str] = Counter()
        self._found: Counter[str] = Counter()
        self._left = ""
        self.exit_code = 0

    def store(self, root: str, files: FileCheck, findings: Findings | None) -> None:
        """All that was found in a store. Without `findings` the images were not looked at."""
        for damage in files.damaged.values():
            hit = None if findings is None else findings.hit.get(damage.file, ())
            images = None if hit is None else list(map(str, hit))
            reason = damage.reason + ("; it is in quarantine/ now" if damage.in_quarantine else "")
            self.file(root, damage.file, damage.digest, reason, images)
        if findings is None:
            self.looked(files.blobs, files.manifests, 0, files.read)
            return
        self.looked(files.blobs, files.manifests, findings.images, files.read)
        for broken in findings.broken:
            self.image(root, str(broken.reference), broken.top, broken.faults)
        for record in findings.damaged_records:
            self._record(root, str(record.path.relative_to(root)), None)
        for record in findings.nowhere:
            self._record(root, str(record.path.relative_to(root)), record.digest)
        self._files(root, "unsealed", files.unsealed, "has no seal: without --quick it is hashed")
        self._files(root, "stray", files.strays, "is named by no digest: nothing reads it")
        self._found["arriving images"] += findings.arriving

    def resumed(self, part: float) -> None:
        """An earlier check did so much of the files, 0 to 1."""
        if self._json:
            print_event("resumed", part=round(part, 4))
        else:
            self._screen.line(f"goes on after {100 * part:.1f} % of all files")

    def repaired(self, left: Findings) -> None:
        """What a repair has left decides on the exit code."""
        self.exit_code = _MISSING if left else 0
        broken, records = len(left.broken), len(left.nowhere) + len(left.damaged_records)
        found = f"left: {counted(broken, 'image')}, {counted(records, 'record')}"
        self._left = found if left else "all is whole now"

    def archive(self, found: ArchiveFindings) -> None:
        """All that was found in one archive."""
        self.looked(found.blobs, found.manifests, found.images, found.read)
        for note in found.notes:
            self._note(found.source, note)
        for file, (digest, reason, images) in found.damaged.items():
            self.file(found.source, file, digest, reason, images, prefix=f"{found.source}: ")
        for name, top, faults in found.broken:
            self.image(found.source, name, top, faults)
        if found.damage:
            self.unreadable(found.source, LayoutInvalid(found.source, found.damage))

    def unreadable(self, source: str, error: OciProxyError) -> None:
        """An archive that could not be read, or not to its end."""
        self._count("failed archives", error.exit_code)
        if self._json:
            print_event("failed", source=source, error=type(error).__name__, reason=str(error))
        else:
            self._screen.line(f"failed {error}")

    def _note(self, source: str, text: str) -> None:
        if self._json:
            print_event("note", source=source, text=text)
        else:
            self._screen.line(f"{source}: {text}")

    def looked(self, blobs: int, manifests: int, images: int, read: int) -> None:
        """Add to the numbers of the last line; `read` is bytes."""
        self._looked.update(blobs=blobs, manifests=manifests, images=images, bytes=read)

    def file(
        self,
        source: str,
        file: str,
        digest: Digest,
        reason: str,
        images: Sequence[str] | None,
        *,
        prefix: str = "",
    ) -> None:
        """A damaged file of a store or an archive, and the images that need it: None where the
        images were not looked at. A line has `prefix` before the file."""
        self._count("damaged files", _DAMAGED)
        if self._json:
            print_event(
                "damaged",
                source=source,
                file=file,
                digest=str(digest),
                reason=reason,
                images=images,
            )
            return
        needed = f"; needed by {_some(images)}" if images else "; no image needs it"
        self._screen.line(f"damaged {prefix}{file}: {reason}{'' if images is None else needed}")

    def image(self, source: str, name: str, top: Digest, faults: Sequence[Fault]) -> None:
        """An image that is not whole, and why."""
        status = "damaged" if any(fault.damaged for fault in faults) else "incomplete"
        self._count(f"{status} images", _DAMAGED if status == "damaged" else _MISSING)
        if self._json:
            problems = [
                {"digest": str(f.digest), "reason": f.reason, "damaged": f.damaged, "file": f.file}
                for f in faults
            ]
            print_event(
                "image",
                source=source,
                reference=name,
                digest=str(top),
                status=status,
                problems=problems,
            )
            return
        self._screen.line(f"{status} {name if str(top) in name else f'{name}@{top}'}:")
        for fault in islice(faults, _SHOWN):
            self._screen.line(f"  {fault}")
        if len(faults) > _SHOWN:
            self._screen.line(f"  and {len(faults) - _SHOWN} more: see --json")

    def end(self, *, interrupted: bool = False) -> None:
        seconds = time.monotonic() - self._began
        found = {what: count for what, count in self._found.items() if count}
        if self._json:
            print_event(
                "done",
                **self._looked,
                found=found,
                seconds=round(seconds, 3),
                interrupted=interrupted,
                **({"left": self._left} if self._left else {}),
            )
            return
        looked = ", ".join(
            counted(self._looked[f"{what}s"], what) for what in ("blob", "manifest", "image")
        )
        parts = [f"{what}: {count}" for what, count in found.items()]
        if self._left:
            parts.append(self._left)
        if interrupted:
            parts.append("interrupted before all was looked at")
        self._screen.line(
            f"{'; '.join(parts) or 'all is whole'}. "
            f"{looked}; read {decimal(self._looked['bytes'])} in {seconds:.1f} s"
        )

    def _record(self, source: str, file: str, digest: Digest | None) -> None:
        """A record that is damaged, or leads to a manifest that is not stored."""
        damaged = digest is None
        kind = "damaged records" if damaged else "records that lead nowhere"
        self._count(kind, _DAMAGED if damaged else _MISSING)
        reason = "is no record" if damaged else f"leads to {digest}, which is not stored"
        if self._json:
            print_event("record", source=source, file=file, damaged=damaged, reason=reason)
        else:
            self._screen.line(f"{'damaged' if damaged else 'nowhere'} {file}: {reason}")

    def _files(self, source: str, status: str, files: Iterable[str], reason: str) -> None:
        """Files that say nothing about an image: they leave the exit code alone."""
        for number, file in enumerate(sorted(files)):
            self._found[f"{status} files"] += 1
            if self._json:
                print_event(status, source=source, file=file, reason=reason)
            elif number < _SHOWN:
                self._screen.line(f"{status} {file}: {reason}")
            elif number == _SHOWN:
                self._screen.line(f"{status} files are more than these: see --json")

    def _count(self, what: str, code: int) -> None:
        self._found[what] += 1
        self.exit_code = max(self.exit_code, code)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
