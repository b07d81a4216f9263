"""README.md and docs/: their numbers are the committed ones, README stays short, links lead somewhere."""

from __future__ import annotations

import csv
import html
import re
import statistics

import pytest

import kdkernels
from docs import figures, tables
from kdkernels import integrations
from models.audio_lms.families import FAMILIES
from models.experiments.six_systems_settings import FULL, RESULTS
from models.experiments.study_endpoints import holm

PAGES = tables.pages()
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def text_of(name: str) -> str:
    return next(page for page in PAGES if page.name == name).read_text(encoding="utf-8")


def headings(text: str) -> set[str]:
    """Anchors as GitHub and MkDocs make them of plain headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def test_readme_is_short():
    text = text_of("README.md")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_are_those_of_the_csv_files(page):
    assert tables.written(page.read_text(encoding="utf-8"))[1] == []


def test_every_table_is_used():
    used = re.findall(
        r"^<!-- table: (\w+) -->$", "\n".join(page.read_text(encoding="utf-8") for page in PAGES), re.MULTILINE
    )
    assert sorted(used) == sorted([*tables.TABLES, *tables.RECIPE_TABLES])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_markers_are_closed_and_do_not_begin_a_line(page):
    """Markdown takes a comment at the beginning of a line for a block of HTML."""
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- n: ") == text.count("<!-- /n -->") == len(tables._NUMBER.findall(text))
    assert text.count("<!-- table: ") == text.count("<!-- /table -->") == len(tables._TABLE.findall(text))
    assert not re.search(r"^<!-- n: ", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        assert "://" not in link, link
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in headings(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """Paths of this repository that a page names."""
    text = page.read_text(encoding="utf-8")
    for path in set(re.findall(r"\b(?:kdkernels|models|csrc|benchmarks|tests)/[\w./-]*\w\.(?:py|md|csv|svg)\b", text)):
        assert (tables.ROOT / path).exists(), f"{page.name}: {path}"
    for name in set(re.findall(r"\b\w+\.csv\b", text)):
        tables.read(name.removesuffix(".csv"))


def test_every_public_name_is_on_the_api_page():
    shown = re.findall(r"^::: kdkernels\.(integrations\.)?(\w+)$", text_of("api.md"), re.MULTILINE)
    assert {name for of_integrations, name in shown if not of_integrations} == set(kdkernels.__all__)
    assert {name for _, name in shown} >= set(integrations.__all__)


def test_the_figure_of_the_results_has_the_numbers_of_the_table():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    told = re.search(r"<desc>(.*?)</desc>", figures.PATH.read_text(encoding="utf-8"))
    assert told, "docs/plots/results.svg: run `python -m docs.figures`"
    assert html.unescape(told[1]) == figures.results_figure().alt, "docs/plots/results.svg: run `python -m docs.figures`"


def test_settings_that_the_results_name():
    assert f"{100 * FULL.hint_correlation:g}%" in text_of("earlier-results.md")
    assert FULL.seeds == 5 and "five seeds" in text_of("earlier-results.md")


class TestCorrections:
    """What results.md says of all comparisons together, and studies.md of some: no CSV file holds it."""

    ROWS = tables.claimed()
    TEXT = " ".join((text_of("results.md") + text_of("studies.md")).split())

    def corrected(self, column: str = "p") -> dict[tuple[str, str, str], float]:
        found = holm([float(row[column]) for row in self.ROWS.values()])
        return {(study, name, second): p for (study, name, (_, second)), p in zip(self.ROWS, found, strict=True)}

    def verdicts(self) -> dict[tuple[str, str, str], str]:
        return {(study, name, second): row["verdict"] for (study, name, (_, second)), row in self.ROWS.items()}

    def test_what_passes(self):
        together, verdicts = self.corrected(), self.verdicts()
        passes = {key for key, verdict in verdicts.items() if verdict == "holds" and together[key] < 0.05}
        opposite = {key for key, verdict in verdicts.items() if verdict == "the opposite holds" and together[key] < 0.05}
        assert f"over all {len(together)} comparisons of the table below" in self.TEXT
        assert passes == {
            ("E1", "P2", "kd"), ("E2", "P2", "kd"), ("E2", "P2", "sharpened2"), ("E3", "P2", "kd_metadata"),
            ("E3", "P3", "kd_tuned"),
        }  # fmt: skip
        assert opposite == {(study, "P2", second) for study in ("E2", "E3") for second in ("hint_stripped", "ce_true")}
        steps = [together["E2", name, "kd_steps"] for name in ("P2", "P1")]
        assert f"Neither passes (p {steps[0]:.2f} and {steps[1]:.2f})" in self.TEXT

    def test_nothing_passes_over_folds(self):
        assert "With the groups as the units nothing passes." in self.TEXT
        assert min(self.corrected("folds_p").values()) > 0.05

    def test_within_a_study(self):
        within = {key: float(row["p_holm"]) for key, row in zip(self.verdicts(), self.ROWS.values(), strict=True)}
        assert f"(p {within['E2', 'P1', 'kd']:.2f} and {within['E2', 'P1', 'kd_tuned']:.3f})" in self.TEXT
        assert f"does not hold (p {within['E2', 'P3', 'sharpened2']:.2f})" in self.TEXT
        assert f"none holds (P2 at p {within['E2', 'P2', 'kd_metadata']:.2f})" in self.TEXT
        tuned = {(study, name) for (study, name, second), verdict in self.verdicts().items()
                 if second == "kd_tuned" and verdict == "holds"}  # fmt: skip
        assert tuned == {("E1", "P2"), ("E2", "P2"), ("E3", "P1"), ("E3", "P2"), ("E3", "P3")}

    def test_one_correction_over_each_table(self):
        lost = {}
        for study in tables.CLAIMED:
            own = {key: row for key, row in self.ROWS.items() if key[0] == study}
            found = holm([float(row["p"]) for row in own.values()])
            both = zip(own.items(), found, strict=True)
            lost |= {key[:2]: p for (key, row), p in both if row["verdict"] != "failed" and p > 0.05}
        assert lost.keys() == {("E2", "P2"), ("E3", "P2")}
        assert f"P2 against tuned KD in E2 (p {lost['E2', 'P2']:.2f}) and in E3 (p {lost['E3', 'P2']:.2f})" in self.TEXT

    def test_the_ten_lines(self):
        """Their numbers, from the table and from the accuracies: study by study, in points."""
        def points(name: str, second: str) -> list[float]:
            return [100 * float(row["difference"]) for (_, n, (_, s)), row in self.ROWS.items() if (n, s) == (name, second)]

        def accuracy(prefix: str, system: str, context: str) -> float:
            own = [row for row in tables.study_rows(prefix) if row["system"] == system]
            (found,) = tables.over_teachers(own, [context])
            return statistics.mean(found)

        better = [self.ROWS["E1", "P1", ("caad2", "kd_tuned")], self.ROWS["E2", "P1", ("caad2_steps", "kd_steps")],
                  self.ROWS["E3", "P1", ("caad2", "kd")]]  # fmt: skip
        leads = [tables.signed(100 * float(row["difference"])) for row in better]
        assert f"Without a text it is {leads[0]}, {leads[1]} and {leads[2]} points ahead" in self.TEXT
        one, two, three = points("P2", "kd")
        assert f"by {one:.0f} points in E1 and {two:.0f} in E2. Both pass. In E3 it is {three:.0f} ahead" in self.TEXT
        one, two, three = (-x for x in points("P2", "hint_stripped"))
        assert f"by {two:.0f} points in E2 and {three:.0f} in E3. Both pass. In E1 it leads by {one:.0f}" in self.TEXT
        one, two, three = (-x for x in points("P2", "ce_true"))
        assert round(two) == round(three) and f"by {two:.0f} points in E2 and in E3" in self.TEXT
        assert f"In E1 they lead by {one:.0f}" in self.TEXT
        bare = [-x for second in ("hint_stripped", "ce_true") for x in points("P1", second)]
        ahead = [*bare[1:3], *bare[4:]]
        assert max(map(abs, bare[::3])) < 0.5
        assert f"In E2 and E3 they are {min(ahead):.1f} to {max(ahead):.1f} points ahead" in self.TEXT
        one, two, three = points("P2", "kd_tuned")
        (steps,) = points("P2", "kd_steps")
        assert f"It is {one:.0f}, {two:.0f} and {three:.0f} points." in self.TEXT
        assert f"In E2 dev also chose the steps of both. Then it is {steps:.0f}, and that does not pass" in self.TEXT
        for system, said in (("caad2", "costs its student"), ("kd", "costs that of standard KD")):
            costs = [accuracy(x, system, "none") - accuracy(x, system, "adversarial")
                     for x in (tables.FIRST, tables.SEVERAL, tables.NATURAL)]  # fmt: skip
            assert f"{said} {costs[0]:.0f}, {costs[1]:.0f} and {costs[2]:.0f}" in self.TEXT
        one, two, three = points("P3", "kd")
        assert f"{-one:.0f} points behind standard KD in E1 and {-two:.0f} in E2. In E3 it is {three:.0f} ahead" in self.TEXT


class TestCheck:
    TABLE = "<!-- table: demo -->\n<!-- /table -->\n"

    def value(self) -> str:
        """The percentage of the demo's last student under false hints, from the file itself."""
        with (RESULTS / "demo.csv").open(newline="") as file:
            (row,) = (x for x in csv.DictReader(file) if x["system"] == "caad2")
        return f"{100 * float(row['conflict']):.1f}"

    def test_names_a_table_that_differs(self):
        fresh, stale = tables.written(self.TABLE)
        assert stale == ["table demo"] and "CAAD alpha 2" in fresh
        assert tables.written(fresh) == (fresh, [])
        changed = fresh.replace(self.value(), "1.5")
        assert changed != fresh and tables.written(changed) == (fresh, ["table demo"])

    def test_names_a_table_of_keys_that_differs(self):
        fresh, stale = tables.written("<!-- table: recipe_student_lora -->\n<!-- /table -->")
        assert stale == ["table recipe_student_lora"] and "| `student.lora.r` | `16` | rank of the LoRA |\n" in fresh
        assert tables.written(fresh.replace("`16`", "`8`")) == (fresh, stale)
        assert tables.written(fresh) == (fresh, [])

    def test_names_a_number_that_differs(self):
        key = "demo/system=caad2/conflict/percent"
        fresh, stale = tables.written(f"It gets <!-- n: {key} -->99.9<!-- /n -->.")
        value = self.value()
        assert f"-->{value}<!--" in fresh and stale == [f"n: {key}: the page says '99.9', the CSV '{value}'"]

    def test_ratio_and_mean(self):
        assert tables.number("sources_layers/system=sft/content/percent") == "65.7"
        (text,) = (row for row in tables.read("step_cpu") if row["system"] == "text")
        ratio = float(text["text_teacher_ms"]) / float(text["median_ms"])
        assert tables.number("step_cpu/system=text/text_teacher_ms:median_ms/one") == f"{ratio:.1f}"

    @pytest.mark.parametrize(
        "key",
        [
            "demo/system=nobody/conflict/percent",
            "demo/seed=0/nothing/percent",
            "demo/seed=0/conflict/nothing",
            "nothing/a=b/c/one",
            "demo",
        ],
    )
    def test_a_wrong_key_is_an_error(self, key):
        with pytest.raises(tables.TableError):
            tables.number(key)

    def test_command(self, tmp_path, monkeypatch, capsys):
        page = tmp_path / "README.md"
        page.write_text(self.TABLE, encoding="utf-8")
        monkeypatch.setattr(tables, "ROOT", tmp_path)
        assert tables.main(["--check"]) == 1 and "README.md: table demo: differs" in capsys.readouterr().err
        assert page.read_text(encoding="utf-8") == self.TABLE
        assert tables.main([]) == 0 and tables.main(["--check"]) == 0


def test_the_benchmarks_page_names_the_versions_and_what_was_not_committed():
    text = text_of("benchmarks.md")
    others = text.split("## How the others are called")[1].split("\n## ")[0]
    files = {path.name: tables.read(path.stem) for path in sorted((tables.ROOT / "benchmarks" / "results").glob("*.csv"))}
    measured = [*files["linear_cpu.csv"], *files["peers_cpu.csv"]]
    (row,) = {(x["torch"].split("+")[0], x["liger"], x["trl"], x["cce"]) for x in measured}
    assert "PyTorch {}, Liger Kernel {}, TRL {} and cut-cross-entropy (CCE) {}.".format(*row) in " ".join(others.split())
    with_changes = {name for name, found in files.items() if any("+changes" in x.get("commit", "") for x in found)}
    _, *sentence = text.partition("`+changes`")
    assert set(re.findall(r"\w+\.csv", "".join(sentence).split("\n\n")[0])) == with_changes


def test_the_linear_table_is_the_run_in_the_middle():
    runs: dict[str, dict[str, dict[str, str]]] = {}
    for row in tables.read("linear_runs_cpu"):
        runs.setdefault(row["run"], {})[row["contender"]] = row
    default = "kdkernels (default: fp32 logits)"

    def lead(rows: dict[str, dict[str, str]], over: str) -> float:
        return float(rows[over]["median_ms"]) / float(rows[default]["median_ms"])

    ordered = sorted(runs.values(), key=lambda rows: lead(rows, "eager"))
    shown = [", ".join(f"{lead(rows, over):.1f}" for rows in ordered) for over in ("eager", "torch.compile")]
    both = [" and ".join(x.rsplit(", ", 1)) for x in shown]
    text = " ".join(text_of("benchmarks.md").split())
    assert f"the default {both[0]} times faster than eager PyTorch, and {both[1]} times faster than torch.compile" in text
    committed = {row["contender"]: row["median_ms"] for row in tables.read("linear_cpu")}
    assert {name: row["median_ms"] for name, row in ordered[1].items()} == committed


def test_liger_is_shown_with_its_faster_chunk():
    """A peer at its best setting, in the README and at the hard shapes."""
    rows = [row for row in tables.read("linear_cpu") if row["contender"].startswith(tables.LIGER)]
    best = min(rows, key=lambda row: float(row["median_ms"]))
    assert len(rows) > 1
    (line,) = (line for line in text_of("README.md").splitlines() if line.startswith("| Liger"))
    chunk = best["contender"].removeprefix(tables.LIGER)
    assert line.startswith(f"| Liger, chunk {chunk} | {float(best['speedup_over_eager']):.1f} ")
    assert line.endswith(f"| {float(best['peak_extra_mib']):,.0f} |")


def test_errors_that_project_teacher_names():
    near = {row["contender"]: float(row["gradient_error"]) for row in tables.read("projection_cpu") if row["kl"][:6] == "0.0004"}
    said = " ".join(kdkernels.project_teacher.__doc__.split())
    for contender, words in {
        "from projections, 64 ids": "{} with 64 ids",
        "from projections, 16 ids": "{} with 16",
        "from projections, 1 ids": "{} with one",
        "from states": "{} from states",
    }.items():
        assert words.format(f"{100 * near[contender]:.2g}%") in said, contender


def test_audio_lms_of_the_training_page():
    """The table of audio LMs is that of models/audio_lms/families."""
    heard = [(f.name, f"{f.hears_seconds:g} s" if f.hears_seconds else "all", "one" if f.max_clips == 1 else "several")
             for f in FAMILIES]  # fmt: skip
    body = text_of("training.md").split("| audio LM | hears of a clip | clips in a turn |\n| --- | --- | --- |\n")[1]
    body = body.split("\n\n")[0]
    assert [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in body.splitlines()] == heard


def test_every_plot_is_shown():
    text = text_of("benchmarks.md")
    drawn = {path.name for path in (tables.ROOT / "benchmarks" / "results" / "plots").glob("*.svg")}
    assert drawn and not [name for name in drawn if f"results/plots/{name})" not in text]
