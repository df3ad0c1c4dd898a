"""The models that a student comes from: their names, and what their own model cards say of license and quality."""

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from torch import nn

from .redaction import is_hub_id, is_model_id, is_plain_text

logger = logging.getLogger(__name__)
# They ask for no more than to name the authors. All others are called licenses with terms of their own.
PERMISSIVE = frozenset(
    "afl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 ecl-2.0 isc mit ms-pl ncsa odc-by pddl "
    "postgresql unlicense wtfpl zlib".split()
)
_ADDRESS = re.compile(r"https://[\w./%-]+")
# Where `datasets` read a file of the Hub.
_DATASET_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@")


@dataclass(frozen=True)
class Source:
    """A model that a student started from or learned from.

    Attributes:
        name: Hub id or class name.
        license: Identifier of the Hub, such as "apache-2.0"; None where it is not known.
        license_name, license_link: Of the license "other".
        results: Values of its own model card, {(data set, metric): value}.
    """

    name: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    results: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class LicenseTerms:
    """The license that a student's card may state, and a sentence on where it comes from; None where not known."""

    license: str | None
    license_name: str | None
    license_link: str | None
    sentence: str
    is_free: bool


def source_of(model: nn.Module, *, online: bool = False) -> Source:
    """Return what is known of a model: from the card in its folder, or from the Hub's, cached or, `online`, fetched.

    A card that is missing or cannot be read or fetched is as if it said nothing.
    """
    location = _location(model)
    name = location if location and is_hub_id(location) else type(model).__name__
    return _source(name, None if location is None else _card(location, online))


def named_source(name: str, *, online: bool = False) -> Source:
    """Return what is known of a model by its Hub id or class name; see `source_of`."""
    return _source(name, _card(name, online) if is_model_id(name) else None)


def _source(name: str, card: Any) -> Source:
    if card is None:
        return Source(name)
    results = {
        (entry.dataset_type, entry.metric_type): float(entry.metric_value)
        for entry in card.eval_results or ()
        if isinstance(entry.metric_value, (int, float))
    }
    return Source(name, *_license(card), results)


def hub_source(model: nn.Module) -> str | None:
    """Return the Hub id that a model was loaded from; of one from a folder, the base model that its card names."""
    location = _location(model)
    if location is None or is_hub_id(location):
        return location
    base = getattr(_card(location, False) if Path(location).is_dir() else None, "base_model", None)
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return base if isinstance(base, str) and is_hub_id(base) else None


def combined_license(sources: Sequence[Source]) -> LicenseTerms:
    """Return the one license that follows from those of all sources: none unless all are known and they agree.

    Where they differ, one with terms of its own goes before the permissive ones, and among these the first.
    """
    unknown = [entry for entry in sources if entry.license is None]
    bound = [entry for entry in sources if entry.license is not None and entry.license not in PERMISSIVE]
    named = [f"{entry.name} ({entry.license})" for entry in sources if entry.license is not None]
    sentence = f"Carried over from {' and '.join(named)}." if named else ""
    if bound:
        who = " and ".join(f"{entry.name} ({entry.license_name or entry.license})" for entry in bound)
        sentence = f"{who} may restrict the use of this model: read the license before you use or share it."
    if unknown:
        who = " and ".join(entry.name for entry in unknown)
        sentence += f" The license of {who} is not known here: check it before you use or share this model."
    chosen = next(iter([*bound, *sources]), None)
    if chosen is None or unknown or len({(entry.license, entry.license_name) for entry in bound}) > 1:
        return LicenseTerms(None, None, None, sentence.strip(), False)
    return LicenseTerms(chosen.license, chosen.license_name, chosen.license_link, sentence, not bound)


def warn_of_license(sources: Sequence[Source]) -> None:
    """Log what the licenses of a student's sources may restrict, and those that are not known."""
    terms = combined_license(sources)
    if not terms.is_free and terms.sentence:
        logger.warning("The license of the student: %s Pass license=... where you know better.", terms.sentence)


def dataset_source(dataset: Any) -> str | None:
    """Return the Hub id that a data set of `datasets` was loaded from, or None."""
    files = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = {match[1] for match in map(_DATASET_FILE.match, files) if match}
    return found.pop() if len(found) == 1 else None


def _location(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _card(location: str, online: bool) -> Any:
    """Return the metadata of a model's card; None where there is none that can be read."""
    with suppress(Exception):  # of the network, the cache, the encoding, YAML: they cost what the card would tell
        path = Path(location, "README.md")
        if not Path(location).is_dir():
            path = Path(hf_hub_download(location, "README.md", local_files_only=not online))
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    return None


def _license(card: Any) -> tuple[str | None, str | None, str | None]:
    found = [card.license, card.license_name]
    identifier, name = (text if isinstance(text, str) and is_plain_text(text) else None for text in found)
    link = card.license_link
    return identifier, name, link if isinstance(link, str) and _ADDRESS.fullmatch(link) else None
