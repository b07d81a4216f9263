"""The headline and the section of a study in long form: teachers are the unit, claims get a verdict."""

import csv
import io
import statistics

import pytest

from models.evaluation.t_interval import t_interval
from models.reporting.figures import Figure
from models.reporting.headline import LongScores, Score, claims, long_headline, verdict
from models.reporting.report import Report, write_report
from models.reporting.results_csv import ResultsError
from models.reporting.sections import stored_sections
from models.reporting.systems import CONTEXTS, SYSTEMS
from models.reporting.tables import MAX_COLUMNS, Table

TEACHERS = (("0", "a"), ("0", "b"), ("1", "a"), ("1", "b"))
# Standard KD by context; what each other system adds to it; what each teacher adds to all.
KD = {"none": 0.80, "faithful": 0.95, "adversarial": 0.50, "irrelevant": 0.78}
ADDED = {
    "kd": (0, 0, 0, 0), "caad1": (0.02, -0.01, 0.2, 0.02), "caad2": (0.04, -0.03, 0.3, 0.03),
    "hint_stripped": (0.04, 0, 0.28, 0.03), "ce_true": (0.06, 0, 0.35, 0.05), "teacher": (0, 0.01, -0.2, 0),
}  # fmt: skip


def study(noise=0.01, tasks=("gender", "question"), systems=ADDED, added=ADDED):
    """Rows of study.csv. The gain varies by `noise` from teacher to teacher, for CE by half of it, for KD not at all."""
    rows = []
    for number, (fold, teacher) in enumerate(TEACHERS):
        for seed in (0, 1):
            for system in systems:
                for task in tasks:
                    for context, more in zip(KD, added[system], strict=True):
                        own = noise * (number - 1.5) * {"kd": 0, "ce_true": 0.5}.get(system, 1)
                        accuracy = KD[context] + more + own + 0.02 * (task == "question") - 0.01 * seed
                        rows.append(
                            {
                                "teacher": teacher, "fold": fold, "seed": seed, "system": system, "task": task, "category": task,
                                "context": context, "accuracy": round(min(1.0, accuracy), 6), "items": 100, "commit": "abc",
                                "date": "2026-11-28",
                            }
                        )  # fmt: skip
    return rows


def write_study(folder, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "study.csv").write_text(text.getvalue())
    return folder


def test_the_interval_is_over_teachers_and_a_teacher_of_another_fold_is_another():
    scores = LongScores(study())
    found = scores.difference("caad2", "kd", "conflict")
    assert found[:3] == pytest.approx(t_interval([0.3 + 0.01 * (n - 1.5) for n in range(4)])) and found.over == "4 teachers"
    own = scores.score("kd", "neutral")
    assert own.value == pytest.approx(0.80 + 0.01 - 0.005) and own.over == "4 teachers"


def test_one_teacher_gives_an_interval_over_its_seeds_and_the_verdict_says_so():
    rows = [row for row in study() if (row["fold"], row["teacher"]) == TEACHERS[0]]
    for row in rows:
        if row["system"] == "caad2":
            row["accuracy"] += 0.01 * row["seed"]
    found = LongScores(rows).difference("caad2", "kd", "conflict")
    assert found[:3] == pytest.approx(t_interval([0.285, 0.295]))
    headline = long_headline(LongScores(rows))
    assert headline.verdicts[1].word == "Holds for this teacher" and "2 seeds of one teacher" in headline.verdicts[1].sentence
    assert any("With another teacher the sizes differ" in note for note in headline.notes)


def test_only_what_both_systems_have_is_compared():
    rows = study(noise=0)
    easy = [dict(row, task="easy", accuracy=1.0) for row in rows if row["system"] == "caad2" and row["task"] == "gender"]
    found = LongScores([*rows, *easy]).difference("caad2", "kd", "neutral")
    assert found.value == pytest.approx(0.04)  # KD was not asked the easy task
    of_one = [row for row in rows if row["system"] == "kd" or (row["fold"], row["teacher"]) == TEACHERS[1]]
    assert LongScores(of_one).difference("caad2", "kd", "neutral").over == "2 seeds of one teacher"


@pytest.mark.parametrize(
    ("found", "context", "word"),
    [
        (Score(0.3, 0.2, 0.4, "8 teachers"), "conflict", "Holds"),
        (Score(0.3, -0.1, 0.7, "8 teachers"), "conflict", "Not decided"),
        (Score(-0.3, -0.4, -0.2, "8 teachers"), "conflict", "The opposite holds"),
        (Score(0.3, 0.2, 0.4, "176 answers"), "conflict", "Holds in this run"),
        (Score(0.3, over="one run"), "conflict", "Not decided"),
        (Score(-0.004, -0.008, 0.0, "8 teachers"), "aligned", "Holds"),  # behind by less than the margin
        (Score(-0.008, -0.015, 0.0, "8 teachers"), "aligned", "Not decided"),
        (Score(-0.03, -0.04, -0.02, "8 teachers"), "aligned", "Does not hold"),
    ],
)
def test_a_verdict_needs_the_whole_interval(found, context, word):
    scores = {system: dict.fromkeys(("neutral", "aligned", "conflict"), Score(0.5)) for system in ("kd", "caad2")}
    claim = next(c for c in claims(scores) if c.context == context)
    assert verdict(claim, lambda *_: found).word == word


def test_the_headline_has_five_systems_the_best_in_bold_and_a_point_for_each():
    headline = long_headline(LongScores(study()))
    labels = [label for label, _ in headline.table.rows]
    assert labels == [SYSTEMS[s] for s in ("ce_true", "hint_stripped", "kd", "caad1", "caad2")]
    assert [c.name for c in headline.table.columns] == ["system", *CONTEXTS.values()]
    best = {column: label for label, cells in headline.table.rows for column, cell in zip(KD, cells, strict=True) if cell.best}
    assert best["none"] == best["adversarial"] == SYSTEMS["ce_true"]
    assert sum(cell.best for _, cells in headline.table.rows for cell in cells[1:2]) == 3  # three are equal under a true hint
    kd = dict(headline.table.rows)["standard KD"]
    assert kd[0].text == "80.5" and kd[0].note == ""  # equal teachers have no interval
    assert isinstance(headline.figure, Figure) and "teacher, greedy: 96.5" in headline.figure.alt
    words = [(v.word, v.sentence.partition(": ")[0]) for v in headline.verdicts]
    assert words[:3] == [
        ("Holds", "Without a hint, CAAD alpha 2 is ahead of standard KD"),
        ("Holds", "Under a false hint, CAAD alpha 2 is ahead of standard KD"),
        ("Not decided", "Under a true hint, CAAD alpha 2 is at most 1 point behind standard KD"),
    ]
    assert any("is ahead of hint-stripped KD" in v.sentence for v in headline.verdicts)
    assert any("is ahead of CE on true labels" in v.sentence and v.word == "The opposite holds" for v in headline.verdicts)
    assert not any(note.startswith("Not compared here") for note in headline.notes)


def test_the_study_is_the_headline_of_a_folder_that_has_one(tmp_path):
    write_study(tmp_path, study())
    stored = stored_sections(tmp_path)
    section = stored.sections[0]
    assert section.title == "Study" and stored.headline.verdicts[0].word == "Holds"
    tables = {block.caption: block for block in section.blocks if isinstance(block, Table)}
    difference = dict(tables["Difference to standard KD in points, with 95% interval."].rows)["CAAD alpha 2"]
    assert difference[2].text == "+30.0" and difference[2].value == pytest.approx(30)
    by_teacher = tables["By teacher, false hint: accuracy in %."]
    assert [c.name for c in by_teacher.columns] == ["system", "fold 0, a", "fold 0, b", "fold 1, a", "fold 1, b"]
    page = write_report(tmp_path / "r.html", Report(title="x", results=tmp_path)).read_text()
    assert page.index("CAAD alpha 2 is ahead of standard KD") < page.index("<summary>")


ENDPOINTS = """\
name,first,second,teachers,actors,difference,t_low,t_high,p,actors_low,actors_high,bound,p_holm,verdict
P1,caad2,kd,8,11,0.04,0.01,0.07,0.02,-0.01,0.09,0.0,0.04,failed
P2,caad2,kd,8,11,0.3,0.2,0.4,0.001,0.1,0.5,0.0,0.003,holds
P3,caad2,kd,8,11,-0.05,-0.08,-0.02,0.01,-0.1,-0.015,-0.01,0.02,the opposite holds
P1,caad2,hint_stripped,1,3,-0.04,,,1.0,-0.1,0.1,0.0,1.0,too few teachers
"""


def test_a_claim_that_was_tested_has_the_verdict_of_the_test(tmp_path):
    write_study(tmp_path, study())
    (tmp_path / "study_endpoints.csv").write_text(ENDPOINTS)
    stored = stored_sections(tmp_path)
    verdicts = {v.sentence.partition(":")[0]: v for v in stored.headline.verdicts}
    p3 = "Under a true hint, on clips above −8 dB, CAAD alpha 2 is at most 1 point behind standard KD"
    assert [v.word for v in stored.headline.verdicts[:4]] == ["Failed", "Holds", "Does not hold", "Not decided"]
    assert verdicts[p3].sentence == (
        p3 + ": −5.0 points (95% over teachers −8.0 to −2.0; over teachers and actors −10.0 to −1.5; Holm's p 0.020; "
        "8 teachers, 11 actors)."
    )
    few = verdicts["Without a hint, CAAD alpha 2 is ahead of hint-stripped KD"].sentence
    assert "(no t interval; over teachers and actors −10.0 to +10.0; 1 teacher, 3 actors); too few teachers." in few
    # A claim that the file does not have is judged by study.csv, and the notes say that it is not corrected.
    assert verdicts["Under a false hint, CAAD alpha 2 is ahead of CE on true labels"].word == "The opposite holds"
    assert any("not corrected for the other 2 claims" in note for note in stored.headline.notes)
    tables = [b for b in stored.sections[0].blocks if isinstance(b, Table) and b.caption.startswith("Endpoints of the protocol")]
    assert [cells[-1].text for _, cells in tables[0].rows] == ["failed", "holds", "the opposite holds", "too few teachers"]
    assert not any(section.title.startswith("study_") for section in stored.sections)


def test_the_claim_is_against_the_tuned_kd_where_there_is_one():
    scores = {s: dict.fromkeys(("neutral", "aligned", "conflict"), Score(0.5)) for s in ("kd", "kd_tuned", "caad2")}
    assert {c.worse for c in claims(scores)} == {"kd_tuned"}
    rows = [row | {"system": "kd_tuned"} for row in study() if row["system"] == "kd"]
    labels = [label for label, _ in long_headline(LongScores([*study(), *rows])).table.rows]
    assert "standard KD, tuned on dev" in labels and "CE on true labels" in labels and "CAAD alpha 1" not in labels


def test_teachers_of_another_experiment_are_not_mixed_in(tmp_path):
    other = [dict(row, teacher=f"E2-{row['teacher']}", accuracy=0.1) for row in study()]
    write_study(tmp_path, [*study(), *other])
    stored = stored_sections(tmp_path)
    assert [section.title for section in stored.sections[:2]] == ["Study", "Study E2"]
    assert dict(stored.headline.table.rows)["standard KD"][0].text == "80.5"
    assert stored.headline.notes[-1] == "Study E2, folded below: not decided 6."  # all are equal
    of_e2 = next(b for b in stored.sections[1].blocks if isinstance(b, Table))
    assert dict(of_e2.rows)["standard KD"][0].text == "10.0"
    names = [b.name for section in stored.sections for b in section.blocks if isinstance(b, Figure)]
    assert len(set(names)) == len(names)


def test_the_axes_have_no_verdict_on_caad_against_kd(tmp_path):
    write_study(tmp_path, [*study(), *(dict(row, teacher=f"axes-{row['teacher']}") for row in study())])
    stored = stored_sections(tmp_path)
    assert stored.sections[1].title == "Study axes" and stored.headline.verdicts
    assert not any("CAAD alpha 2 is" in note for note in stored.sections[1].notes)
    assert not any("Study axes" in note for note in stored.headline.notes)


def test_the_frontier_is_of_the_teachers_that_all_its_systems_have(tmp_path):
    more = ADDED | {"caad2_swapped": (0, -0.01, 0.29, 0), "caad2_narrow": (0, -0.4, -0.4, 0), "caad2_flat": (0, 0, 0, 0)}
    made = study(noise=0, systems=tuple(more), added=more)
    few = {"caad2_swapped": 3, "caad2_narrow": 3, "caad2_flat": 1}  # teachers that they have
    rows = [r for r in made if TEACHERS.index((str(r["fold"]), r["teacher"])) < few.get(r["system"], 4)]
    write_study(tmp_path, rows)
    blocks = stored_sections(tmp_path).sections[0].blocks
    figure = next(b for b in blocks if isinstance(b, Figure) and b.name == "study-frontier")
    assert "over the 3 teachers" in figure.caption and figure.caption.endswith("CAAD alpha 2 against the words spoken flat.")
    points = next(b for b in blocks if isinstance(b, Table) and b.caption.startswith("The points of the plot"))
    best = [label for label, cells in points.rows if cells[2].text]
    assert set(best) == {"CE on true labels", "teacher, greedy"}  # what is behind in one and ahead in none is not there
    assert figure.svg.count("CAAD alpha 2 against a narrow band") == 1  # in the key of the numbers


def test_curves_over_steps_and_tries_stand_apart_from_the_results(tmp_path):
    write_study(tmp_path, study())
    head = "teacher,seed,system,step,context,accuracy,items\n"
    lines = [f"f0s0,0,{s},{n},{c},0.{n},80\n" for s in ("kd", "caad2") for n in (30, 60) for c in ("none", "adversarial")]
    (tmp_path / "study_curves.csv").write_text(head + "".join(lines))
    (tmp_path / "study_dev.csv").write_text(
        "family,try,settings,none,faithful,adversarial,irrelevant,mean,chosen\nkd,kd_0,as kd,0.5,0.6,0.7,0.8,0.65,yes\n"
    )
    section = stored_sections(tmp_path).sections[1]
    assert section.title == "Study: settings and curves on dev"
    tries, curves = section.blocks
    assert [cell.text for cell in tries.rows[0][1]] == ["50.0", "60.0", "70.0", "80.0", "65.0", "yes"]
    assert "No hint, % right over step. standard KD: 30 at 30, 60 at 60" in curves.alt
    by_task = head.replace("context", "task,context") + "f0s0,0,kd,30,speaking_rate,none,0.7,40\nf0s0,0,kd,30,cry,none,0.6,36\n"
    (tmp_path / "study_curves_E3.csv").write_text(by_task)
    _, _, of_tasks = stored_sections(tmp_path).sections[1].blocks
    assert of_tasks.name == "study-curves-e3"
    assert "Speaking rate, no hint, % right over step. standard KD: 70 at 30" in of_tasks.alt
    assert "Cry, no hint, % right over step. standard KD: 60 at 30" in of_tasks.alt and "students of E3" in of_tasks.caption
    (tmp_path / "study_curves.csv").write_text(head + "".join([*lines, lines[0].replace("f0s0", "f1s0")]))
    with pytest.raises(ResultsError, match="expected the curves of one teacher and seed, got several"):
        stored_sections(tmp_path)


def test_steps_that_were_tried_are_a_mean_over_teachers(tmp_path):
    write_study(tmp_path, study())
    rows = [f"E2-f{t}s0,kd,{n},none,0.{n + t},80\n" for t in (0, 2) for n in (60, 30)]
    (tmp_path / "study_steps.csv").write_text("teacher,system,steps,context,accuracy,items\n" + "".join(rows))
    section = stored_sections(tmp_path).sections[1]
    (steps,) = section.blocks
    assert steps.name == "study-steps" and "interval over 2 teachers" in steps.caption
    assert "standard KD: 31 (18.3 to 43.7) at 30, 61 (48.3 to 73.7) at 60" in steps.alt
    assert "study_steps.csv" not in {s.title for s in stored_sections(tmp_path).sections}
    (tmp_path / "study_steps.csv").write_text("teacher,system,steps,context,accuracy,items\n" + rows[0])
    assert "standard KD: 60 at 60" in stored_sections(tmp_path).sections[1].blocks[0].alt


def test_questions_about_other_games_do_not_count_in_the_study(tmp_path):
    elsewhere = [{**row, "teacher": f"external-fillets-{row['teacher']}", "accuracy": 0.1} for row in study()]
    alone, beside = (stored_sections(write_study(tmp_path, rows)).sections[0] for rows in (study(), [*elsewhere, *study()]))
    assert [b.rows for b in alone.blocks if isinstance(b, Table)] == [b.rows for b in beside.blocks if isinstance(b, Table)]


def test_no_table_has_more_columns_than_fit(tmp_path):
    write_study(tmp_path, study(tasks=[f"task_{n:02}" for n in range(13)], systems=("kd", "caad2")))
    blocks = [b for b in stored_sections(tmp_path).sections[0].blocks if isinstance(b, Table)]
    assert max(len(b.columns) for b in blocks) <= MAX_COLUMNS + 1
    parts = [b for b in blocks if b.caption.startswith("By task, no hint")]
    assert len(parts) == 2 and all(b.columns[0].name == "system" for b in parts)
    assert [c.name for b in parts for c in b.columns[1:]] == [f"task {n:02}" for n in range(13)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": "misleading"}, "row 3: context: expected one of none, faithful"),
        ({"accuracy": "95"}, "row 3: accuracy: expected a share from 0 to 1, got 95"),
        ({"accuracy": "x"}, "row 3: accuracy: expected a share from 0 to 1, got x"),
        ({"context": "none"}, "row 3: expected each teacher, .* and context once, got 0, a, 0, kd, gender, neutral twice"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(change, message):
    rows = study()
    rows[1] |= change
    with pytest.raises(ResultsError, match=message):
        LongScores(rows, name="study.csv")


def test_a_blank_accuracy_was_not_measured():
    rows = study()
    blank = [dict(row, accuracy="") if row["seed"] == 1 else row for row in rows]
    assert LongScores(blank).score("kd", "neutral").value == pytest.approx(statistics.mean((0.80, 0.82)))
