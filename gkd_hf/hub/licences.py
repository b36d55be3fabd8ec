"""The terms that a student inherits: of the data it was trained on, of its teacher, of the weights it began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gkd_hf.data.domains import Domain, domain
from gkd_hf.data.shards import is_hub_id

PERMISSIVE = "apache-2.0"
OTHER_NAME = "terms-of-data-and-teacher"

# Begin of Hub ids of weights whose repositories state this licence.
_APACHE = (
    "facebook/dinov2-",
    "facebook/deit-",
    "facebook/dino-vit",
    "facebook/convnext-",
    "google/vit-",
    "microsoft/resnet-",
    "microsoft/swin-",
)


@dataclass(frozen=True)
class Terms:
    """Terms of one ingredient: what it is, its name, the terms in words, the Hub's id ("" = unknown), its page."""

    role: str
    name: str
    words: str
    licence_id: str
    page: str = ""


@dataclass(frozen=True)
class Licence:
    """What the card's metadata says; `name` and `link` only go with the id `other`."""

    id: str
    name: str | None = None
    link: str | None = None


def ingredients(settings: Mapping[str, Any]) -> list[Terms]:
    """Everything whose terms bind the student: the domains it was trained on, its teacher, its first weights."""
    found: dict[str, Terms] = {}
    for stage in (settings.get("stages") or {}).values():
        if stage is not None:
            found[stage["data"]] = data_terms(stage["data"], "trained on")
    terms = list(found.values()) or [Terms("trained on", "images", "unknown here: no recipe names them", "")]
    teacher = settings.get("teacher")
    if teacher:
        terms.append(weight_terms(teacher["name"], "teacher"))
    student = settings.get("student") or {}
    if student.get("pretrained") and isinstance(student.get("encoder"), str):
        terms.append(weight_terms(student["encoder"], "student's first weights"))
    return terms


def data_terms(name: str, role: str) -> Terms:
    """The terms of a domain's data."""
    entry = card_domain(name)
    return Terms(role, name, entry.licence or "unknown here: your own data", entry.licence_id, entry.home_page)


def weight_terms(name: str, role: str) -> Terms:
    """The terms of an encoder's weights."""
    if name == "toy":
        return Terms(role, "toy (ships with gkd_hf)", "Apache-2.0", PERMISSIVE)
    page = f"https://huggingface.co/{name}" if is_hub_id(name) else ""
    if name.startswith(_APACHE):
        return Terms(role, name, "Apache-2.0", PERMISSIVE, page)
    return Terms(role, name, "see its page" if page else "unknown here", "", page)


def derived_licence(settings: Mapping[str, Any], card_page: str = "") -> Licence:
    """The licence of the student: the one the recipe names, else apache-2.0 if all it was made from allows it.

    Args:
        settings: the resolved recipe. card_page: where the card will be read, for terms that have no page.
    """
    named = (settings.get("hub") or {}).get("license")
    if named and named != "other":
        return Licence(named)
    terms = ingredients(settings)
    binding = [each for each in terms if each.licence_id != PERMISSIVE]
    if not binding and not named:
        return Licence(PERMISSIVE)
    pages = [each.page for each in binding if each.page]
    link = pages[0] if len(pages) == 1 == len(binding) else (f"{card_page}#licences" if card_page else None)
    return Licence("other", OTHER_NAME, link or (pages[0] if pages else None))


def card_domain(name: str) -> Domain:
    """`domain(name)`, and `custom` for the user's own `custom:anything`."""
    return domain("custom" if name.partition(":")[0] == "custom" else name)
