#!/usr/bin/env python
"""Render the example cards under model_cards/, one for each recipe.

    python scripts/render_cards.py                     # those of recipes, without numbers
    python scripts/render_cards.py runs/quickstart     # and that of a finished run, with its numbers and figure

A recipe's card states no number unless the run that gave it is named here. A card of a run that was rendered before
stays as it is when its run is not named.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
sys.path.insert(0, str(ROOT))  # a checkout runs without being installed


def recipe_card(path: Path) -> str:
    """The card that a run of this recipe would publish, without a run."""
    from gkd_hf.hub.model_card import GKDModelCard
    from gkd_hf.hub.repo_names import RepoNames
    from gkd_hf.hub.run_facts import RunFacts
    from gkd_hf.training.recipe_file import load_recipe

    # A recipe may leave its teacher to the user.
    overrides = ["teacher.name=YOUR_TEACHER"] if 'name: "???"' in path.read_text(encoding="utf-8") else []
    settings = load_recipe(path, overrides).as_dict()
    return str(GKDModelCard("segmenter", RunFacts(settings), RepoNames.of(settings)).render())


def run_card(run_dir: Path, name: str) -> str:
    """The card of a finished run's segmenter, with its figure beside it if it has one."""
    figure, place = run_dir / "segmenter" / "report.png", CARDS / f"{name}_report.png"
    place.unlink(missing_ok=True)
    if figure.is_file():
        shutil.copyfile(figure, place)
    card = (run_dir / "segmenter" / "README.md").read_text(encoding="utf-8")
    return card.replace("](report.png)", f"]({name}_report.png)")


def main(argv: list[str] | None = None) -> int:
    """Write the cards; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="render_cards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="finished runs, in folders called like their recipes")
    runs = {path.resolve().name: path for path in parser.parse_args(argv).runs}
    from gkd_hf.errors import InputError, refused
    from gkd_hf.hub.push import check_finished, run_settings

    try:
        folder = ROOT / "scripts" / "recipes"
        recipes = sorted(set(folder.glob("*.yaml")) - set(folder.glob("*_compare.yaml")))
        names = [recipe.stem for recipe in recipes]
        for name, run_dir in runs.items():
            if name not in names:
                raise InputError(f"'{run_dir}' is not called like a recipe, one of {', '.join(names)}: rename it")
            check_finished(run_dir, run_settings(run_dir))
        for recipe in recipes:
            path = CARDS / f"{recipe.stem}.md"
            if recipe.stem in runs:
                path.write_text(run_card(runs[recipe.stem], recipe.stem), encoding="utf-8")
            elif not path.is_file() or "model-index:" not in path.read_text(encoding="utf-8"):
                path.write_text(recipe_card(recipe), encoding="utf-8")
    except InputError as error:
        return refused(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
