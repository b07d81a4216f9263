"""The list of a recipe's keys: each one with a default as it is typed, and with a meaning."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from models.training.recipe import CAAD_PLUS, Recipe
from models.training.recipe_files import load_recipe
from models.training.recipe_keys import describe_keys, sections


def test_every_section_of_a_recipe_is_listed_once():
    places = [place for section in sections() for place in section.places]
    assert len(places) == len(set(places)) and places[0] == ""
    assert {f.name for f in dataclasses.fields(Recipe)} - {"objective", "sources"} <= set(places)
    assert {"sources.NAME", "sources.NAME.layers", "student.lora", "student.hears", "teacher.hears"} <= set(places)


def test_every_key_has_a_meaning():
    keys = [key for section in sections() for key in section.keys]
    assert len({key.name for key in keys}) == len(keys) > 100
    for key in keys:
        assert len(key.meaning) > 5 and "#" not in key.meaning, key
        assert key.default or key.name.endswith(".*"), key


def test_defaults_are_what_a_user_types(tmp_path):
    """The defaults as overrides give the recipe that has none."""
    path = tmp_path / "plain.yaml"
    path.write_text("objective: sft\n")
    keys = [key for section in sections() for key in section.keys if key.default and key.name != "objective"]
    words = [f"{key.name}={key.default}" for key in keys if "NAME" not in key.name]
    assert load_recipe(str(path), words) == load_recipe(str(path))
    words = [f"{key.name.replace('NAME', 'a')}={key.default}" for key in keys if "NAME" in key.name]
    changed = ["objective=sources", "sources.a.folder=LM"]
    assert load_recipe(str(path), [*words, *changed]) == load_recipe(str(path), changed)


def test_the_example_of_the_page_is_a_recipe(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    path = tmp_path / "example.yaml"
    path.write_text(example)
    assert load_recipe(str(path)).loss.alpha == 1


def test_comments_above_and_behind_a_key_are_read():
    meanings = {key.name: key.meaning for section in sections() for key in section.keys}
    assert meanings["loss.temperature"].startswith("tau; ")
    assert meanings["data.form"].startswith("Form of the rows. ") and meanings["data.form"].endswith("mcr_bench.")
    assert meanings["student.lora.r"] == "rank of the LoRA"
    for name, value in CAAD_PLUS.items():
        assert f"loss.{name}={str(value).lower().removesuffix('.0')}" in meanings["objective"]


def test_the_list_has_every_key_and_is_narrow():
    shown = describe_keys()
    for section in sections():
        for key in section.keys:
            assert f"\n  {key.name}{'=' if key.default else ''}{key.default}\n" in shown
    assert max(map(len, shown.splitlines())) <= 110
