import csv
import re
import statistics

import pytest
from report_cases import SIX, write_results

from models.reporting.figures import Figure
from models.reporting.results_csv import (
    ResultsError,
    curves_csv,
    over_seeds,
    read_curves,
    read_results,
    rows_csv,
    summarize_seeds,
)
from models.reporting.sections import STORED, stored_sections
from models.reporting.tables import Table


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return stored_sections(write_results(tmp_path_factory.mktemp("all") / "results"))


def table_of(section, caption):
    return next(b for b in section.blocks if isinstance(b, Table) and b.caption.startswith(caption))


def cell(table, row, column):
    place = [c.name for c in table.columns].index(column)
    return dict(table.rows)[row][place - 1]


def section_of(stored, title):
    return next(s for s in stored.sections if s.title.startswith(title))


def test_means_deviations_and_seeds_are_those_of_the_file(stored):
    table = table_of(section_of(stored, "Systems of the CAAD paper"), "Scores")
    found = cell(table, "standard KD", "false hint")
    assert found.value == pytest.approx(46)
    assert found.text == f"46.0 ± {statistics.stdev((44, 48)):.1f}" and found.note == "20.6 to 71.4"  # t with one degree
    assert cell(table, "standard KD", "seeds").text == "2" and cell(table, "teacher, greedy", "seeds").text == "1"
    assert cell(table, "teacher, greedy", "false hint").text == "22.0"  # one seed: no deviation and no interval
    assert cell(table, "teacher, greedy", "false hint").note == ""
    table = table_of(section_of(stored, "Systems of the CAAD paper"), "Controls")
    assert cell(table, "CAAD alpha 2", "control: no audio").note == "1 seed"  # the other seed was not asked
    assert cell(table, "CAAD alpha 2", "latency of an answer (ms)").text == "90.0 ± 0.0"
    by_task = table_of(section_of(stored, "Systems of the CAAD paper"), "By task, no hint")
    assert [c.name for c in by_task.columns] == ["system", "gender", "speaking rate"]


def test_bias_before_and_after(stored):
    figure = next(b for b in section_of(stored, "Systems").blocks if isinstance(b, Figure) and b.name == "six-systems-bias")
    assert "teacher, greedy: repeats a false hint 70; student by true labels: repeats a false hint 58 (32.6 to" in figure.alt
    assert figure.alt.endswith("CAAD alpha 2: repeats a false hint 15 (2.29 to 27.7).")


def test_sweeps(stored):
    section = section_of(stored, "Sweeps")
    figures = {b.name: b for b in section.blocks if isinstance(b, Figure)}
    assert list(figures) == ["sweep-conflict-strength", "sweep-alpha", "sweep-anchor"]
    assert "standard KD: 40 at 0, 40 at 1; CAAD alpha 2: 80 at 0, 80 at 1" in figures["sweep-conflict-strength"].alt
    assert "False hint, % over contrast strength alpha. CAAD: 60 at 0.5, 60 at 2" in figures["sweep-alpha"].alt
    told = "Stage 1's words from the metadata, CAAD alpha 2: ALL 70, no hint 80, true hint 90, false hint 80"
    assert told in figures["sweep-anchor"].alt
    row = "the teacher's own answers, standard KD"
    assert cell(table_of(section, "Who writes"), row, "false hint").text == "40.0"


def test_differences_keep_their_sign(stored):
    table = table_of(section_of(stored, "Differences"), "Difference")
    found = cell(table, "CAAD alpha 2 minus standard KD", "true hint")
    assert (found.text, found.note, found.value) == ("−6.0", "−10.0 to −2.0, n 10", pytest.approx(-6))


def test_what_is_not_there_is_named(stored, tmp_path):
    named = "\n".join(stored.missing)
    assert "demo.csv is not among the results; python -m models demo makes it." in named
    assert "sweeps.csv: no rows of the sweep lambda" in named and "sweeps.csv: no rows of the sweep tau" in named
    assert "six_systems.csv: no rows of caad1, caad_plus for the figure" in named
    assert not any(line.startswith(("sources_layers", "six_systems_paired", "training")) for line in stored.missing)
    (tmp_path / "six_systems.csv").write_text(re.sub(r"follows_hint", "other", SIX))
    assert "six_systems.csv: no column follows_hint." in stored_sections(tmp_path).missing
    (tmp_path / "empty").mkdir()
    empty = stored_sections(tmp_path / "empty")
    assert empty.sections == [] and len(empty.missing) == len(STORED) + 1


def test_a_column_without_values_is_named(tmp_path):
    (tmp_path / "demo.csv").write_text("system,seed,neutral,tir_adv\na,0,0.5,\n")
    assert "demo.csv: no value in the columns tir_adv." in stored_sections(tmp_path).missing


def test_a_file_of_its_own_is_shown_as_it_is(tmp_path):
    (tmp_path / "others.csv").write_text("stage,seconds,note\nfirst,10,x\nsecond,,y\n")
    table = table_of(section_of(stored_sections(tmp_path), "others.csv"), "others.csv")
    assert cell(table, "first", "seconds").value == 10 and cell(table, "second", "seconds").text == "–"
    (tmp_path / "others.csv").write_text("stage\n" + "x\n" * 201)
    stored = stored_sections(tmp_path)
    assert "others.csv: the first 200 of its 201 rows are shown." in stored.missing


@pytest.mark.slow
def test_the_committed_results_can_be_shown():
    from models.reporting.report import RESULTS

    stored = stored_sections(RESULTS)
    notes = [note for section in stored.sections for note in section.notes if note.startswith("From ")]
    shown = {note.split()[1].rstrip(",.:") for note in notes}
    assert shown == {p.name for p in RESULTS.glob("*.csv")} - {"training.csv"} and {"demo.csv", "sources_layers.csv"} <= shown


def test_interval_of_the_file_stands_in_where_there_is_one_seed(tmp_path):
    path = tmp_path / "demo.csv"
    path.write_text("system,seed,neutral,neutral_low,neutral_high\na,0,0.5,0.4,0.7\nb,0,0.5,0.4,0.7\nb,1,0.9,0.8,1\n")
    found = over_seeds(read_results(path), ["neutral"])
    assert (found["a",]["neutral"].low, found["a",]["neutral"].high) == (0.4, 0.7)
    assert (found["b",]["neutral"].low, found["b",]["neutral"].high) == pytest.approx((0.7 - 2.5412, 0.7 + 2.5412), abs=1e-3)
    # 12.706 (t with one degree of freedom) times 0.2828 over the root of 2


def test_the_interval_over_seeds_is_that_of_student():
    s = summarize_seeds([0.1, 0.2, None, 0.4, 0.5, 0.9])
    assert (s.seeds, s.mean) == (5, pytest.approx(0.42))
    assert s.deviation == pytest.approx(statistics.stdev([0.1, 0.2, 0.4, 0.5, 0.9]))
    assert (s.low, s.high) == pytest.approx((0.42 - 2.7764451 * s.deviation / 5**0.5, 0.42 + 2.7764451 * s.deviation / 5**0.5))
    assert summarize_seeds([None]).mean is None
    shifted = summarize_seeds([x + 1 for x in (0.1, 0.2, 0.4, 0.5, 0.9)])
    assert (shifted.low - 1, shifted.high - 1) == pytest.approx((s.low, s.high))


def test_curves_round_trip(tmp_path):
    runs = {
        ("mine", "KD", 0): [{"step": 1, "loss": 1.0, "kd": 3.0}, {"step": 2, "loss": 0.5}],
        ("mine", "KD", 1): [{"step": 1, "loss": 2.0, "kd": 5.0}, {"step": 2, "loss": 1.5}],
        ("ce", "CE", 0): [{"step": 10, "loss": 0.25}],
    }
    (tmp_path / "training.csv").write_text(curves_csv(runs))
    assert read_curves(read_results(tmp_path / "training.csv")) == {
        "KD": [{"step": 1, "loss": 1.5, "kd": 4.0}, {"step": 2, "loss": 1.0}], "CE": [{"step": 10, "loss": 0.25}]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header and at least one row, got 0 lines"),
        ("system,seed,all\n", "got 1 lines"),
        ("system,seed,all\na,0\n", "row 2: expected 3 cells, got 2"),
        ("system,seed,seed\na,0,1\n", r"expected each column once, got \['seed'\] twice"),
        ("system,seed,all\na,0,0.5\na,1,x\n", "row 3, column all: expected a finite number, got 'x'"),
        ("system,seed,all\na,0,nan\n", "row 2, column all: expected a finite number, got 'nan'"),
        ("system,seed,all\na,0,1\nb,0,1\na,0,2\n", "row 4: expected each seed of a once, got seed 0 in row 2 too"),
        ('system,seed,all\n"a,0,1\n', "expected comma-separated values"),
    ],
)
def test_a_damaged_file_stops_the_report(tmp_path, text, message):
    (tmp_path / "demo.csv").write_text(text)
    with pytest.raises(ResultsError, match=rf"^demo\.csv: .*{message}"):
        stored_sections(tmp_path)


def test_columns_that_a_known_file_must_have(tmp_path):
    (tmp_path / "sweeps.csv").write_text("sweep,value\nalpha,1\n")
    with pytest.raises(ResultsError, match=r"sweeps.csv: expected columns .*, got none called \['system', 'seed'\]"):
        stored_sections(tmp_path)
    (tmp_path / "sweeps.csv").unlink()
    (tmp_path / "training.csv").write_text("system,label,seed,step,loss\na,A,0,x,1\n")
    with pytest.raises(ResultsError, match=r"training\.csv: system a: expected a whole number of steps, got 'x'"):
        stored_sections(tmp_path)


def test_two_systems_of_one_label_stay_two(tmp_path):
    (tmp_path / "demo.csv").write_text("system,label,seed,all\na,same,0,0.1\nb,same,0,0.2\n")
    table = table_of(stored_sections(tmp_path).sections[0], "Scores")
    assert [label for label, _ in table.rows] == ["same (a)", "same (b)"]


def test_a_system_has_its_name_from_the_common_table_whatever_its_file_calls_it(tmp_path):
    (tmp_path / "demo.csv").write_text('system,seed,neutral\n"student, KD",0,0.5\n"student, CAAD alpha 2",0,0.6\n')
    (tmp_path / "six_systems.csv").write_text("system,label,seed,neutral\nkd,my KD,0,0.5\nown,my own,0,0.6\n")
    stored = stored_sections(tmp_path)
    demo, six = (table_of(section_of(stored, title), "Scores") for title in ("Demo", "Systems"))
    assert [label for label, _ in demo.rows] == ["standard KD", "CAAD alpha 2"]
    assert [label for label, _ in six.rows] == ["standard KD", "my own"]


def test_a_csv_has_every_column_of_every_row():
    lines = list(csv.DictReader(rows_csv([{"a": 1 / 3}, {"a": 2, "b": "x,y"}]).splitlines()))
    assert [(line["a"], line["b"]) for line in lines] == [("0.3333", ""), ("2", "x,y")] and lines[0]["commit"]
