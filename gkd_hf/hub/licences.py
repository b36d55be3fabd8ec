"""The terms that a student inherits: of the data it was trained on, of its teacher, of the weights it began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gkd_hf.data.domains import Domain, domain, domain_names
from gkd_hf.data.shards import is_hub_id
from gkd_hf.methods import uses_teacher

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
    """Everything whose terms bind the student: the domains it was trained on, its teachers, its first weights.

    A teacher that only a baseline learns from is among them, and said to be that baseline's.
    """
    found: dict[str, Terms] = {}
    for stage in (settings.get("stages") or {}).values():
        if stage is not None:
            found |= {name: data_terms(settings, name, "trained on") for name in domain_names(stage["data"])}
    terms = list(found.values()) or [Terms("trained on", "images", "unknown here: no recipe names them", "")]
    role = "teacher" if teacher_settings({**settings, "baselines": []}) else "teacher of a baseline"
    terms += [weight_terms(teacher["name"], role) for teacher in teacher_settings(settings)]
    student = settings.get("student") or {}
    if student.get("pretrained") and isinstance(student.get("encoder"), str):
        terms.append(weight_terms(student["encoder"], "student's first weights"))
    return terms


def teacher_settings(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A recipe's entry of its teacher, or of each where it has several; none if no method and no baseline uses it."""
    stages = settings.get("stages")
    # A label-free trainer that was used without a recipe knows its teacher and no stages.
    label_free = stages is None or any(stage for name, stage in stages.items() if name != "task")
    if not uses_teacher([settings.get("method", "gkd"), *(settings.get("baselines") or [])], label_free):
        return []
    return list(settings.get("teachers") or ([settings["teacher"]] if settings.get("teacher") else []))


def data_terms(settings: Mapping[str, Any], name: str, role: str) -> Terms:
    """The terms of a domain's data, where the recipe has it from.

    A known data set keeps its terms wherever it lies. What lies in the place of a custom domain, or where the recipe
    says that a toy city is, this package has not made and cannot know.
    """
    place, entry = data_place(settings, name), card_domain(name)
    kind = name.partition(":")[0]
    if kind == "custom" or (kind == "toy_city" and not is_rendered(settings, name)):
        page = f"https://huggingface.co/datasets/{place}" if is_hub_id(place) else ""
        return Terms(role, name, "see its page" if page else "unknown here: your own data", "", page)
    return Terms(role, name, entry.licence or "unknown here", entry.licence_id, entry.home_page)


def weight_terms(name: str, role: str) -> Terms:
    """The terms of an encoder's weights."""
    if name == "toy":
        return Terms(role, "toy (ships with gkd_hf)", "Apache-2.0", PERMISSIVE)
    if not is_hub_id(name):  # a folder may be called like a repository
        return Terms(role, name, "unknown here", "")
    page = f"https://huggingface.co/{name}"
    if name.startswith(_APACHE):
        return Terms(role, name, "Apache-2.0", PERMISSIVE, page)
    return Terms(role, name, "see its page", "", page)


def binding_terms(settings: Mapping[str, Any]) -> list[Terms]:
    """Those of the ingredients whose terms are not known to be as free as Apache-2.0."""
    return [each for each in ingredients(settings) if each.licence_id != PERMISSIVE]


def may_be_shown(settings: Mapping[str, Any], name: str) -> bool:
    """Whether a domain's pictures may go to others with a model: only where its terms are known to ask nothing."""
    return data_terms(settings, name, "shown").licence_id == PERMISSIVE


def is_rendered(settings: Mapping[str, Any], name: str) -> bool:
    """Whether a domain is a toy city that this package rendered, as far as the recipe tells."""
    return name.partition(":")[0] == "toy_city" and "data" in settings and not data_place(settings, name)


def data_place(settings: Mapping[str, Any], name: str) -> str:
    """Folder or Hub id that the recipe gives for a domain; "" if it gives none."""
    return ((settings.get("data") or {}).get("roots") or {}).get(name, "")


def derived_licence(settings: Mapping[str, Any], card_page: str = "") -> Licence:
    """The licence of the student: the one the recipe names, else apache-2.0 if all it was made from allows it.

    Args:
        settings: the resolved recipe. card_page: where the card will be read, for terms that have no page.
    """
    named = (settings.get("hub") or {}).get("license")
    if named and named != "other":
        return Licence(named)
    binding = binding_terms(settings)
    if not binding and not named:
        return Licence(PERMISSIVE)
    pages = [each.page for each in binding if each.page]
    link = pages[0] if len(pages) == 1 == len(binding) else (f"{card_page}#licences" if card_page else None)
    return Licence("other", OTHER_NAME, link or (pages[0] if pages else None))


def card_domain(name: str) -> Domain:
    """`domain(name)`, and `custom` for the user's own `custom:anything`."""
    return domain("custom" if name.partition(":")[0] == "custom" else name)
